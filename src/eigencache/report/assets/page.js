"use strict";
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.error = event.message; });
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures"), palette = read("palette");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colour(tone, theme) {
  if (!tone.startsWith("layer:")) return palette[theme][tone];
  const place = Number(tone.slice(6)), scale = palette.layers[theme];
  const at = place * (scale.length - 1), low = Math.floor(at), part = at - low, high = Math.min(low + 1, scale.length - 1);
  return "rgb(" + scale[low].map((v, i) => Math.round(v + (scale[high][i] - v) * part)).join(",") + ")";
}

function dressed(trace, theme) {
  if (trace.type === "heatmap") return trace;
  const { tone, dash, symbol, ...rest } = trace, tint = colour(tone, theme);
  return { ...rest, line: { color: tint, width: 1.6, dash: dash || "solid" },
    marker: { color: tint, size: 6, symbol: symbol || "circle", ...(trace.marker || {}) } };
}

function layout(figure, theme) {
  const style = getComputedStyle(root), ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const axis = (title, extra) => ({ title: { text: title, font: { size: 12 }, standoff: 8 }, gridcolor: line, zerolinecolor: line,
    automargin: true, ...extra, exponentformat: "power", ...(extra && extra.range && extra.type === "log" ? { dtick: 1 } : {}) });
  return { margin: { l: 52, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 12, family: "system-ui, sans-serif" }, hovermode: "closest",
    legend: { orientation: "h", y: -0.22, font: { size: 11 } },
    xaxis: axis(figure.x, figure.axes.xaxis), yaxis: axis(figure.y, figure.axes.yaxis) };
}

function draw(place) {
  const figure = figures[place.dataset.figure], theme = root.dataset.theme;
  return Plotly.react(place, figure.traces.map((trace) => dressed(trace, theme)), layout(figure, theme),
    { responsive: true, displaylogo: false, displayModeBar: false });
}

const places = [...document.querySelectorAll(".plot")];
const drawn = new Set();
const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (entry.isIntersecting && !drawn.has(entry.target)) { drawn.add(entry.target); draw(entry.target); }
}), { rootMargin: "600px" });
places.forEach((place) => watcher.observe(place));

function setTheme(theme) {
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  drawn.forEach(draw);
}
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

const cell = (value) => value === null || value === undefined ? "" : /[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : value;
function csv(figure) {
  const rows = [["series", figure.x, figure.y]];
  for (const trace of figure.traces) {
    if (trace.z) trace.z.forEach((row, i) => row.forEach((value, j) => rows.push([trace.name, `${trace.x[j]} ${trace.y[i]}`, value])));
    else trace.x.forEach((value, i) => rows.push([trace.name, value, trace.y[i]]));
  }
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
document.querySelectorAll("button[data-csv]").forEach((button) => button.addEventListener("click", () =>
  offer(new Blob([csv(figures[button.dataset.csv])], { type: "text/csv" }), `${button.dataset.csv}.csv`)));
document.getElementById("json").addEventListener("click", async () => {
  const packed = Uint8Array.from(atob(document.getElementById("records").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  offer(await new Response(stream).blob(), "report.json");
});

if (location.hash === "#selftest") {
  Promise.all(places.map((place) => { drawn.add(place); return draw(place); })).then(() => {
    root.dataset.drawn = String(document.querySelectorAll(".main-svg").length > 0 ? places.length : 0);
    root.dataset.overflow = String(root.scrollWidth - root.clientWidth);
    root.dataset.csv = String(Object.values(figures).every((figure) => csv(figure).split("\n").length > 2));
  });
}
