// Prints the bytes of the plotting libraries that were weighed for report.html (docs/decisions/0010-html-plots.md).
import { build } from "esbuild";
import { readFileSync } from "node:fs";

const CANDIDATES = {
  "@observablehq/plot": 'export { plot, rect, lineY, line, areaY, ruleX, ruleY, dot, link, text, axisX, axisY, frame } from "@observablehq/plot";',
  "@observablehq/plot, whole": 'export * from "@observablehq/plot";',
  echarts: `export * from "echarts/core"; export { HeatmapChart, LineChart, ScatterChart } from "echarts/charts";
    export { GridComponent, TooltipComponent, VisualMapComponent, AriaComponent } from "echarts/components";
    export { SVGRenderer } from "echarts/renderers";`,
  uplot: 'export { default } from "uplot";',
  "d3-selection, -scale, -shape, -axis": 'export * from "d3-selection"; export * from "d3-scale"; export * from "d3-shape"; export * from "d3-axis";',
};
for (const [name, contents] of Object.entries(CANDIDATES)) {
  const made = await build({ stdin: { contents, resolveDir: "." }, bundle: true, minify: true, format: "iife",
    globalName: "X", legalComments: "none", write: false });
  const text = made.outputFiles[0].text, about = `node_modules/${name.split(",")[0]}/package.json`;
  const evals = /\bnew Function\(|\beval\(/.test(text) ? "evaluates code" : "no eval";
  console.log(name.padEnd(36), JSON.parse(readFileSync(about)).version.padEnd(8), String(Buffer.byteLength(text)).padStart(8), evals);
}
