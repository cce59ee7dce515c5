"use strict";
// Elements, numbers and charts. Whatever comes from a table is set as text, never as HTML.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Three digits; "–" for what is not a number.
function shown(value) {
  if (value == null) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1).replace("e+", "e").replace(".0e", "e").replaceAll("-", "−");
  return (size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)))).replace("-", "−");
}

// At most four characters, for a cell.
function brief(value) {
  if (value == null || !Number.isFinite(value)) return shown(value);
  const size = Math.abs(value);
  if (size >= 9999.5) return value.toExponential(0).replace("e+", "e");
  if (size > 0 && size < 0.005) return "≈0";
  return value.toFixed(size < 0.995 ? 2 : size < 9.95 ? 1 : 0).replace(/^-?0(\.0+)?$/, "0").replace("-", "−");
}

function median(values) {
  const sorted = values.filter((value) => value != null).sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (!sorted.length) return null;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// From a domain to a range; what lies outside goes to its end.
function scale([low, high], log, start, end) {
  const at = log ? (x) => Math.log(Math.max(x, low)) : (x) => x;
  const span = at(high) - at(low) || 1;
  return (x) => start + (end - start) * Math.min(1, Math.max(0, (at(x) - at(low)) / span));
}

function ticks([low, high], log, most = 6) {
  if (!log || high < 12 * low) {
    const size = 10 ** Math.floor(Math.log10((high - low) / most));
    const step = [1, 2, 5, 10].map((k) => k * size).find((s) => (high - low) / s <= most);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(6)));
  }
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  for (const [every, steps] of [[1, [1, 2, 5]], [1, [1, 3]], [1, [1]], [2, [1]], [4, [1]], [20, [1]], [100, [1]]]) {
    const found = [];
    for (let power = from; power <= to; power += every) found.push(...steps.map((step) => Number(`${step}e${power}`)));
    const inside = found.filter((x) => x >= low * 0.999 && x <= high * 1.001);
    if (inside.length <= most) return inside;
  }
  return [];
}

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

// Of a number between 0 and 1: the colour, and the colour of text on it.
function colour(part) {
  const place = part * (VIRIDIS.length - 1);
  const from = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mix = [0, 1, 2].map((i) => {
    const [a, b] = [channel(VIRIDIS[from], i), channel(VIRIDIS[from + 1], i)];
    return Math.round(a + (b - a) * (place - from));
  });
  return { back: `rgb(${mix.join(" ")})`, ink: part < 0.55 ? "#fff" : "#000" };
}

const text = (x, y, words, attributes = {}) => svg("text", { x, y, ...attributes }, words);

// c against the length: curves {name, kind, points: [{x, y, few}], line: [{x, y}]}, kind a class of the style sheet.
function curveChart(curves, bound, domain, label) {
  const [width, height, left, bottom, top, right] = [430, 270, 46, 40, 12, 12];
  const x = scale(domain.x, true, left, width - right);
  const y = scale(domain.y, true, height - bottom, top);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "chart" });
  for (const tick of ticks(domain.y, true)) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }));
    chart.append(text(left - 6, y(tick) + 4, shown(tick), { "text-anchor": "end" }));
  }
  for (const tick of ticks(domain.x, true)) {
    chart.append(svg("line", { x1: x(tick), x2: x(tick), y1: top, y2: height - bottom, class: "grid" }));
    chart.append(text(x(tick), height - bottom + 16, tick.toLocaleString("en"), { "text-anchor": "middle" }));
  }
  chart.append(text((left + width) / 2, height - 4, "length n in tokens", { "text-anchor": "middle" }));
  if (bound >= domain.y[0] && bound <= domain.y[1]) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(bound), y2: y(bound), class: "bound" }));
    chart.append(text(width - right, y(bound) - 5, `c = ${shown(bound)}`, { "text-anchor": "end", class: "bound-name" }));
  }
  for (const { name, kind, points, line } of curves) {
    const path = points.map((p, i) => `${i ? "L" : "M"}${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}`).join("");
    chart.append(svg("path", { d: path, class: `curve ${kind}` }));
    if (line) {
      const [a, b] = line;
      chart.append(svg("line", { x1: x(a.x), y1: y(a.y), x2: x(b.x), y2: y(b.y), class: `octave ${kind}` }));
    }
    for (const p of points) {
      const dot = svg("circle", { cx: x(p.x), cy: y(p.y), r: 3.4, class: `dot ${kind}${p.few ? " few" : ""}` });
      dot.append(svg("title", {}, `${name}: c = ${shown(p.y)} at n = ${p.x}${p.few ? ", fewer than five texts" : ""}`));
      chart.append(dot);
    }
  }
  return chart;
}

// Where one head lies among all heads of its model: a tick for each, a triangle for the median, a dot for the head.
function stripChart(values, own, domain, log, label) {
  const [width, height, side, line] = [430, 58, 14, 24];
  const x = scale(domain, log, side, width - side);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "chart" });
  chart.append(svg("line", { x1: side, x2: width - side, y1: line, y2: line, class: "grid" }));
  for (const value of values.filter((v) => v != null)) {
    chart.append(svg("line", { x1: x(value), x2: x(value), y1: line - 8, y2: line + 8, class: "tick" }));
  }
  for (const tick of ticks(domain, log)) chart.append(text(x(tick), height - 8, shown(tick), { "text-anchor": "middle" }));
  const middle = median(values);
  if (middle != null) {
    const at = x(middle);
    chart.append(svg("path", { d: `M${at - 6} ${line - 20}h12l-6 11z`, class: "median-mark" }, svg("title", {}, `median ${shown(middle)}`)));
  }
  if (own != null) chart.append(svg("circle", { cx: x(own), cy: line, r: 6, class: "dot own" }, svg("title", {}, shown(own))));
  return chart;
}
