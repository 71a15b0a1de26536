// Drift against its floor: along the depth, over the steps, up the precision ladder, and D against A.
const BLUE = "var(--b3)", FAIL = "var(--f2)", SOFT = "var(--soft)";
const colour = (cell) => (cell.status === "f" ? FAIL : cell.status === "e" ? "var(--e-line)" : BLUE);

function drawDepth(cells, tap, selected) {
  const mine = tap ? cells.filter((c) => c.tap === tap) : cells;
  const x = (c, i) => (tap ? (c.layer === null ? i : c.layer) : i);
  const points = mine.map((c, i) => ({ cell: c, x: x(c, i), drift: c.drift, floor: c.floor, limit: c.floor * data.limit, low: c.low, high: c.high }));
  const range = domain(points.flatMap((p) => [p.drift, p.floor, p.limit, p.high]));
  const here = points.find((p) => selected && p.cell.i === selected.i);
  const starts = tap ? points.filter((p) => p.cell.layer !== null) : points.filter((p, i) => p.cell.layer !== null && (i === 0 || points[i - 1].cell.layer !== p.cell.layer));
  const width = widthOf("depth"), every = Math.max(1, Math.ceil(starts.length / Math.max(4, Math.floor(width / 34))));
  const ticks = starts.filter((_, i) => i % every === 0);
  const shown = points.filter((p) => p.drift !== null);
  draw("depth", {
    width, height: 300, marginLeft: 46, marginBottom: 34, marginTop: 12,
    label: "Drift and floor of every tap in order of execution",
    x: { axis: null }, y: { type: "log", domain: range, axis: null },
    marks: [
      yPowers(range), Plot.axisX(ticks.map((p) => p.x), { tickFormat: (v) => { const at = ticks.find((p) => p.x === v); return at ? String(at.cell.layer) : ""; }, label: "layer", labelArrow: "none", tickSize: 4, color: SOFT }),
      Plot.areaY(points, { x: "x", y1: (p) => within(known(p.high) && p.high > 0 ? Math.max(p.low, 0) : range[0], range), y2: (p) => (known(p.high) ? within(p.high, range) : range[0]), fill: "var(--band)", curve: "linear" }),
      Plot.lineY(points, { x: "x", y: "limit", stroke: FAIL, strokeDasharray: "4,3", strokeWidth: 1 }),
      Plot.lineY(points, { x: "x", y: "floor", stroke: SOFT, strokeWidth: 1.5 }),
      ...(here ? [Plot.ruleX([here.x], { stroke: "currentColor", strokeOpacity: 0.35 })] : []),
      Plot.dot(shown, { x: "x", y: (p) => within(p.drift, range), r: points.length > 900 ? 1.6 : points.length > 300 ? 2 : 3, fill: (p) => colour(p.cell), title: (p) => `${place(p.cell)}: drift ${figure(p.drift)}, floor ${figure(p.floor)}` }),
    ],
  });
  const failing = shown.filter((p) => p.cell.status === "f"), sharper = failing.filter((p) => p.cell.more.t).length, over = failing.length - sharper;
  const guilty = cells[0].view.guilty;
  const left = guilty.length ? ` Left out of the band: ${guilty.join(", ")}, which rounding does not explain either.` : "";
  say("depth-say", `${over ? `${over} of ${shown.length} taps are beyond the limit` : `All ${shown.length} taps stay under the limit`}${sharper ? `, ${sharper} of them no rounding all the same` : ""}; dots at the lower edge have no drift at all.${left}`);
}

/** Ticks of a log axis and lines across, in the plot's own marks. */
function yPowers(range) {
  return [
    Plot.ruleY(powers(range), { stroke: "var(--line)", strokeWidth: 0.6 }),
    Plot.axisY(powers(range), { tickFormat: power, label: null, tickSize: 0, color: SOFT }),
  ];
}

const siblings = (view, change) => data.views.map((other, index) => ({ other, index }))
  .filter(({ other }) => ["mode", "prompt", "arm", "rung", "step", "position"].every((key) => change.includes(key) || other[key] === view[key]));

function drawSteps(view, selected) {
  const steps = siblings(view, ["step", "position"]), paths = view.position !== null;
  const what = paths ? "position" : "step";
  if (steps.length < 2) return empty("steps", `One ${what} was compared. driftprobe run --steps 8 compares eight, and shows whether drift grows.`);
  const at = (s) => (paths ? s.other.position : s.other.step);
  const worst = [], mine = [];
  for (const s of steps) {
    const cells = cellsOf(s.index);
    const gravest = cells.reduce((a, b) => ((b.excess ?? 0) > (a.excess ?? 0) ? b : a), cells[0]);
    worst.push({ x: at(s), y: gravest.excess, cell: gravest });
    const same = selected && cells.find((c) => c.tap === selected.tap && c.layer === selected.layer);
    if (same) mine.push({ x: at(s), y: same.excess, cell: same });
  }
  const range = domain([...worst, ...mine].map((p) => p.y).concat(1, data.limit));
  const dots = (points, r) => Plot.dot(points.filter((p) => p.y !== null), { x: "x", y: (p) => within(p.y, range), r, fill: (p) => colour(p.cell), title: (p) => `${what} ${p.x}: ${place(p.cell)} ${times(p.y)}` });
  const line = (points, extra) => Plot.lineY(points, { x: "x", y: (p) => within(p.y, range), stroke: SOFT, ...extra });
  draw("steps", {
    width: widthOf("steps"), height: 260, marginLeft: 46, marginBottom: 36, marginTop: 12, label: `Largest excess at each ${what}`,
    x: { label: what, labelArrow: "none", ticks: wholes(worst[0].x, worst[worst.length - 1].x, 12), tickFormat: "d", inset: 8 }, y: { type: "log", domain: range, axis: null },
    marks: [yPowers(range), Plot.ruleY([data.limit], { stroke: FAIL, strokeDasharray: "4,3" }), Plot.ruleY([1], { stroke: SOFT }), line(worst, {}), dots(worst, 4), line(mine, { strokeDasharray: "2,3" }), dots(mine, 2.5)],
  });
  return say("steps-say", `Solid: the largest excess of each ${what}. Dotted: ${selected ? place(selected) : "the chosen tap"}. Lines across: the floor (1) and the limit (${data.limit}).`);
}

const slope = (v) => (Math.round(v * 100) / 100 + 0).toFixed(2);

function drawLadder(view, selected) {
  const ladder = data.ladders.find((item) => item.mode === view.mode && item.prompt === view.prompt);
  const pair = ladder && ["", ladder.rung].map((rung) => siblings({ ...view, rung }, []).map((s) => s.index)[0]);
  byId("ladder-legend").hidden = !ladder || pair.includes(undefined);
  if (byId("ladder-legend").hidden) return empty("ladder", "The precision ladder was not climbed: everything was run in one precision (--ladder on climbs it).");
  const [run, rung] = pair.map(cellsOf), above = new Map(rung.map((c) => [place(c), c]));
  const lines = run.map((c) => ({ c, r: above.get(place(c)) })).filter(({ c, r }) => r && known(c.drift) && known(r.drift) && c.drift > 0);
  const told = lines.filter(({ r }) => r.drift > 0).map(({ c, r }) => Math.log(r.drift / c.drift) / Math.log(ladder.units[1] / ladder.units[0])).sort((a, b) => a - b);
  const range = domain(lines.flatMap(({ c, r }) => [c.drift, r.drift]).concat(ladder.units));
  const [u, v] = ladder.units;
  const failing = lines.filter(({ c, r }) => c.status === "f" || r.status === "f"), calm = lines.filter((l) => !failing.includes(l));
  const link = (set, stroke, opacity) => Plot.link(set, { x1: u, x2: v, y1: (d) => within(d.c.drift, range), y2: (d) => within(d.r.drift, range), stroke, strokeOpacity: opacity, strokeWidth: 1.4, title: (d) => `${place(d.c)}: ${figure(d.c.drift)} → ${figure(d.r.drift)}` });
  const mine = selected ? lines.filter(({ c }) => c.tap === selected.tap && c.layer === selected.layer) : [];
  draw("ladder", {
    width: widthOf("ladder"), height: 320, marginLeft: 46, marginRight: 24, marginBottom: 40, marginTop: 24, label: "Drift over unit roundoff, both on log scales",
    x: { type: "log", axis: null, domain: [v / 8, u * 8] }, y: { type: "log", domain: range, axis: null },
    marks: [
      // `text`, not `tickFormat`: a log axis has its formatter leave out what is no power of ten where it is narrow.
      yPowers(range), Plot.axisX([v, u], { text: (d) => `${d === u ? ladder.dtype : ladder.rung}${widthOf("ladder") < 460 ? "\n" : ", "}u ${figure(d)}`, tickSize: 4, label: null, color: SOFT }),
      Plot.link([0], { x1: u, x2: v, y1: within(u, range), y2: within(v, range), stroke: "currentColor", strokeDasharray: "5,4", strokeOpacity: 0.6 }),
      link(calm, BLUE, 0.4), link(failing, FAIL, 0.55), link(mine, "currentColor", 1),
    ],
  });
  const middle = told.length ? ` Of ${told.length} taps the middle slope is ${slope(told[told.length >> 1])}, from ${slope(told[0])} to ${slope(told[told.length - 1])}.` : "";
  return say("ladder-say", `Rounding shrinks with the roundoff u (slope 1), a bug keeps its size (slope 0).${middle}`);
}

function drawArms(view) {
  const pick = (arm) => siblings({ ...view, arm }, []).map((s) => s.index)[0];
  const [own, aligned] = [pick("D"), pick("A")];
  if (own === undefined || aligned === undefined) return empty("arms", "Arm A was not run for this choice: mode kv_aligned runs it.");
  const other = new Map(cellsOf(aligned).map((c) => [place(c), c]));
  const points = cellsOf(own).map((c) => ({ d: c, a: other.get(place(c)) })).filter(({ d, a }) => a && d.excess !== null && a.excess !== null)
    .sort((one, two) => (one.d.status === "f") - (two.d.status === "f"));
  const limit = data.limit, [across, upward] = ["d", "a"].map((arm) => domain(points.map((p) => p[arm].excess).concat(limit / 50, limit * 50)));
  const corner = (words, right, up) => Plot.text([0], { x: right ? across[1] : limit, y: limit, text: [words], textAnchor: "end", dx: -6, dy: up ? -9 : 10, fill: SOFT, stroke: "var(--page)", strokeWidth: 4 });
  const width = widthOf("arms");
  draw("arms", {
    width, height: 340, marginLeft: 46, marginBottom: 40, marginTop: 32, marginRight: 14, label: "Excess of arm A over excess of arm D",
    x: { type: "log", domain: across, axis: null }, y: { type: "log", domain: upward, axis: null },
    marks: [
      yPowers(upward), Plot.axisX(powers(across, width / 90), { tickFormat: power, label: "D: decode with its own cache", labelArrow: "none", labelAnchor: "center", tickSize: 0, color: SOFT }),
      Plot.ruleX([limit], { stroke: FAIL, strokeDasharray: "4,3" }), Plot.ruleY([limit], { stroke: FAIL, strokeDasharray: "4,3" }),
      corner("harness", false, true), corner("computation", true, true), corner("H₀", false, false), corner("contents", true, false),
      Plot.text([0], { frameAnchor: "top-left", lineAnchor: "bottom", dx: -40, dy: -12, text: ["A: decode with prefill's rows put in"], fill: SOFT }),
      Plot.dot(points, { x: (p) => within(p.d.excess, across), y: (p) => within(p.a.excess, upward), r: 3.2, fill: (p) => (p.a.status === "f" ? colour(p.a) : colour(p.d)), fillOpacity: 0.75, title: (p) => `${place(p.d)}: D ${times(p.d.excess)}, A ${times(p.a.excess)}` }),
    ],
  });
  const inside = points.filter(({ d, a }) => d.more.t || a.more.t).length;
  return say("arms-say", `One dot a tap. Right of the dashed line D fails, above it A fails; both axes count floors.${inside ? ` ${inside} more ${inside === 1 ? "fails" : "fail"} by a test sharper than the floor, and ${inside === 1 ? "is" : "are"} orange within the lines.` : ""}`);
}
