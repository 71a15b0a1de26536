// A closer look: the two attention rows of a failing layer, and the heads of the two logits rows.
function drawAttention(view, head) {
  const found = view.attention;
  byId("attention-part").hidden = !found;
  if (!found) return empty("attention-none", "Whole attention rows are kept for a failing layer (--payload failing, the default); for this choice there are none.");
  byId("attention-none").replaceChildren();
  const heads = found.heads.map(String), chosen = heads.includes(head) ? head : String(found.worst);
  fillSelect("attention-head", heads.map((h) => [h, `head ${h}${h === String(found.worst) ? " (differs most)" : ""}`]), chosen);
  const at = found.heads.indexOf(Number(chosen));
  const rows = (side, list) => list[at].map((v, i) => ({ side, x: found.first + i, y: number(v) })).filter((d) => known(d.y));
  const left = rows(LEFT, found.p), right = rows(RIGHT, found.d), many = left.length > 90;
  draw("attention", {
    width: widthOf("attention"), height: 260, marginLeft: 50, marginBottom: 36, marginTop: 14, label: `Attention of head ${chosen} in both phases`,
    x: { label: "key position", labelArrow: "none", tickFormat: "d", inset: 6, ticks: wholes(found.first, found.first + found.p[at].length - 1, 10) }, y: { label: null, grid: true, nice: true },
    marks: [
      Plot.ruleY([0], { stroke: "var(--line)" }),
      Plot.areaY(left, { x: "x", y: "y", fill: "var(--band)", curve: many ? "linear" : "step" }),
      Plot.lineY(left, { x: "x", y: "y", stroke: BLUE, strokeWidth: 1.6, curve: many ? "linear" : "step" }),
      Plot.lineY(right, { x: "x", y: "y", stroke: FAIL, strokeWidth: 1.6, curve: many ? "linear" : "step" }),
      ...(many ? [] : [Plot.dot(right, { x: "x", y: "y", r: 2.4, fill: FAIL, title: (d) => `key ${d.x}: ${RIGHT} ${figure(d.y)}` })]),
    ],
  });
  const cut = found.of > left.length ? ` The last ${left.length} of ${found.of} keys.` : "";
  const which = found.tensor === "attn_probs" ? "probabilities after the softmax" : "scores before the softmax";
  say("attention-say", `Layer ${found.layer}, ${which}, ${heads.length} of ${found.all} heads.${cut}`);
  return chosen;
}

function drawLogits(view) {
  const found = view.logits;
  byId("logits-part").hidden = !found;
  if (!found) return empty("logits-none", "No logits were recorded for this choice.");
  byId("logits-none").replaceChildren();
  const rows = found.ids.map((id, i) => ({ id, i, p: number(found.p[i]), d: number(found.d[i]) }));
  rows.sort((a, b) => (b.p ?? -Infinity) - (a.p ?? -Infinity));
  rows.forEach((row, i) => { row.i = i; });
  const both = rows.filter((row) => known(row.p) && known(row.d)), best = (key) => rows.filter((r) => known(r[key])).sort((a, b) => b[key] - a[key]);
  const chance = (v, lse) => (known(lse) && known(v) ? `, ${figure(Math.exp(v - lse) * 100)} %` : "");
  const dot = (key, r, extra, lse) => Plot.dot(rows.filter((row) => known(row[key])), { x: key, y: "i", r, ...extra, title: (row) => `token ${row.id}, ${key === "p" ? LEFT : RIGHT}: ${figure(row[key], 5)}${chance(row[key], lse)}` });
  draw("logits", {
    width: widthOf("logits"), height: 40 + rows.length * 22, marginLeft: 74, marginBottom: 34, marginTop: 8, label: "The largest logits of both phases, by token id",
    x: { label: "logit", labelArrow: "none", grid: true, inset: 10 }, y: { axis: null, domain: [-0.6, rows.length - 0.4], reverse: true },
    marks: [
      Plot.link(both, { x1: "p", x2: "d", y1: "i", y2: "i", stroke: SOFT, strokeWidth: 1.4 }),
      dot("p", 5, { stroke: BLUE, strokeWidth: 2, fill: "var(--page)" }, found.lse[0]), dot("d", 3, { fill: FAIL }, found.lse[1]),
      Plot.text(rows, { frameAnchor: "left", dx: -66, y: "i", text: (row) => `token ${row.id}`, textAnchor: "start", fill: "currentColor" }),
    ],
  });
  const [first, second] = best("p"), top = best("d")[0];
  const margin = first && second ? first.p - second.p : null;
  const largest = both.length ? Math.max(...both.map((row) => Math.abs(row.p - row.d))) : null;
  drawMargin([["margin of the first two", margin, BLUE], ["largest |Δlogit| shown", largest, FAIL], ["what rounding can do", number(found.rounding), SOFT]]);
  say("logits-say", `Ring: ${LEFT}. Dot: ${RIGHT}. ${first && top && first.id === top.id ? `Both choose token ${first.id}` : `${LEFT} chooses token ${first?.id}, ${RIGHT} token ${top?.id}`}. A perturbation smaller than the margin cannot change the choice.`);
  return undefined;
}

function drawMargin(bars) {
  const shown = bars.map(([words, v, fill], i) => ({ words, v, fill, i })).filter((b) => known(b.v));
  if (!shown.length) return empty("margin", "The margin is not told.");
  const range = domain(shown.map((b) => b.v));
  draw("margin", {
    width: widthOf("margin"), height: 44 + shown.length * 34, marginLeft: 12, marginRight: 40, marginBottom: 30, marginTop: 6, label: "Margin against perturbation",
    x: { type: "log", domain: range, axis: null }, y: { axis: null, domain: [-0.7, shown.length - 0.4], reverse: true },
    marks: [
      Plot.axisX(powers(range, 5), { tickFormat: power, label: null, tickSize: 4, color: SOFT }),
      Plot.link(shown, { x1: range[0], x2: (b) => within(b.v || range[0], range), y1: "i", y2: "i", stroke: "fill", strokeWidth: 7, strokeLinecap: "butt" }),
      Plot.text(shown, { x: range[0], y: "i", dy: -12, text: (b) => `${b.words}: ${figure(b.v)}`, textAnchor: "start", fill: "currentColor" }),
    ],
  });
  return undefined;
}
