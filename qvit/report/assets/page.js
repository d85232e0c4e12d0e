// Draws every figure of the JSON block #figures into the element #plot-NAME; draws again when a select box, the
// log-axis box, the colour scheme or print mode changes. Notes on <body> how many plots were drawn (data-plots) and how
// many failed (data-failed).
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
