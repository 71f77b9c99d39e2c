"use strict";
// Runs the script of a page in a stand-in for the browser's document, and prints as JSON what it
// has drawn: at first, after a click on "minutes" and "dollars", and under the pointer.

const fs = require("node:fs");
const vm = require("node:vm");

class Node {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, listeners: {}, style: {}, own: "" });
    this.clientWidth = 640;
  }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren() { this.children = []; this.own = ""; }
  setAttribute(key, value) {
    if (/NaN|undefined|Infinity/.test(value)) throw new Error(`${this.name}: ${key}="${value}"`);
    this.attributes[key] = value;
  }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  getBoundingClientRect() { return { left: 0, width: 640 }; }
  set textContent(text) { this.own = String(text); }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join(""); }
  all(name) { return [...(this.name === name ? [this] : []), ...this.children.flatMap((c) => c.all(name))]; }
}

const page = fs.readFileSync(process.argv[2], "utf-8");
const named = Object.fromEntries(["data", "controls", "charts"].map((id) => [id, new Node(id)]));
named.data.textContent = page.match(/<script type="application\/json" id="data">(.*?)<\/script>/s)[1];
const { data, controls, charts } = named;
const document = {
  getElementById: (id) => named[id],
  createElement: (name) => new Node(name),
  createElementNS: (_, name) => new Node(name),
};
vm.runInNewContext(page.match(/<script>(.*?)<\/script>/s)[1], { document, window: new Node("window") });

function drawn() {
  return charts.children.filter((chart) => chart.children.length).map((chart) => ({
    title: chart.all("h3")[0].textContent,
    lines: chart.all("polyline").map((line) => line.attributes.points.split(" ").length),
    labels: chart.all("button").map((button) => button.textContent),
    marks: chart.all("line").filter((line) => line.attributes.class === "mark").length,
    texts: chart.all("text").map((text) => text.textContent),
  }));
}
function click(text, within) {
  within.all("button").find((button) => button.textContent === text).listeners.click();
}
function under(share) {
  const picture = charts.all("svg")[0];
  picture.listeners.pointermove({ clientX: 52 + share * (640 - 52 - 10) });
  return charts.all("div").find((node) => node.className === "tip" && !node.hidden).children.map((row) => row.textContent);
}

function buttons(name, within) {
  return within.all("div").filter((node) => node.className === name).flatMap((node) => node.all("button"));
}

const axes = buttons("axes", controls).map((button) => button.textContent);
const runs = buttons("legend", controls).map((button) => button.textContent);
const result = { axes, runs, first: drawn() };
for (const axis of axes.slice(1)) {
  click(axis, controls);
  result[axis] = drawn();
}
result.pointed = [0, 0.25, 0.5, 0.75, 1].map(under);
if (runs.length) click(runs[0], controls);
else click(drawn()[0].labels[0], charts);
result.without = drawn();
console.log(JSON.stringify(result));
