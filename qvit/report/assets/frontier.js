// Moves along a frontier: puts the texts, the place and the widths of a point, from the JSON block #data, into the page.
(() => {
  "use strict";
  const { states, cells } = JSON.parse(document.getElementById("data").textContent);
  const { figures, draw } = window.report;
  const slider = document.getElementById("point");
  const index = new Map(cells.map((cell, position) => [cell, position]));

  function fillMap(widths) {
    if (!figures.map) return;
    for (const trace of figures.map[0].data.filter((one) => one.type === "heatmap")) {
      trace.z = trace.customdata.map((row, y) => row.map((cell, x) => widths[index.get(cell)] ?? trace.z[y][x]));
    }
    draw("map");
  }

  function show() {
    const state = states[Number(slider.value)];
    for (const [name, text] of Object.entries(state.texts)) {
      for (const place of document.querySelectorAll(`[data-fact="${name}"]`)) place.textContent = text;
    }
    slider.setAttribute("aria-valuetext", `${state.texts.cost}, predicted loss increase ${state.texts.loss}`);
    const selected = figures.frontier[0].data.find((trace) => trace.meta === "selected");
    selected.x = [state.x];
    selected.y = [state.y];
    draw("frontier");
    fillMap(state.widths);
  }

  slider.addEventListener("input", show);
  const step = (change) => {
    slider.value = Number(slider.value) + change;
    show();
  };
  document.getElementById("less").addEventListener("click", () => step(-1));
  document.getElementById("more").addEventListener("click", () => step(1));
  const plot = document.getElementById("plot-frontier");
  const listen = () => plot.on ? plot.on("plotly_click", (event) => {
    const point = event.points[0];
    if (point.data.meta !== "points") return;
    slider.value = point.pointNumber;
    show();
  }) : setTimeout(listen, 50);
  listen();
  show();
})();
