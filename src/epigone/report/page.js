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
