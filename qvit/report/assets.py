"""Style and behaviour of the report page: one sheet of CSS and one script, both put into the page itself.

Colours are variables with a light and a dark set; print is always light. The script draws every figure of the JSON
block `#figures` into the element `#plot-NAME`, redraws when a select box, the log-axis box, the colour scheme or
print mode changes, and notes on `<body>` how many plots were drawn (`data-plots`) and how many failed
(`data-failed`).
"""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b2430; --muted: #5a6675; --line: #d8dee6; --card: #f5f7fa; --accent: #1f6dbf;
  --warn: #9a5b00; --warn-card: #fff6e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #11151b; --ink: #e5e9ef; --muted: #a0abb9; --line: #313a46; --card: #1a2029; --accent: #6db3f8;
    --warn: #f0b65a; --warn-card: #2a2214;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, nav > ol, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 1.35rem; margin: 0 0 8px; line-height: 1.3; }
h3 { font-size: 1.02rem; margin: 20px 0 4px; }
p { margin: 0 0 12px; max-width: 78ch; }
a { color: var(--accent); }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 8px; top: 8px; background: var(--paper); padding: 8px; z-index: 9; }
.verdict { border-left: 4px solid var(--accent); padding: 2px 0 2px 16px; margin: 16px 0; font-size: 1.1rem; }
.verdict p { margin: 4px 0; max-width: 90ch; }
.warning { background: var(--warn-card); color: var(--warn); border-radius: 6px; padding: 10px 16px; margin: 16px 0; }
.warning ul { margin: 4px 0; padding-left: 20px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 20px 0; font-size: 0.94rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.88em;
  overflow-wrap: anywhere;
}
nav { border-block: 1px solid var(--line); margin-top: 28px; background: var(--card); }
nav > ol { display: flex; flex-wrap: wrap; gap: 2px 22px; list-style: none; padding-block: 10px; font-size: 0.94rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding: 36px 0 8px; scroll-margin-top: 8px; }
section + section { border-top: 1px solid var(--line); }
.muted, figcaption { color: var(--muted); font-size: 0.92rem; }
figure { margin: 16px 0; }
figcaption { margin-top: 4px; max-width: 90ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 8px 28px; }
.grid > * { min-width: 0; margin: 8px 0; }
.grid h3 { margin-top: 4px; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.plot { width: 100%; }
.paper { display: none; }
table { border-collapse: collapse; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 14px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); color: var(--muted); font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { padding-left: 4px; }
tbody th { font-weight: 500; }
tr.bold td, tr.bold th { font-weight: 700; }
caption { caption-side: top; text-align: left; color: var(--muted); font-size: 0.92rem; padding-bottom: 6px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; margin: 12px 0; font-size: 0.95rem; }
.controls select {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--muted); border-radius: 6px;
  padding: 5px 8px; max-width: 100%;
}
.controls label { display: inline-flex; flex-wrap: wrap; gap: 8px; align-items: center; max-width: 100%; }
.slider { position: sticky; top: 0; background: var(--paper); padding-block: 6px; z-index: 2; }
.slider input[type=range] { flex: 1 1 320px; max-width: 640px; accent-color: var(--accent); }
.slider button {
  font: inherit; width: 2.2em; color: inherit; background: var(--card); border: 1px solid var(--muted);
  border-radius: 6px;
}
.live { font-variant-numeric: tabular-nums; }
.live dd { font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: 4px; list-style: none; margin: 8px 0; padding: 0; font-size: 0.85rem; }
.key li { padding: 2px 10px; border-radius: 4px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
.tall { max-height: 460px; overflow: auto; }
.tall .scroll { overflow: visible; }
.tall thead th { position: sticky; top: 0; background: var(--paper); box-shadow: 0 2px 0 var(--line); }
footer {
  border-top: 1px solid var(--line); margin-top: 40px; padding-block: 18px 40px; color: var(--muted);
  font-size: 0.88rem;
}
@media (max-width: 640px) {
  header, main, nav > ol, footer { padding-inline: 16px; }
  h1 { font-size: 1.5rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 8px; }
  th, td { padding: 5px 9px; }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --muted: #444444; --line: #cccccc; --card: #ffffff; --accent: #1f4f8f;
    --warn: #704000; --warn-card: #ffffff; color-scheme: light;
  }
  @page { size: A4; margin: 12mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  header, main, nav > ol, footer { max-width: none; padding: 0; }
  nav, .controls input, .skip, .modebar { display: none !important; }
  section { padding: 14px 0 0; }
  figure, tr, .warning, .verdict { break-inside: avoid; }
  h2, h3, .controls { break-after: avoid; }
  .scroll, .tall { overflow: visible; max-height: none; }
  .grid { display: block; }
  .paper { display: block; }
  .tall tbody tr:nth-child(n + 31) { display: none; }
  table { font-size: 8.5pt; }
  th, td { padding: 3px 6px; white-space: normal; }
}
"""

SCRIPT = """
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const names = Object.keys(figures);
  const chosen = Object.fromEntries(names.map((name) => [name, 0]));
  const logarithmic = new Set();
  const PRINT_WIDTH = 690;
  let printing = false;
  const buttons = (fixed) => (fixed ? ["toImage"] : ["toImage", "zoom2d", "pan2d", "resetScale2d"]);

  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const layout = structuredClone(figure.layout);
    layout.font = { ...layout.font, color: printing ? "#000000" : colour("--ink") };
    layout.hoverlabel = {
      ...layout.hoverlabel, bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") },
    };
    layout.legend = { ...layout.legend, maxheight: 0.75 };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") };
    return layout;
  }

  function draw(name) {
    const element = document.getElementById("plot-" + name);
    const figure = figures[name][chosen[name]];
    const layout = themed(figure);
    const extra = (layout.meta || {}).min_width || 0;
    element.style.minWidth = extra + "px";
    element.setAttribute("aria-label", (layout.meta || {}).alt || "");
    if (logarithmic.has(name)) {
      layout.xaxis.type = "log";
      layout.xaxis.nticks = 6;
      delete layout.xaxis.range;
    }
    if (printing) layout.width = Math.max(PRINT_WIDTH, extra);
    element.style.zoom = printing ? PRINT_WIDTH / layout.width : "";
    const config = {
      displaylogo: false, responsive: true, showTips: false, modeBarButtons: [buttons(layout.xaxis.fixedrange)],
    };
    return Plotly.react(element, structuredClone(figure.data), layout, config);
  }

  async function drawAll() {
    let drawn = 0, failed = 0;
    for (const name of names) {
      try {
        await draw(name);
        drawn += 1;
      } catch (error) {
        failed += 1;
        document.getElementById("plot-" + name).textContent = "This plot could not be drawn: " + error;
      }
    }
    document.body.dataset.failed = failed;
    document.body.dataset.plots = drawn;
  }

  for (const select of document.querySelectorAll("select[data-plots]")) {
    const update = () => {
      for (const name of select.dataset.plots.split(" ").filter(Boolean)) {
        chosen[name] = select.selectedIndex;
        draw(name);
      }
      for (const part of document.querySelectorAll(`[data-choice="${select.id}"]`)) {
        part.hidden = part.dataset.value !== String(select.selectedIndex);
      }
    };
    select.addEventListener("change", update);
    select.selectedIndex = 0;
  }
  for (const box of document.querySelectorAll("input[data-log]")) {
    box.checked = false;
    box.addEventListener("change", () => {
      for (const name of box.dataset.log.split(" ")) {
        box.checked ? logarithmic.add(name) : logarithmic.delete(name);
        draw(name);
      }
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; names.forEach(draw); });
  addEventListener("afterprint", () => { printing = false; names.forEach(draw); });
  window.report = { figures, draw };
  drawAll();
})();
"""
