// K and V rows: which of decode's cache rows are prefill's own, and which are another row.
const KINDS = {
  "=": ["own", "prefill's own row"], "~": ["near", "the same within rounding"], ">": ["moved", "another position's row"],
  L: ["other", "another layer's row"], 0: ["zero", "empty"], x: ["changed", "none of these"],
};
const rowsOf = (view) => (view.rows === null || view.rows === undefined ? null : data.rows[view.rows]);

function drawRowLegend(lists) {
  const seen = new Set(lists.flatMap(([, , runs]) => runs.map((run) => run[2])));
  byId("rows-legend").replaceChildren(...Object.entries(KINDS).filter(([kind]) => seen.has(kind))
    .map(([, [key, words]]) => el("li", {}, el("span", { class: `swatch row-${key}` }), words)));
}

function strip(id, letter, lists) {
  const mine = lists.filter((item) => item[1] === letter);
  if (!mine.length) return empty(id, `No ${letter.toUpperCase()} rows carry a hash on both sides.`);
  const layers = mine.map((item) => item[0]), bars = [];
  mine.forEach(([layer, , runs], y) => runs.forEach(([from, n, kind, arg]) => bars.push({ y, layer, from, to: from + n, kind, arg })));
  const tall = Math.max(4, Math.min(26, 280 / mine.length)), every = Math.max(1, Math.ceil(12 / tall)), end = Math.max(...bars.map((b) => b.to));
  draw(id, {
    width: widthOf(id), height: 46 + tall * mine.length, marginLeft: 40, marginBottom: 32, marginTop: 14, label: `${letter.toUpperCase()} rows by position and layer`,
    x: { domain: [Math.min(...bars.map((b) => b.from)), end], label: "position", labelArrow: "none", ticks: wholes(Math.min(...bars.map((b) => b.from)), end - 1, 8), tickFormat: "d" }, y: { axis: null, domain: [0, mine.length], reverse: false, range: [14, 14 + tall * mine.length] },
    marks: [
      Plot.rect(bars, { x1: "from", x2: "to", y1: "y", y2: (b) => b.y + 1, insetTop: 0.5, insetBottom: 0.5, fill: (b) => `var(--row-${KINDS[b.kind][0]})`,
        title: (b) => `layer ${b.layer}, rows ${b.from}–${b.to - 1}: ${KINDS[b.kind][1]}${b.kind === ">" ? ` (${b.arg > 0 ? "+" : "−"}${Math.abs(b.arg)})` : b.kind === "L" ? ` (layer ${b.arg})` : ""}` }),
      Plot.text(layers.map((layer, y) => ({ layer, y })).filter((_, i) => i % every === 0), { x: Math.min(...bars.map((b) => b.from)), dx: -7, y: (d) => d.y + 0.5, text: (d) => String(d.layer), textAnchor: "end", fill: SOFT, fontSize: 11 }),
    ],
  });
  return undefined;
}

/** Position in decode's cache across, the prefill row that stands there upwards: a shift is a line beside the diagonal. */
function diagonal(lists, layer, letter) {
  const found = lists.find((item) => item[0] === layer && item[1] === letter);
  if (!found) return empty("diagonal", "No rows for this layer.");
  const runs = found[2], first = Math.min(...runs.map((r) => r[0])), end = Math.max(...runs.map((r) => r[0] + r[1] - 1));
  const lines = runs.filter((r) => "=~>".includes(r[2])).map(([from, n, kind, by]) => ({ x1: from, x2: from + n - 1, y1: from + (by || 0), y2: from + n - 1 + (by || 0), kind }));
  const lost = runs.filter((r) => !"=~>".includes(r[2])).flatMap(([from, n, kind]) => [{ x1: from, x2: from + n - 1, kind }]);
  const width = Math.min(420, widthOf("diagonal")), pad = Math.max(0.6, (end - first) * 0.04);
  draw("diagonal", {
    width, height: width * 0.86, marginLeft: 44, marginBottom: 38, marginTop: 12, label: "Which prefill row stands at each position of decode's cache",
    x: { domain: [first - pad, end + pad], label: "position in decode's cache", labelArrow: "none", labelAnchor: "center", ticks: wholes(first, end, 8), tickFormat: "d" },
    y: { domain: [first - pad, end + pad], label: "prefill's row", labelArrow: "none", ticks: wholes(first, end, 8), tickFormat: "d", grid: true },
    marks: [
      Plot.link([0], { x1: first, x2: end, y1: first, y2: end, stroke: "var(--row-own-line)", strokeWidth: 1 }),
      Plot.link(lines, { x1: "x1", x2: "x2", y1: "y1", y2: "y2", stroke: (d) => `var(--row-${KINDS[d.kind][0]}-line)`, strokeWidth: 5, strokeLinecap: "round", clip: true }),
      Plot.link(lost, { x1: "x1", x2: "x2", y1: first - pad, y2: first - pad, stroke: (d) => `var(--row-${KINDS[d.kind][0]})`, strokeWidth: 9, strokeLinecap: "square" }),
      ...lines.length ? [Plot.dot(lines.filter((d) => d.x1 === d.x2), { x: "x1", y: "y1", r: 3, fill: (d) => `var(--row-${KINDS[d.kind][0]}-line)` })] : [],
    ],
  });
  const odd = runs.filter((r) => r[2] !== "=" && r[2] !== "~");
  return say("rows-say", odd.length ? `${letter.toUpperCase()} of layer ${layer}: ${odd.slice(0, 4).map(([from, n, kind, by]) => `${n === 1 ? `row ${from}` : `rows ${from}–${from + n - 1}`} ${kind === ">" ? `hold the row ${Math.abs(by)} ${by < 0 ? "before" : "after"}` : KINDS[kind][1]}`).join("; ")}${odd.length > 4 ? "; …" : ""}.`
    : `${letter.toUpperCase()} of layer ${layer}: every row is prefill's own${runs.some((r) => r[2] === "~") ? ", or the same within rounding" : ", bit for bit"}.`);
}

function drawRows(view, choice) {
  const lists = rowsOf(view);
  byId("rows-part").hidden = !lists;
  if (!lists) return empty("rows-none", view.arm === "A" ? "Arm A's rows are prefill's, put in and read back; choose decode's own cache to see its rows." : "No cached rows with a hash on both sides.");
  byId("rows-none").replaceChildren();
  drawRowLegend(lists);
  strip("rows-k", "k", lists);
  strip("rows-v", "v", lists);
  const options = lists.map(([layer, letter]) => `${letter}${layer}`);
  const odd = lists.find((item) => item[2].some((run) => !"=~".includes(run[2]))) || lists[0];
  const chosen = options.includes(choice) ? choice : `${odd[1]}${odd[0]}`;
  fillSelect("rows-layer", lists.map(([layer, letter]) => [`${letter}${layer}`, `${letter.toUpperCase()} of layer ${layer}`]), chosen);
  diagonal(lists, Number(chosen.slice(1)), chosen[0]);
  return chosen;
}
