// The record of one cell: both fingerprints, drift, floor and what made it, ulp, the worst element's place.
const AXES = { T: "token", C: "channel", H: "head", G: "KV head", D: "dim", S: "row", V: "token id", X: "expert", W: "slot", N: "state" };
const FIELDS = ["hash", "dtype", "shape", "l2", "abs sum", "min", "max", "mean", "non-zero", "NaN", "inf", "source", "token id", "position", "RoPE position"];

function printOf(index) {
  if (index < 0) return null;
  const raw = data.prints[index];
  const word = (v) => (v === null ? null : data.words[v]);
  const [hash, dtype, shape, ...rest] = raw;
  const numbers = rest.slice(0, 5).map(number).map((v) => (v === null ? null : figure(v, 6)));
  const counts = rest.slice(5, 8).map((v) => (v === null ? null : String(v)));
  const source = rest[8] === "r" ? "recomputed" : "captured";
  const where = rest.slice(9).map((v) => (v === null ? null : String(v)));
  return [typeof hash === "string" ? `0x${hash}` : hash[0], word(dtype), word(shape), ...numbers, ...counts, source, ...where];
}

function worstWords(cell) {
  const at = cell.more.w;
  if (!at || !at.length) return null;
  return at.map((n, i) => `${AXES[cell.axes[i]] || `axis ${i}`} ${n}`).join(", ");
}

function pairs(cell) {
  const rows = [["Drift", cell.status === "e" ? "0 (equal bit for bit)" : figure(cell.drift)]];
  rows.push(["Floor", `${figure(cell.floor)}, set by ${cell.source}`], ["Excess", cell.status === "u" ? "not told" : times(cell.excess)]);
  rows.push(["Limit", `×${data.limit}: ${figure(cell.floor * data.limit)}`], ["Evidence", EVIDENCE[cell.rung] || cell.rung]);
  if (cell.more.a !== undefined) rows.push(["Largest |Δ|", `${figure(number(cell.more.a))}${cell.more.u === null ? "" : `, ${figure(number(cell.more.u))} ulp`}`]);
  const worst = worstWords(cell);
  if (worst) rows.push(["Worst element", worst]);
  if (known(cell.high)) rows.push(["Controls", `drift ${figure(cell.low)} to ${figure(cell.high)}`]);
  if (cell.more.t) rows.push(["Yet no rounding", cell.more.t]);
  return rows;
}

function drawRecord(cell) {
  const title = el("h3", {}, place(cell)), tag = el("span", { class: `tag ${cell.status}` }, statusOf(cell));
  const op = el("p", { class: "op" }, cell.op || "a module of the model");
  const list = el("dl", {}, ...pairs(cell).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
  byId("record").replaceChildren(el("div", { class: "record-head" }, title, tag), op, list, printsTable(cell));
}

function printsTable(cell) {
  const [p, d] = [printOf(cell.p), printOf(cell.d)];
  if (!p || !d) return el("p", { class: "none" }, "The fingerprints of this cell are not in this page, to keep it small; the trace has them.");
  const right = cell.view.arm === "A" ? "aligned" : RIGHT;
  const head = el("tr", {}, el("td"), el("th", { scope: "col" }, LEFT), el("th", { scope: "col" }, right));
  const rows = FIELDS.map((field, i) => [field, p[i], d[i]]).filter((row) => row[1] !== null || row[2] !== null)
    .map(([field, a, b]) => el("tr", a === b ? {} : { class: "differs" }, el("th", { scope: "row" }, field), el("td", {}, a ?? "–"), el("td", {}, b ?? "–")));
  return el("table", { class: "prints" }, el("thead", {}, head), el("tbody", {}, ...rows));
}
