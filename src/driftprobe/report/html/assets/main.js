// What is chosen, and what is drawn again when that changes.
const CHOICES = [
  ["mode", "Mode", (v) => v],
  ["prompt", "Prompt", (v) => v],
  ["arm", "Decode with", (v) => (v === "A" ? "prefill's rows (A)" : "its own cache (D)")],
  ["rung", "Precision", (v) => (v === "" ? data.ladders[0]?.dtype || "as run" : v)],
  ["step", "Step", (v) => String(v)],
  ["position", "Position", (v) => String(v)],
];
/** Layers beyond which the depth is first shown for one tap alone: every tap's floor is another, and many are a thicket. */
const DEEP = 12;
const state = { view: data.start[0], cell: data.start[1], column: 0, tap: null, rows: "", head: "", map: null };

function fillSelect(id, options, value) {
  const select = byId(id);
  const same = select.options.length === options.length && options.every(([v, words], i) => select.options[i].value === v && select.options[i].textContent === words);
  if (!same) select.replaceChildren(...options.map(([v, words]) => el("option", { value: v }, words)));
  select.value = value;
}

/** The view that has a wanted value, and of the other choices as many as can be kept. */
function closest(key, value) {
  const now = data.views[state.view];
  const score = (view) => CHOICES.reduce((sum, [k], i) => sum + (view[k] === now[k] ? 2 ** (CHOICES.length - i) : 0), 0);
  const fitting = data.views.map((view, index) => ({ view, index })).filter(({ view }) => String(view[key]) === value);
  return fitting.reduce((a, b) => (score(b.view) > score(a.view) ? b : a)).index;
}

function drawChoices() {
  const now = data.views[state.view];
  for (const [key, , words] of CHOICES) {
    const values = [...new Set(data.views.map((view) => view[key]))].filter((v) => v !== null);
    const label = byId(`choose-${key}`).parentElement;
    label.hidden = values.length < 2;
    fillSelect(`choose-${key}`, values.map((v) => [String(v), words(v)]), String(now[key]));
  }
  const failing = data.columns[now.status].split("f").length - 1, all = data.columns[now.status].length;
  say("choice-say", `${failing || "none"} of ${all} taps beyond rounding here`);
}

function drawAll() {
  const view = data.views[state.view], cells = cellsOf(state.view);
  if (!cells[state.cell]) state.cell = 0;
  drawChoices();
  state.map = drawMap(cells);
  const sharper = cells.filter((cell) => cell.more.t).length;
  byId("sharper").hidden = !sharper;
  say("sharper", `${sharper === 1 ? "One cell fails" : `${sharper} cells fail`} under the limit: a test sharper than the floor told ${sharper === 1 ? "it" : "them"}. Its record says which, under “yet no rounding”.`);
  select(state.cell, false);
  drawArms(view);
  state.rows = drawRows(view, state.rows) || "";
  state.head = drawAttention(view, state.head) || "";
  drawLogits(view);
}

function select(index, focus) {
  const cells = cellsOf(state.view), cell = cells[index], view = data.views[state.view];
  state.cell = index;
  ringCell(state.map, index);
  drawRecord(cell);
  const taps = [...new Set(cells.filter((c) => c.layer !== null).map((c) => c.tap))];
  if (state.tap === null) state.tap = new Set(cells.map((c) => c.layer)).size > DEEP && cell.layer !== null ? cell.tap : "";
  if (!taps.includes(state.tap)) state.tap = "";
  fillSelect("depth-tap", [["", "every tap, in order"], ...taps.map((tap) => [tap, tap])], state.tap);
  drawDepth(cells, state.tap, cell);
  drawSteps(view, cell);
  drawLadder(view, cell);
  if (focus) state.map.byCell.get(index).rect.focus();
}

/** Keep the chosen place where the new view has it; else its gravest cell. */
function show(index) {
  const before = cellsOf(state.view)[state.cell], cells = cellsOf(index);
  const same = cells.find((c) => c.tap === before.tap && c.layer === before.layer);
  state.view = index;
  state.cell = same ? same.i : 0;
  drawAll();
}

function listen() {
  for (const [key] of CHOICES) byId(`choose-${key}`).addEventListener("change", (event) => show(closest(key, event.target.value)));
  byId("depth-tap").addEventListener("change", (event) => { state.tap = event.target.value; select(state.cell, false); });
  byId("rows-layer").addEventListener("change", (event) => { state.rows = event.target.value; drawRows(data.views[state.view], state.rows); });
  byId("attention-head").addEventListener("change", (event) => { state.head = event.target.value; drawAttention(data.views[state.view], state.head); });
  const map = byId("map");
  map.addEventListener("click", (event) => {
    const rect = event.target.closest("g.cells rect");
    if (rect) select(Number(rect.dataset.i), true);
  });
  map.addEventListener("keydown", (event) => {
    const rect = event.target.closest("g.cells rect");
    if (!rect) return;
    const index = Number(rect.dataset.i), item = state.map.byCell.get(index);
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(index, true); return; }
    if (!/^(Arrow(Up|Down|Left|Right)|Home|End)$/.test(event.key)) return;
    event.preventDefault();
    if (!state.map.grid.rows[item.r].bar) state.column = item.c;
    const next = neighbour(state.map, index, event.key, state.column);
    if (next) { item.rect.setAttribute("tabindex", "-1"); next.rect.setAttribute("tabindex", "0"); next.rect.focus(); }
  });
  let width = document.documentElement.clientWidth, timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (document.documentElement.clientWidth !== width) { width = document.documentElement.clientWidth; drawAll(); } }, 120);
  });
}

if (data.views.length) {
  drawLegend();
  drawAll();
  listen();
} else byId("pictures").hidden = true;
const [views, prints] = data.leftOut;
say("left-out", [views ? `${views} maps are left out of this page to keep it small; every pair is in the TSV.` : "", prints ? `${prints} fingerprints are left out of this page to keep it small; the trace has them.` : ""].join(" ").trim());
document.documentElement.dataset.ready = "yes";
