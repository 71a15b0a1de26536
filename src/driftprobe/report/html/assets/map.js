// The map: layers down, taps across; what stands outside the layers is a bar above or below them.
const HATCH = "url(#hatch)";

/** The taps of the layers and the layers, in order of execution, and what stands outside the layers. */
function layout(cells) {
  const inside = cells.filter((c) => c.layer !== null);
  const layers = [...new Set(inside.map((c) => c.layer))].sort((a, b) => a - b);
  const first = cells.findIndex((c) => c.layer !== null);
  const before = cells.filter((c) => c.layer === null && (first < 0 || c.i < first));
  const after = cells.filter((c) => c.layer === null && first >= 0 && c.i > first);
  return { taps: tapOrder(inside), layers, before, after };
}

/** Canonical taps by their rank; where a module's own names stand among them, each behind the one before it. */
function tapOrder(inside) {
  const ranks = new Map(data.taps.map(([tap, , , rank]) => [tap, rank]));
  const taps = [...new Set(inside.map((c) => c.tap))];
  if (taps.every((tap) => ranks.get(tap) >= 0)) return taps.sort((a, b) => ranks.get(a) - ranks.get(b));
  const order = [];
  let layer = null, last = -1;
  for (const cell of inside) {
    if (cell.layer !== layer) { layer = cell.layer; last = -1; }
    const at = order.indexOf(cell.tap);
    if (at < 0) order.splice(last + 1, 0, cell.tap);
    last = at < 0 ? last + 1 : at;
  }
  return order;
}

/** Rows from top to bottom, in units of a layer's height `tall`; the names of the taps stand above the layers. */
function positions(cells, tall, names) {
  const { taps, layers, before, after } = layout(cells);
  const rows = [], gap = 7 / tall, bar = Math.max(1, 17 / tall);
  let y = 0;
  for (const cell of before) { rows.push({ y, h: bar, cells: [cell], bar: true, label: cell.tap }); y += bar; }
  if (layers.length) y += names / tall;
  const column = new Map(taps.map((tap, i) => [tap, i]));
  const byLayer = new Map(layers.map((layer) => [layer, new Array(taps.length).fill(null)]));
  cells.forEach((c) => { if (c.layer !== null) byLayer.get(c.layer)[column.get(c.tap)] = c; });
  const top = y;
  for (const layer of layers) { rows.push({ y, h: 1, cells: byLayer.get(layer), bar: false, layer, label: String(layer) }); y += 1; }
  if (after.length && layers.length) y += gap;
  for (const cell of after) { rows.push({ y, h: bar, cells: [cell], bar: true, label: cell.tap }); y += bar; }
  return { taps, layers, rows, height: y, top, columns: Math.max(1, taps.length) };
}

const rowHeight = (count) => (count <= 8 ? 34 : count <= 16 ? 26 : count <= 40 ? 17 : count <= 80 ? 11 : 8);

function rectangles(grid) {
  const found = [], missing = [];
  grid.rows.forEach((row, r) => row.cells.forEach((cell, c) => {
    const box = { x1: row.bar ? 0 : c, x2: row.bar ? grid.columns : c + 1, y1: row.y, y2: row.y + row.h, r, c };
    if (cell) found.push({ ...box, cell });
    else missing.push({ ...box, layer: row.label, tap: grid.taps[c] });
  }));
  return { found, missing };
}

/** Draw the map of a view; returns what the keyboard and the pointer need. */
function drawMap(cells) {
  const { taps, layers } = layout(cells);
  const width = widthOf("map"), tall = rowHeight(layers.length), longest = Math.min(22, Math.max(0, ...taps.map((tap) => tap.length)));
  const grid = positions(cells, tall, 14 + longest * 6.6), { found, missing } = rectangles(grid);
  const marginTop = 6, marginLeft = 40, narrow = (width - marginLeft) / grid.columns;
  const inset = tall > 12 ? 0.75 : 0.35;
  const every = [1, 2, 5, 10, 20, 50].find((n) => n * tall >= 13) || 100;
  const labelled = grid.rows.filter((row) => row.bar || row.layer % every === 0);
  const failing = found.filter((item) => item.cell.status === "f" && narrow > 9 && tall > 9 && item.cell.layer !== null);
  const box = { x1: "x1", x2: "x2", y1: "y1", y2: "y2", inset };
  const made = draw("map", {
    width, height: marginTop + grid.height * tall + 10, marginTop, marginLeft, marginRight: 6, marginBottom: 10,
    x: { axis: null, domain: [0, grid.columns] }, y: { axis: null, domain: [0, grid.height], reverse: false, range: [marginTop, marginTop + grid.height * tall] },
    label: `Map of ${found.length} taps; the table in the analysis has the same figures`,
    marks: [
      hatch,
      Plot.rect(missing, { ...box, fill: HATCH, stroke: "var(--line)", strokeWidth: 0.5, className: "missing", title: (d) => `layer ${d.layer} ${d.tap}: not recorded` }),
      Plot.rect(found, { ...box, rx: tall > 12 ? 2 : 0, fill: (d) => `var(--${bin(d.cell)})`, className: "cells" }),
      Plot.dot(failing, { x: (d) => (d.x1 + d.x2) / 2, y: (d) => d.y1 + 0.5, r: Math.min(2.4, tall / 7), fill: "var(--on-fail)", pointerEvents: "none" }),
      Plot.text(grid.taps.map((tap, i) => ({ tap, i })), {
        x: (d) => d.i + 0.5, y: grid.top, dy: -7, text: (d) => (d.tap.length > 22 ? `${d.tap.slice(0, 21)}…` : d.tap),
        rotate: -90, textAnchor: "start", fill: "currentColor", fontSize: Math.min(12, Math.max(9, narrow - 2)),
      }),
      Plot.text(labelled.filter((row) => !row.bar), { x: 0, dx: -7, y: (d) => d.y + d.h / 2, text: "label", textAnchor: "end", fill: "var(--soft)", fontSize: 11 }),
      Plot.text(labelled.filter((row) => row.bar), { x: grid.columns / 2, y: (d) => d.y + d.h / 2, text: "label", fill: (d) => (d.cells[0].status === "f" ? "var(--on-fail)" : "currentColor"), fontSize: 12, pointerEvents: "none" }),
    ],
  });
  made.setAttribute("role", "group");
  return wire(made, found, grid);
}

function hatch() {
  const line = svg("path", { d: "M0,6 L6,0", stroke: "var(--hatch)", "stroke-width": "1.1" });
  const pattern = svg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" }, line);
  const dots = svg("pattern", { id: "untold", width: 5, height: 5, patternUnits: "userSpaceOnUse" },
    svg("circle", { cx: 2.5, cy: 2.5, r: 1.1, fill: "var(--soft)" }));
  return svg("defs", {}, pattern, dots);
}

/** Make each cell a button with words, one of them in the tab order. */
function wire(made, found, grid) {
  const rects = [...made.querySelectorAll("g.cells rect")];
  const at = new Map();
  rects.forEach((rect, i) => {
    const { cell, r, c } = found[i];
    rect.setAttribute("role", "button");
    rect.setAttribute("tabindex", "-1");
    rect.setAttribute("aria-label", `${place(cell)}: ${statusOf(cell)}${cell.status === "e" ? "" : `, ${times(cell.excess)} the floor`}`);
    rect.append(svg("title", {}, `${place(cell)}\n${statusOf(cell)}${cell.status === "e" ? "" : `: drift ${figure(cell.drift)}, ${times(cell.excess)}`}`));
    rect.dataset.i = cell.i;
    at.set(`${r},${grid.rows[r].bar ? 0 : c}`, { rect, cell, r, c });
  });
  const ring = svg("rect", { class: "ring", fill: "none", "pointer-events": "none" });
  made.append(ring);
  const byCell = new Map([...at.values()].map((item) => [item.cell.i, item]));
  return { made, at, grid, ring, byCell };
}

/** Ring a cell and put it in the tab order. */
function ringCell(map, index) {
  const item = map.byCell.get(index);
  map.made.querySelectorAll('g.cells rect[tabindex="0"]').forEach((rect) => rect.setAttribute("tabindex", "-1"));
  if (!item) { map.ring.setAttribute("width", 0); return; }
  item.rect.setAttribute("tabindex", "0");
  const pad = 1.5;
  for (const [key, extra] of [["x", -pad], ["y", -pad], ["width", 2 * pad], ["height", 2 * pad]])
    map.ring.setAttribute(key, Number(item.rect.getAttribute(key)) + extra);
  map.ring.setAttribute("rx", 3);
}

/** The next cell in a direction; over a missing one it goes on. */
function neighbour(map, index, key, column) {
  const item = map.byCell.get(index), rows = map.grid.rows;
  if (key === "Home" || key === "End") {
    const line = [...map.at.values()].filter((other) => other.r === item.r);
    return line.reduce((a, b) => ((key === "Home") === a.c < b.c ? a : b));
  }
  const [dr, dc] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
  let r = item.r + dr, c = (rows[item.r].bar ? column : item.c) + dc;
  while (r >= 0 && r < rows.length && c >= 0 && c < map.grid.columns) {
    const next = map.at.get(`${r},${rows[r].bar ? 0 : c}`);
    if (next && next !== item) return next;
    r += dr; c += dc;
  }
  return null;
}

function drawLegend() {
  const swatches = BINS.map(([key, words]) => el("li", {}, el("span", { class: `swatch ${key}` }), words));
  const other = [["missing", "not recorded"], ["u", "not told"]].map(([key, words]) =>
    el("li", { class: "apart" }, el("span", { class: `swatch ${key}` }), words));
  byId("legend").replaceChildren(...swatches, ...other);
}
