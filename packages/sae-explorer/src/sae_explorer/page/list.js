// The list of latents: only the rows that are in sight are elements, and pages of a hundred are asked for as they come into it.

const HEIGHT = 36;
const PAGE = 100;
let api;
let name;
let pages = new Map();
let total = 0;
let asked = 0;
let shownLatent = null;
let descending = true;

function query() {
  const value = (id, otherwise) => ($(id).value === "" ? otherwise : Number($(id).value));
  return {
    text: $("search").value,
    sort: $("sort").value,
    descending,
    min_density: value("min_density", 0),
    max_density: value("max_density", 1),
    min_largest: value("min_largest", 0),
    labelled: $("labelled").checked,
  };
}

async function refresh() {
  const mine = ++asked;
  try {
    const found = await api.search(name, {...query(), offset: 0, limit: PAGE});
    if (mine !== asked) return;
    pages = new Map([[0, found.rows]]);
    total = found.total;
    $("notice").hidden = true;
    $("total").textContent = `${many(total)} ${total === 1 ? "latent" : "latents"}`;
    $("space").style.height = `${total * HEIGHT}px`;
    $("rows").scrollTop = 0;
    draw();
  } catch (error) {
    if (mine === asked) complain(error);
  }
}

async function fetchPage(page) {
  const mine = asked;
  pages.set(page, null);
  try {
    const found = await api.search(name, {...query(), offset: page * PAGE, limit: PAGE});
    if (mine !== asked) return;
    pages.set(page, found.rows);
    draw();
  } catch (error) {
    if (mine !== asked) return;
    pages.delete(page);
    complain(error);
  }
}

function rowLine(row, at) {
  const props = {
    class: "line", role: "option", href: `#/latent/${row.latent}`, tabindex: -1,
    "data-latent": row.latent,
  }; // prettier-ignore
  const label = row.label ? [el("b", {}, ...visible(row.label)), "  "] : [];
  const line = el(
    "a",
    props,
    el("span", {}, String(row.latent)),
    el("span", {title: row.label || row.tokens}, ...label, ...visible(row.tokens)),
    el("span", {}, share(row.density)),
    el("span", {}, number(row.largest)),
  );
  line.style.top = `${at * HEIGHT}px`;
  return line;
}

// Rows that stay in sight stay the same elements, so that none is exchanged under a click.
let drawn = new Map();
function draw() {
  const box = $("rows");
  const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 5);
  const end = Math.min(total, first + Math.ceil((box.clientHeight || 600) / HEIGHT) + 10);
  const lines = new Map();
  for (let at = first; at < end; at++) {
    const page = Math.floor(at / PAGE);
    if (!pages.has(page)) fetchPage(page);
    const row = pages.get(page)?.[at % PAGE];
    if (!row) continue;
    const key = JSON.stringify([at, row]);
    const line = drawn.get(key) ?? rowLine(row, at);
    line.setAttribute("aria-selected", String(row.latent === shownLatent));
    lines.set(key, line);
  }
  for (const [key, line] of drawn) if (!lines.has(key)) line.remove();
  let next = $("space").firstChild;
  for (const line of lines.values()) {
    if (line === next) next = next.nextSibling;
    else $("space").insertBefore(line, next);
  }
  drawn = lines;
}

function placeOf(latent) {
  for (const [page, rows] of pages) {
    const at = rows?.findIndex(row => row.latent === latent) ?? -1;
    if (at >= 0) return page * PAGE + at;
  }
  return -1;
}

function step(by) {
  const at = Math.min(Math.max(placeOf(shownLatent) + by, 0), total - 1);
  const row = pages.get(Math.floor(at / PAGE))?.[at % PAGE];
  if (!row) return;
  location.hash = `#/latent/${row.latent}`;
  const box = $("rows");
  const top = at * HEIGHT;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + HEIGHT - box.clientHeight;
}
