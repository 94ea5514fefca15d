"use strict";
// The page is complete without this: it adds sorting, highlighted lessons, and a box's record below the graph.
document.documentElement.classList.add("js");

function sortBy(table, column, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  const cell = (row) => row.children[column];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const compare = (a, b) => {
    const [x, y] = [cell(a).dataset.sort, cell(b).dataset.sort];
    if (x !== undefined && y !== undefined) return toNumber(x) - toNumber(y);
    return cell(a).textContent.localeCompare(cell(b).textContent, "en", { numeric: true });
  };
  const known = (row) => cell(row).dataset.sort !== undefined || cell(row).textContent.trim() !== "";
  const filled = rows.filter(known).sort(compare);
  if (descending) filled.reverse();
  body.append(...filled, ...rows.filter((row) => !known(row)));
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

function toNumber(text) {
  if (text === "nan") return Number.MAX_VALUE;
  return text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    header.tabIndex = 0;
    header.addEventListener("click", () => sortBy(table, column, header));
    header.addEventListener("keydown", (event) => event.key === "Enter" && sortBy(table, column, header));
  });
}

const graph = document.querySelector("svg.lineage");
const details = document.getElementById("details");

function point(box) {
  const near = new Set([box.dataset.box]);
  for (const edge of graph.querySelectorAll(".edge")) {
    const touches = edge.dataset.from === box.dataset.box || edge.dataset.to === box.dataset.box;
    edge.classList.toggle("on", touches);
    if (touches) near.add(edge.dataset.from).add(edge.dataset.to);
  }
  for (const other of graph.querySelectorAll("a")) other.classList.toggle("on", near.has(other.dataset.box));
  graph.classList.add("pointed");
}

function release() {
  graph.classList.remove("pointed");
  for (const marked of graph.querySelectorAll(".on")) marked.classList.remove("on");
}

function lessons(box) {
  const edges = [...graph.querySelectorAll(".edge")];
  const told = (side, other) => edges.filter((edge) => edge.dataset[side] === box.dataset.box)
    .map((edge) => `${edge.dataset[other]} (${edge.dataset.role})`).join(", ");
  const parents = told("to", "from");
  const children = told("from", "to");
  return (parents ? `Learned from ${parents}. ` : "Learned from real text alone. ") + (children ? `Taught ${children}.` : "Taught nobody.");
}

function show(box) {
  const source = document.querySelector("#nodes table");
  const table = document.createElement("table");
  table.className = "sortable";
  table.append(source.tHead.cloneNode(true), document.createElement("tbody"));
  for (const header of table.tHead.rows[0].cells) header.removeAttribute("aria-sort");
  for (const key of box.dataset.keys.split(" ")) {
    const row = document.getElementById(`node-${key}`).cloneNode(true);
    row.removeAttribute("id");
    table.tBodies[0].append(row);
  }
  const close = Object.assign(document.createElement("button"), { type: "button", textContent: "close" });
  close.addEventListener("click", () => details.replaceChildren());
  const title = Object.assign(document.createElement("h3"), { textContent: box.dataset.box });
  title.style.margin = "0";
  const told = Object.assign(document.createElement("p"), { textContent: lessons(box) });
  details.replaceChildren(close, title, told, table);
}

if (graph) {
  for (const box of graph.querySelectorAll("a")) {
    for (const enter of ["mouseenter", "focus"]) box.addEventListener(enter, () => point(box));
    for (const leave of ["mouseleave", "blur"]) box.addEventListener(leave, release);
    box.addEventListener("click", (event) => {
      event.preventDefault();
      show(box);
    });
  }
}

const told = document.getElementById("exploration");
if (told) explore(JSON.parse(told.textContent));

function explore(data) {
  const [picked, metric, generation, play] = ["pick-series", "pick-metric", "pick-generation", "play"]
    .map((id) => document.getElementById(id));
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  picked.append(...data.series.map((one, i) => option(i, one.title)));
  metric.append(...data.metrics.map(([name, text]) => option(name, text)));
  const chosen = () => data.series[picked.value];
  let timer = null;

  function draw() {
    const one = chosen();
    const at = one.generations[generation.value];
    document.getElementById("at").textContent = at;
    curve(data, one, metric.value, at);
    const texts = one.samples[at] || [];
    const paragraphs = texts.map((text) => Object.assign(document.createElement("p"), { textContent: text }));
    document.getElementById("written").replaceChildren(...paragraphs);
    cloud(one, at);
  }

  function choose() {
    generation.max = chosen().generations.length - 1;
    generation.value = Math.min(generation.value, generation.max);
    draw();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "play";
  }

  function forward() {
    if (Number(generation.value) >= Number(generation.max)) return stop();
    generation.value = Number(generation.value) + 1;
    return draw();
  }

  play.addEventListener("click", () => {
    if (timer) return stop();
    if (generation.value === generation.max) generation.value = 0;
    draw();
    play.textContent = "stop";
    timer = setInterval(forward, 900);
  });
  picked.addEventListener("change", choose);
  metric.addEventListener("change", draw);
  generation.addEventListener("input", draw);
  choose();
}

function cloud(one, at) {
  const lost = new Set(one.lost[at] || []);
  const most = Math.log(1 + Math.max(1, ...one.words.map(([, count]) => count)));
  const words = one.words.map(([word, count]) => {
    const span = Object.assign(document.createElement("span"), { textContent: word, title: `${count} times in the first text` });
    span.style.fontSize = `${(0.75 + 1.15 * Math.log(1 + count) / most).toFixed(2)}rem`;
    span.classList.toggle("lost", lost.has(word));
    return span;
  });
  const spaced = words.flatMap((word) => [word, " "]);
  document.getElementById("cloud").replaceChildren(...spaced);
}

function curve(data, one, metric, at) {
  const svg = document.getElementById("curve");
  const family = data.series.filter((other) => other.family === one.family && other.points[metric]);
  const lines = family.includes(one) || !one.points[metric] ? family : [...family, one];
  const all = lines.flatMap((line) => [...line.points[metric].flatMap((p) => p.slice(1)), ...(line.theory[metric] || []).map((p) => p[1])]);
  const last = Math.max(1, ...lines.flatMap((line) => line.points[metric].map((p) => p[0])));
  const parts = [];
  const [left, right, top, bottom] = [58, 548, 12, 282];
  const log = all.length && Math.min(...all) > 0 && Math.max(...all) > 8 * Math.min(...all);
  const scale = (v) => (log ? Math.log(v) : v);
  let [low, high] = all.length ? [Math.min(...all.map(scale)), Math.max(...all.map(scale))] : [0, 1];
  if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
  const x = (g) => left + (right - left) * g / last;
  const y = (v) => bottom - (bottom - top) * (scale(v) - low) / (high - low);
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parts.push(element);
  };
  const path = (points) => points.map(([g, v], i) => `${i ? "L" : "M"}${x(g).toFixed(1)},${y(v).toFixed(1)}`).join("");
  for (let i = 0; i <= 4; i += 1) {
    const value = low + (high - low) * i / 4;
    const shown = log ? Math.exp(value) : value;
    make("line", { class: "grid", x1: left, x2: right, y1: y(shown), y2: y(shown) });
    make("text", { x: left - 6, y: y(shown) + 4, "text-anchor": "end" }, Number(shown.toPrecision(3)).toLocaleString("en"));
  }
  for (let g = 0; g <= last; g += Math.ceil(last / 10)) make("text", { x: x(g), y: bottom + 18, "text-anchor": "middle" }, g);
  make("text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" }, "generation");
  make("line", { class: "now", x1: x(at), x2: x(at), y1: top, y2: bottom });
  for (const line of [...lines.filter((other) => other !== one), ...lines.filter((other) => other === one)]) {
    const points = line.points[metric];
    if (line === one && points.some((p) => p[3] > p[2])) {
      const band = path(points.map((p) => [p[0], p[3]])) + path([...points].reverse().map((p) => [p[0], p[2]])).replace("M", "L");
      make("path", { class: "band", d: band, style: `fill:var(--c${line.colour})` });
    }
    const dash = ["", "6 3", "2 3"][line.dash];
    make("path", { class: line === one ? "chosen" : "", d: path(points), style: `stroke:var(--c${line.colour})`, "stroke-dasharray": dash });
    if (line === one && line.theory[metric]) make("path", { class: "theory", d: path(line.theory[metric]) });
  }
  const here = (one.points[metric] || []).find((p) => p[0] === at);
  if (here) make("circle", { cx: x(at), cy: y(here[1]), r: 4.5, style: `fill:var(--c${one.colour})` });
  svg.replaceChildren(...parts);
  document.getElementById("told").textContent = saying(one, metric, at, here, lines.length);
}

function saying(one, metric, at, here, count) {
  if (!here) return `This measure is not there at generation ${at}.`;
  const number = (value) => Number(value.toPrecision(4)).toLocaleString("en");
  const range = here[3] > here[2] ? ` (${number(here[2])} to ${number(here[3])} over seeds)` : "";
  const expected = (one.theory[metric] || []).find((p) => p[0] === at);
  const theory = expected ? ` Theory: ${number(expected[1])}.` : "";
  const others = count > 1 ? ` Pale: the other ${count - 1} of ${one.family}.` : "";
  return `${one.title}, generation ${at}: ${number(here[1])}${range}.${theory}${others}`;
}
