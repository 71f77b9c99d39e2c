"use strict";
// Draws the curves of the page out of its JSON. Text goes in as text, never as markup.

const { runs } = JSON.parse(document.getElementById("data").textContent);
const AXES = { epoch: "epochs", minutes: "minutes", dollars: "dollars" };
const CHARTS = [
  { title: "Accuracy", unit: "%", lines: [["val", "top1"], ["train", "top1"], ["val", "top5"]] },
  { title: "Loss", unit: "", lines: [["val", "loss"], ["train", "loss"]] },
  { title: "Learning rate", unit: "", lines: [["train", "lr"]] },
  { title: "Training speed", unit: " images/s", lines: [["val", "speed"]] },
];
const NAMES = { top1: "top-1", top5: "top-5", loss: "loss", lr: "lr", speed: "images/s" };
const COLOURS = 8;
const HEIGHT = 260;
const EDGE = { left: 52, right: 10, top: 18, bottom: 42 };
const NEAR = 8; // pixels from an interruption at which it is told
const DOT = 2.5;

let axis = "epoch";
const hidden = new Set(); // ids of lines; of several runs, each has one for all of its lines

function svg(parent, name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function html(parent, name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function colourOf(number) {
  return `var(--c${number % COLOURS})`;
}

/** The lines of a chart over an axis: of one run a colour each; of several, a colour a run and no top-5. */
function linesOf(chart, over) {
  const lines = [];
  runs.forEach((run, number) => {
    chart.lines.forEach(([source, key], place) => {
      if (runs.length > 1 && key === "top5") return;
      const columns = run[source];
      if (!columns[over]) return;
      const points = columns[over]
        .map((x, i) => [x, columns[key][i]])
        .filter(([x, y]) => x !== null && y !== null);
      const what = `${source === "val" && key !== "speed" ? "val" : "train"} ${NAMES[key]}`;
      const colour = colourOf(runs.length > 1 ? number : place);
      const label = runs.length > 1 ? `${run.name}: ${what}` : what;
      const id = runs.length > 1 ? String(number) : `${source}/${key}`;
      if (points.length) lines.push({ label, points, colour, source, key, id });
    });
  });
  return lines;
}

/** Round numbers from low to high. */
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  return found;
}

function written(value) {
  return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 });
}

function range(lines) {
  const values = lines.flatMap((line) => line.points.map((point) => point[1]));
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const trained = lines.find((line) => line.key === "loss" && line.source === "train");
  if (trained) high = Math.min(high, Math.max(2 * trained.points[0][1], low)); // it may diverge
  const room = 0.05 * (high - low) || Math.abs(high) || 1;
  low -= room;
  high += room;
  const key = lines[0].key;
  if (key.startsWith("top")) return [Math.max(0, low), Math.min(101, high)];
  return key === "loss" ? [low, high] : [0, high];
}

function draw(place, chart) {
  place.replaceChildren();
  const all = linesOf(chart, axis);
  if (!all.length) return;
  const lines = all.filter((line) => !hidden.has(line.id));
  const width = Math.max(240, place.clientWidth || 640);
  const picture = svg(place, "svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img",
    "aria-label": `${chart.title} over ${AXES[axis]}`,
  });
  const ends = runs.flatMap((run) => [run.train[axis], run.val[axis]]).filter(Boolean);
  const end = ends.flat().reduce((a, b) => Math.max(a, b), 0) || 1;
  const [low, high] = range(lines.length ? lines : all);
  const inner = width - EDGE.left - EDGE.right;
  const x = (value) => EDGE.left + (value / end) * inner;
  const y = (value) =>
    HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);

  frame(picture, { x, y, low, high, end, width });
  const clip = `clip-${chart.title.replace(/\W/g, "")}`;
  svg(svg(picture, "clipPath", { id: clip }), "rect", {
    x: EDGE.left - DOT, y: EDGE.top, width: inner + 2 * DOT, height: HEIGHT - EDGE.top - EDGE.bottom,
  });
  const curves = svg(picture, "g", { "clip-path": `url(#${clip})` });
  for (const line of lines) {
    const path = line.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    const stroke = line.source === "train" && line.key !== "lr" ? "thin" : "thick";
    svg(curves, "polyline", { points: path, class: stroke, stroke: line.colour });
    if (line.source === "val" && line.points.length <= 40) {
      for (const [a, b] of line.points) svg(curves, "circle", { cx: x(a), cy: y(b), r: DOT, fill: line.colour });
    }
  }
  hover(place, picture, { chart, lines, x, inner, end, width });
}

function frame(picture, { x, y, low, high, end, width }) {
  const bottom = HEIGHT - EDGE.bottom;
  if (runs.length === 1) shadePhases(picture, x, bottom);
  for (const value of ticks(low, high, 6)) {
    svg(picture, "line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) });
    svg(picture, "text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, written(value));
  }
  for (const value of ticks(0, end, width / 60)) {
    svg(picture, "text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, written(value));
  }
  svg(picture, "text", { x: x(end / 2), y: bottom + 34, "text-anchor": "middle" }, AXES[axis]);
  for (const mark of runs.flatMap((run) => run.marks)) {
    if (mark[axis] === undefined) continue;
    svg(picture, "line", { class: "mark", x1: x(mark[axis]), x2: x(mark[axis]), y1: EDGE.top, y2: bottom });
  }
}

function shadePhases(picture, x, bottom) {
  runs[0].phases.forEach((phase, i) => {
    if (!phase[axis]) return;
    const [from, to] = phase[axis].map(x);
    if (i % 2) {
      svg(picture, "rect", { class: "phase", x: from, y: EDGE.top, width: to - from, height: bottom - EDGE.top });
    }
    const room = Math.floor((to - from) / 7);
    if (room >= Math.min(phase.name.length, 5)) {
      const text = phase.name.length <= room ? phase.name : `${phase.name.slice(0, room - 1)}…`;
      svg(picture, "text", { x: (from + to) / 2, y: EDGE.top - 6, "text-anchor": "middle" }, text);
    }
  });
}

/** A button for each of some lines, which hides and shows it. */
function legend(place, lines) {
  const row = html(place, "div", "legend");
  for (const { id, label, colour } of lines) {
    const button = html(row, "button", "");
    button.setAttribute("type", "button");
    button.setAttribute("aria-pressed", "true");
    html(button, "span", "key").style.background = colour;
    html(button, "span", "", label);
    button.addEventListener("click", () => {
      if (!hidden.delete(id)) hidden.add(id);
      button.setAttribute("aria-pressed", String(!hidden.has(id)));
      drawAll();
    });
  }
}

function nearest(points, value) {
  return points.reduce((a, b) => (Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a));
}

function hover(place, picture, { chart, lines, x, inner, end, width }) {
  const cursor = svg(picture, "line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
  const tip = html(place, "div", "tip");
  tip.hidden = true;
  const show = (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const value = Math.min(end, Math.max(0, ((at - EDGE.left) / inner) * end));
    cursor.setAttribute("x1", String(x(value)));
    cursor.setAttribute("x2", String(x(value)));
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    html(tip, "div", "", told(value));
    for (const line of lines) {
      const row = html(tip, "div", "");
      html(row, "span", "key").style.background = line.colour;
      html(row, "span", "", `${line.label} ${written(nearest(line.points, value)[1])}${chart.unit}`);
    }
    for (const mark of runs.flatMap((run) => run.marks)) {
      if (mark[axis] !== undefined && Math.abs(x(mark[axis]) - x(value)) < NEAR) html(tip, "div", "", mark.text);
    }
    tip.style[at > width / 2 ? "left" : "right"] = "4rem";
    tip.style[at > width / 2 ? "right" : "left"] = "auto";
    tip.hidden = false;
  };
  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", hide);
}

/** Where the pointer is: on the axis, and in which phase. */
function told(value) {
  const where = axis === "dollars" ? `$${written(value)}` : `${written(value)} ${AXES[axis]}`;
  if (runs.length > 1) return where;
  const phase = runs[0].phases.find((each) => each[axis] && value <= each[axis][1]);
  return phase ? `${where}, ${phase.name}` : where;
}

/** Adds a chart with its title and, where one run has several lines, its legend. */
function addChart(chart) {
  const lines = linesOf(chart, "epoch");
  if (!lines.length) return [];
  const place = html(document.getElementById("charts"), "div", "chart");
  html(place, "h3", "", chart.unit ? `${chart.title} (${chart.unit.trim()})` : chart.title);
  const plot = html(place, "div", "");
  if (runs.length === 1 && chart.lines.length > 1) legend(place, lines);
  return [{ plot, chart }];
}

const drawings = CHARTS.flatMap(addChart);

function drawAll() {
  for (const { plot, chart } of drawings) draw(plot, chart);
}

function addAxes(row) {
  html(row, "span", "", "over");
  const buttons = Object.keys(AXES)
    .filter((name) => runs.some((run) => run.val[name]))
    .map((name) => {
      const button = html(row, "button", "", AXES[name]);
      button.setAttribute("type", "button");
      button.setAttribute("aria-pressed", String(name === axis));
      button.addEventListener("click", () => {
        axis = name;
        for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
        drawAll();
      });
      return button;
    });
}

function addControls() {
  const controls = document.getElementById("controls");
  if (!drawings.length) {
    controls.textContent = "Nothing is recorded yet.";
    return;
  }
  addAxes(html(controls, "div", "axes"));
  if (runs.length > 1) {
    legend(controls, runs.map(({ name }, number) => ({ id: String(number), label: name, colour: colourOf(number) })));
  }
  const said = runs.length > 1 ? ["thick: validation, thin: training"] : [];
  if (runs.some((run) => run.marks.length)) said.push("dashed: started again");
  if (said.length) html(controls, "small", "", said.join("; "));
}

addControls();
drawAll();
window.addEventListener("resize", drawAll);
