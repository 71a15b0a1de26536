// Bundles the parts of Observable Plot that report.html draws with, and says of what the bundle is made.
import { build } from "esbuild";
import { readFileSync, writeFileSync } from "node:fs";

const OUT = "../../src/driftprobe/report/html/assets";
const PARTS = ["plot", "rect", "lineY", "line", "areaY", "ruleX", "ruleY", "dot", "link", "text", "axisX", "axisY", "frame"];

const made = await build({
  stdin: { contents: `export { ${PARTS.join(", ")} } from "@observablehq/plot";`, resolveDir: "." },
  bundle: true, minify: true, format: "iife", globalName: "Plot", charset: "ascii", legalComments: "none",
  target: "es2020", metafile: true, write: false,
});
const names = new Set(
  Object.keys(made.metafile.inputs)
    .map((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1])
    .filter(Boolean),
);
const notices = [...names].sort().map((name) => {
  const about = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  const license = readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim();
  return `${name} ${about.version} (${about.license})\n\n${license}\n`;
});
const rule = "\n" + "-".repeat(72) + "\n\n";
writeFileSync(`${OUT}/plot.LICENSES.txt`, notices.join(rule));
const text = notices.join("\n");
const holders = [...new Set(text.match(/^Copyright .*/gm))];
const bodies = new Set(notices.map((notice) => notice.split("\n").slice(1).filter((line) => !/^Copyright /.test(line))
  .join(" ").replace(/\s+/g, " ").trim()));
const terms = [...bodies].filter((body) => body.length > 200 && body.length < 2000);
const banner = `/*! Observable Plot, and of D3 and others what it stands on: ${[...names].sort().join(", ")}\n` +
  `${holders.join("\n")}\n${[...new Set(terms)].join("\n")}\nEach licence in full: plot.LICENSES.txt of driftprobe. */\n`;
writeFileSync(`${OUT}/plot.min.js`, banner + made.outputFiles[0].text);
