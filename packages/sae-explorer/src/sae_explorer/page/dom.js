"use strict";
// Elements and how things are written. Text from data becomes text nodes and nothing else.

const $ = id => document.getElementById(id);

// An element with properties, listeners (onclick, …) and children; null, undefined and false are left out.
const el = (tag, props = {}, ...children) => {
  const svg = ["svg", "rect", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
};

const many = count => count.toLocaleString("en");
const number = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  const far = Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3);
  return far ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
};
const share = value => {
  if (value === null) return "–";
  if (value === 0) return "0";
  return value < 1e-4 ? `${(100 * value).toExponential(0)}%` : `${Number((100 * value).toPrecision(2))}%`;
};

// What cannot be seen, or would turn the text around it, is shown by its number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/gu;
const visible = text => {
  const parts = [];
  let last = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0).toString(16);
    parts.push(text.slice(last, match.index), el("span", {class: "unseen"}, `⟨${code}⟩`));
    last = match.index + match[0].length;
  }
  parts.push(text.slice(last));
  return parts;
};
const shownToken = text => visible(text.replaceAll("\n", "⏎").replaceAll("\t", "⇥"));
const tokenInTable = text => el("code", {}, text === text.trim() && text ? shownToken(text) : ["“", ...shownToken(text), "”"]);

const card = (title, ...content) => el("section", {class: "card"}, el("h3", {}, title), ...content);
const soft = (...content) => el("p", {class: "soft"}, ...content);

// A cell is its content, or what `of` makes of a class and its content. `ofRow` gives a row its properties.
const of = (kind, content) => ({kind, content});
const table = (heads, rows, {kind = "", ofRow = () => ({})} = {}) => {
  const line = (tag, cells) => cells.map(cell => (cell?.kind ? el(tag, {class: cell.kind}, cell.content) : el(tag, {}, cell)));
  return el(
    "table",
    {class: kind},
    heads.length ? el("thead", {}, el("tr", {}, line("th", heads))) : null,
    el(
      "tbody",
      {},
      rows.map((cells, n) => el("tr", ofRow(n), line("td", cells))),
    ),
  );
};

// Bars of counts on a logarithmic scale between two ends.
function bars(counts, low, high, label, title) {
  const width = 340;
  const height = 110;
  const base = 90;
  const most = Math.max(...counts.map(count => Math.log1p(count)), 1e-9);
  const step = width / Math.max(counts.length, 1);
  const drawn = counts.map((count, n) => {
    const tall = (base * Math.log1p(count)) / most;
    const place = {x: n * step + 0.5, y: base - tall, width: Math.max(step - 1, 0.5), height: tall};
    return el("rect", place, el("title", {}, title(n, count)));
  });
  return el(
    "svg",
    {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label},
    drawn,
    el("text", {x: 0, y: height - 5}, low),
    el("text", {x: width, y: height - 5, "text-anchor": "end"}, high),
  );
}

function complain(error) {
  $("notice").textContent = error.message;
  $("notice").hidden = false;
}
