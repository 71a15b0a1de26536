// Data, words and small tools. Every string reaches the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const svgns = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const number = (v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : v === "nan" ? NaN : v);
const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

/** An HTML element with attributes and children; strings become text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(svgns, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Three significant digits, powers of ten as 1.2e-7. */
function figure(v, digits = 3) {
  if (v === null || v === undefined) return "not told";
  if (v === 0) return "0";
  if (!Number.isFinite(v)) return Number.isNaN(v) ? "NaN" : v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  const text = size >= 1e-3 && size < 1e5 ? String(Number(v.toPrecision(digits))) : v.toExponential(digits - 1);
  return text.replace("e+", "e");
}
const times = (v) => (v === null ? "not told" : `×${figure(v)}`);
const superscript = (n) => String(n).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
/** The tick of a log axis: 10⁻⁷; what lies between powers has none. */
const power = (v) => (Math.abs(Math.log10(v) % 1) < 1e-9 ? (v === 1 ? "1" : `10${superscript(Math.round(Math.log10(v)))}`) : "");
/** Ticks at powers of ten, few enough to read. */
function powers([low, high], wanted = 6) {
  const from = Math.ceil(Math.log10(low)), to = Math.floor(Math.log10(high));
  const step = Math.max(1, Math.ceil((to - from) / wanted));
  return Array.from({ length: Math.max(0, Math.floor((to - from) / step) + 1) }, (_, i) => 10 ** (from + i * step));
}
/** Whole numbers from low to high, at most `wanted` and evenly spaced. */
function wholes(low, high, wanted) {
  const step = Math.max(1, Math.ceil((high - low + 1) / Math.max(1, wanted)));
  return Array.from({ length: Math.floor((high - low) / step) + 1 }, (_, i) => low + i * step);
}
/** A log domain around the positive values, with room on both sides. */
function domain(values, fallback = [1e-9, 1]) {
  const good = values.filter((v) => known(v) && v > 0);
  if (!good.length) return fallback;
  let low = Infinity, high = 0;
  for (const v of good) { low = Math.min(low, v); high = Math.max(high, v); }
  return [low / 4, high * 4];
}
const within = (v, [low, high]) => (v === null ? null : Math.min(high, Math.max(low, v)));

const place = (cell) => (cell.layer === null ? cell.tap : `layer ${cell.layer} ${cell.tap}`);
const EVIDENCE = { h: "hash", p: "whole tensors", s: "sketch, an estimate", m: "norms, a lower bound", n: "hash: they differ" };
const STATUS = { e: "equal bit for bit", p: "within the floor", f: "beyond the floor", u: "not told" };
/** What is said of a cell; one that fails under its limit was told by a sharper test, which its record names. */
const statusOf = (cell) => (cell.more.t ? "under the limit, yet no rounding" : STATUS[cell.status]);
const [LEFT, RIGHT] = data.sides;

const decoded = new Map();
/** A view with its cells, made when first asked for. */
function cellsOf(index) {
  if (!decoded.has(index)) decoded.set(index, decode(data.views[index]));
  return decoded.get(index);
}
function decode(view) {
  const column = (name) => data.columns[view[name]];
  const [layer, tap, drift, floor, source, low, high, more, p, d] =
    ["layer", "tap", "drift", "floor", "source", "low", "high", "more", "p", "d"].map(column);
  const status = column("status"), rungs = column("rungs");
  return layer.map((at, i) => {
    const distance = number(drift[i]), ground = number(floor[i]);
    return {
      i, view, layer: at < 0 ? null : at, tap: data.taps[tap[i]][0], axes: data.taps[tap[i]][1], op: data.taps[tap[i]][2],
      drift: distance, floor: ground, source: data.words[source[i]], status: status[i], rung: rungs[i],
      excess: distance === null ? null : distance / ground, low: number(low[i]), high: number(high[i]),
      more: more[i] || {}, p: p[i], d: d[i],
    };
  });
}

/** The colour class of a cell, and its words in the legend. */
const BINS = [
  ["e", "equal"], ["b0", "< 0.1"], ["b1", "< 0.3"], ["b2", "< 1"], ["b3", `≤ ${data.limit}`],
  ["f1", `> ${data.limit}`], ["f2", "> 10"], ["f3", "> 10³"], ["f4", "> 10⁶"], ["f5", "> 10¹²"],
];
function bin(cell) {
  if (cell.status === "e" || cell.status === "u") return cell.status;
  const x = cell.excess;
  if (cell.status === "f") return x > 1e12 ? "f5" : x > 1e6 ? "f4" : x > 1e3 ? "f3" : x > 10 ? "f2" : "f1";
  return x < 0.1 ? "b0" : x < 0.3 ? "b1" : x < 1 ? "b2" : "b3";
}

/** Draw into a figure: the plot's own style element goes, the page's style sheet has those rules. */
function draw(id, options) {
  const host = byId(id);
  const made = Plot.plot({ className: "plot", style: { fontSize: "12px" }, ...options });
  made.querySelectorAll("style").forEach((style) => style.remove());
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", options.label);
  host.replaceChildren(made);
  host.classList.remove("closed");
  return made;
}
function say(id, words) { byId(id).textContent = words; }
/** Say why there is no picture; the place that was kept for it closes, and what was said of it goes. */
function empty(id, words) {
  byId(id).replaceChildren(el("p", { class: "none" }, words));
  byId(id).classList.add("closed");
  if (byId(`${id}-say`)) say(`${id}-say`, "");
}
const widthOf = (id) => Math.max(260, Math.floor(byId(id).clientWidth));
