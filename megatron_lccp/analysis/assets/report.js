// Draws the figures of the report with plotly.js from the JSON beside each of them, moves the sliders of heat maps, and
// makes the page fit paper. Figures are drawn when they come near the window, and the rest one by one after
// the page has loaded.
"use strict";
(() => {
  const HUGE = 1e308;
  const ARROW = { width: 24, height: 24, path: "M11 3h2v9h4l-5 6-5-6h4zM4 19h16v2H4z" };
  const FONT = { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif", size: 12 };
  const touch = matchMedia("(hover: none)").matches; // there a drag scrolls the page
  const pending = new Set();
  const sliders = [];

  const clear = "rgba(0,0,0,0)";
  const base = () => ({ font: { ...FONT }, paper_bgcolor: clear, plot_bgcolor: clear, hovermode: "closest",
    dragmode: touch ? false : "zoom", margin: { l: 56, r: 12, t: 26, b: 44 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hoverlabel: { font: { family: FONT.family } }, modebar: { bgcolor: clear, color: "#88919b", activecolor: "#1c6ea4" } });
  const axis = (given) => ({ zeroline: false, automargin: true, ticks: "outside", ticklen: 3, ...given,
    title: { ...given.title, standoff: 8 } });

  const config = (figure, lines) => ({ responsive: true, displaylogo: false,
    toImageButtonOptions: { format: "svg", filename: figure.id },
    modeBarButtons: [[ { name: "csv", title: "Download these numbers (CSV)", icon: ARROW,
      click: () => save(figure.id + ".csv", lines()) }, "toImage" ]] });

  function save(name, lines) {
    const plain = (value) => (Math.abs(value) >= HUGE ? (value > 0 ? "inf" : "-inf") : value);
    const quoted = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value ?? "");
    const text = lines.map((line) => line.map(plain).map(quoted).join(",")).join("\n") + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  const unescaped = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&"); // of _safe in interactive.py
  const lineNumbers = (panel) => [["series", "x", "y"]].concat(panel.traces.filter((trace) => !trace.fill).flatMap(
    (trace) => trace.x.map((x, k) => [unescaped(trace.name), x, trace.y[k]])));
  const mapNumbers = (data) => [["checkpoint", data.xLabel, data.yLabel, data.valueLabel]].concat(data.maps.flatMap(
    (map) => map.values.flatMap((row, i) => row.map((v, k) => [map.label, data.x[k], data.y[i], v]))));

  function short(value) { // as number_text in style.py
    if (value === null) return "–";
    if (Math.abs(value) >= HUGE) return "∞";
    let power = 0;
    while (Math.abs(value) >= 999.5 && power < 4) { value /= 1000; power += 1; }
    const size = Math.abs(value);
    if (power) return (size < 9.95 ? value.toFixed(1) : value.toFixed(0)) + "kMBT"[power - 1];
    if (size < 0.005) return "0.00"; // not -0.00
    return size < 9.995 ? value.toFixed(2) : size < 99.95 ? value.toFixed(1) : value.toFixed(0);
  }

  function curves(figure, data) {
    data.panels.forEach((panel, k) => {
      const place = figure.querySelectorAll(".plot")[k];
      const layout = { ...base(), ...panel.layout, height: 310, xaxis: axis(panel.layout.xaxis),
        yaxis: axis(panel.layout.yaxis), hovermode: panel.traces.length > 1 ? "x unified" : "closest" };
      const room = place.clientWidth, letters = panel.traces.reduce((sum, trace) => sum + 7 + (trace.name || "").length, 0);
      const rows = panel.layout.showlegend ? Math.ceil((7 * letters) / Math.max(room, 200)) : 0;
      const names = rows && panel.layout.annotations ? 16 : 0; // of stages, between the axes and the legend
      layout.margin.t += 19 * Math.max(0, rows - 1) + names;
      layout.height += 19 * Math.max(0, rows - 1) + names;
      layout.legend.y += names / 240;
      Plotly.newPlot(place, panel.traces, layout, config(figure, () => lineNumbers(panel)));
    });
  }

  function heat(data, map) {
    const z = data.log ? map.values.map((row) => row.map((v) => (v === null ? null : Math.log10(v)))) : map.values;
    return { z: z, customdata: map.values, text: map.values.map((row) => row.map(short)) };
  }

  const marks = (data, map) => ({ x: map.marked.map((at) => data.x[at[1]]), y: map.marked.map((at) => data.y[at[0]]) });
  const hasMarks = (data) => data.threshold !== null || data.maps.some((map) => map.marked.length > 0);

  function caption(data, map) {
    return data.threshold === null ? map.label : `${map.label}: ${map.marked.length} above ${data.threshold}`;
  }

  function drawMap(figure, place, data, map) {
    const [low, high] = data.log ? data.range.map(Math.log10) : data.range;
    const cells = data.x.length * data.y.length;
    const scale = data.colors.map((color, k) => [k / (data.colors.length - 1), color]);
    const bar = { thickness: 10, outlinewidth: 0, len: 1, title: { text: data.valueLabel, side: "right" } };
    if (data.log) Object.assign(bar, { tickvals: data.ticks.map(Math.log10), ticktext: data.ticks.map(String) });
    const texts = cells <= 400 && !hasMarks(data) && data.x.length <= 16;
    const trace = { type: "heatmap", x: data.x, y: data.y, ...heat(data, map), zmin: low, zmax: high, colorscale: scale,
      colorbar: bar, xgap: cells < 600 ? 1 : 0, ygap: cells < 600 ? 1 : 0, hoverongaps: false,
      texttemplate: texts ? "%{text}" : "", textfont: { size: data.x.length > 10 ? 9 : 11 },
      hovertemplate: `${data.xLabel}: %{x}<br>${data.yLabel}: %{y}<br><b>${data.valueLabel}: ` +
        "%{customdata:.4~g}</b><extra></extra>" };
    const dots = { type: "scatter", mode: "markers", ...marks(data, map), hoverinfo: "skip", showlegend: false,
      marker: { color: "#fff", size: cells > 300 ? 3 : 6, line: { color: "#333", width: data.signed ? 1 : 0 } } };
    const layout = { ...base(), height: Math.max(250, Math.min(460, 110 + 20 * data.y.length)),
      xaxis: axis({ title: { text: data.xLabel }, type: "category", nticks: 16, showgrid: false }),
      yaxis: axis({ title: { text: data.yLabel }, type: "category", autorange: "reversed", nticks: 12, showgrid: false }) };
    const traces = hasMarks(data) ? [trace, dots] : [trace];
    Plotly.newPlot(place, traces, layout, config(figure, () => mapNumbers(data)));
  }

  function showMap(place, data, map) {
    const { z, customdata, text } = heat(data, map);
    Plotly.restyle(place, { z: [z], customdata: [customdata], text: [text] }, [0]);
    if (hasMarks(data)) {
      const dots = marks(data, map);
      Plotly.restyle(place, { x: [dots.x], y: [dots.y] }, [1]);
    }
  }

  function maps(figure, data) {
    const places = [...figure.querySelectorAll(".plot")], names = figure.querySelectorAll(".map-name");
    const last = data.stops.length - 1, fixed = data.fixed.length;
    data.fixed.concat(data.stops[last].show).forEach((index, k) => {
      names[k].textContent = caption(data, data.maps[index]);
      drawMap(figure, places[k], data, data.maps[index]);
    });
    const input = figure.querySelector("input[type=range]");
    if (!input) return;
    const move = () => {
      data.stops[input.valueAsNumber].show.forEach((index, k) => {
        names[fixed + k].textContent = caption(data, data.maps[index]);
        showMap(places[fixed + k], data, data.maps[index]);
      });
      const said = data.stops[input.valueAsNumber].show.map((index) => data.maps[index].label).join(", ");
      input.setAttribute("aria-valuetext", said);
      figure.querySelector("output").textContent = `${input.valueAsNumber + 1} of ${last + 1}`;
    };
    input.addEventListener("input", () => {
      move();
      const tokens = data.stops[input.valueAsNumber].tokens;
      sliders.forEach((other) => { if (other.input !== input) other.to(tokens); });
    });
    const to = (tokens) => { // the last stop until then
      const until = data.stops.filter((stop) => stop.tokens <= tokens).length;
      const value = Math.max(0, until - 1);
      if (value !== input.valueAsNumber) { input.value = value; move(); }
    };
    sliders.push({ input: input, to: to });
    if (sliders.length > 1) { // drawn later than the others were moved
      const first = sliders[0];
      if (first.input.value !== first.input.max) to(Number(first.input.dataset.tokens));
    }
    input.addEventListener("input", () => {
      sliders.forEach((other) => { other.input.dataset.tokens = data.stops[input.valueAsNumber].tokens; });
    });
    const play = figure.querySelector("button.play");
    let timer = null;
    play.addEventListener("click", () => {
      if (timer !== null) { clearInterval(timer); timer = null; play.textContent = "Play"; return; }
      play.textContent = "Stop";
      const pause = Math.max(80, Math.min(700, 12000 / (last + 1)));
      timer = setInterval(() => {
        input.value = input.valueAsNumber >= last ? 0 : input.valueAsNumber + 1;
        input.dispatchEvent(new Event("input"));
        if (input.valueAsNumber === last) play.click();
      }, pause);
    });
  }

  function draw(figure) {
    if (!pending.delete(figure)) return;
    const data = JSON.parse(figure.querySelector("script").textContent);
    (data.kind === "maps" ? maps : curves)(figure, data);
    figure.dataset.drawn = "";
  }
  const drawAll = () => [...pending].forEach(draw);

  document.querySelectorAll("figure.chart").forEach((figure) => pending.add(figure));
  const near = new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => { near.unobserve(entry.target); draw(entry.target); });
  }, { rootMargin: "300px" });
  pending.forEach((figure) => { // what the window shows first is drawn at once
    if (figure.getBoundingClientRect().top < innerHeight) draw(figure); else near.observe(figure);
  });
  const rest = () => { const next = pending.values().next().value; if (next) { draw(next); setTimeout(rest, 20); } };
  addEventListener("load", () => setTimeout(rest, 20));

  const plots = () => [...document.querySelectorAll(".js-plotly-plot")];
  addEventListener("beforeprint", () => {
    drawAll();
    plots().forEach((plot) => {
      const only = plot.closest(".plots").children.length === 1;
      Plotly.relayout(plot, { width: only ? 680 : 335, autosize: false });
    });
  });
  addEventListener("afterprint", () => plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));

  const again = document.body.dataset.redraw; // `lccp watch`
  if (again) setTimeout(() => location.reload(), 1000 * Number(again));
})();
