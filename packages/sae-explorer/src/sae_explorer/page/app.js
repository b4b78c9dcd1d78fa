"use strict";
// One page for two places: a dashboard on a disk, whose data come by script tags, and the local server's page. Text from data
// becomes text nodes and nothing else.

const $ = id => document.getElementById(id);
const el = (tag, props = {}, ...children) => {
  const svg = ["svg", "rect", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
};
const number = (value, digits = 3) => value === null || value === undefined ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
const share = value => value === null ? "–" : value === 0 ? "0" : value < 1e-4 ? `${(100 * value).toExponential(0)}%` : `${Number((100 * value).toPrecision(2))}%`;

// What cannot be seen, or would turn the text around it, is shown by its number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/gu;
const visible = text => {
  const parts = []; let last = 0;
  for (const match of text.matchAll(HIDDEN)) {
    parts.push(text.slice(last, match.index), el("span", {class: "unseen"}, `⟨${match[0].codePointAt(0).toString(16)}⟩`));
    last = match.index + match[0].length;
  }
  parts.push(text.slice(last));
  return parts;
};
const shownToken = text => visible(text.replaceAll("\n", "⏎").replaceAll("\t", "⇥"));
const inTable = text => el("code", {}, text === text.trim() && text ? shownToken(text) : ["“", ...shownToken(text), "”"]);

// ---- where data come from -----------------------------------------------------------------------------------------------

const waiting = new Map(), received = new Map();
function receive(name, data) {
  received.set(name, data);
  waiting.get(name)?.resolve(data);
  if (name === "index") addEventListener("DOMContentLoaded", () => start(fromDisk(data)));
}

function fromDisk({facts, columns, block}) {
  const count = columns.latent.length;
  const words = columns.tokens.map((text, n) => `${text} ${columns.promotes[n]} ${columns.label[n]} ${columns.note[n]}`.toLowerCase());
  const row = n => Object.fromEntries(Object.keys(columns).map(key => [key, columns[key][n]]));
  let last = "", order = [];
  const wanted = query => {
    const asked = query.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let n = 0; n < count; n++) {
      if (columns.density[n] < query.min_density || columns.density[n] > query.max_density || columns.largest[n] < query.min_largest) continue;
      if (query.labelled && !columns.label[n] && !columns.note[n]) continue;
      if (asked.length && !asked.every(word => words[n].includes(word)) && `#${columns.latent[n]}` !== `#${query.text.trim().replace("#", "")}`) continue;
      found.push(n);
    }
    const key = columns[query.sort] || columns.largest, sign = query.descending ? -1 : 1;
    return found.sort((a, b) => sign * (key[a] - key[b]) || a - b);
  };
  const load = number => new Promise((resolve, reject) => {
    if (received.has(number)) return resolve(received.get(number));
    waiting.set(number, {resolve});
    document.head.append(el("script", {src: `data/${number}.js`, onerror: () => reject(new Error(`data/${number}.js is missing`))}));
  });
  return {
    live: false, dictionaries: [facts], inside: new Set(columns.latent),
    async search(name, query) {
      const {offset, limit, ...rest} = query, key = JSON.stringify(rest);
      if (key !== last) [order, last] = [wanted(query), key];
      return {total: order.length, rows: order.slice(offset, offset + limit).map(row)};
    },
    async latent(name, latent) {
      const found = (await load(Math.floor(latent / block)))[latent];
      if (!found) throw new Error(`latent ${latent} is not in this dashboard`);
      const n = columns.latent.indexOf(latent);
      return {...found, label: columns.label[n], note: columns.note[n]};
    },
  };
}

function fromServer(dictionaries) {
  const ask = async (path, options = {}) => {
    const answer = await fetch(path, options);
    if (!answer.ok) {
      let said; try { said = (await answer.json()).error; } catch { said = `the server answered ${answer.status}`; }
      throw new Error(said);
    }
    return answer;
  };
  const post = (path, body, options = {}) => ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), ...options});
  return {
    live: true, dictionaries,
    search: async (name, query) => (await ask(`api/latents?${new URLSearchParams({dictionary: name, ...query})}`)).json(),
    latent: async (name, latent) => (await ask(`api/latent?${new URLSearchParams({dictionary: name, latent})}`)).json(),
    text: async (name, text) => (await post("api/text", {dictionary: name, text})).json(),
    label: async (name, latent, label, note) => { await post("api/label", {dictionary: name, latent, label, note}); },
    compare: async (a, b) => (await ask(`api/compare?${new URLSearchParams({a, b})}`)).json(),
    stop: job => post("api/stop", {job}),
    async generate(body, signal, take) {
      const reader = (await post("api/generate", body, {signal})).body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const {done, value} = await reader.read();
        if (done) return;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines.filter(Boolean)) take(JSON.parse(line));
      }
    },
  };
}

// ---- the list -----------------------------------------------------------------------------------------------------------

const HEIGHT = 36, PAGE = 100;
let api, name, pages = new Map(), total = 0, asked = 0, shownLatent = null, descending = true;

const query = () => {
  const of = (id, otherwise) => $(id).value === "" ? otherwise : Number($(id).value);
  return {text: $("search").value, sort: $("sort").value, descending, min_density: of("min_density", 0), max_density: of("max_density", 1), min_largest: of("min_largest", 0), labelled: $("labelled").checked};
};

async function refresh() {
  const mine = ++asked;
  try {
    const found = await api.search(name, {...query(), offset: 0, limit: PAGE});
    if (mine !== asked) return;
    pages = new Map([[0, found.rows]]);
    total = found.total;
    $("notice").hidden = true;
    $("total").textContent = `${total.toLocaleString("en")} latents`;
    $("space").style.height = `${total * HEIGHT}px`;
    $("rows").scrollTop = 0;
    draw();
  } catch (error) { if (mine === asked) complain(error); }
}

async function fetchPage(page) {
  const mine = asked;
  pages.set(page, null);
  try {
    const found = await api.search(name, {...query(), offset: page * PAGE, limit: PAGE});
    if (mine === asked) { pages.set(page, found.rows); draw(); }
  } catch (error) { if (mine === asked) { pages.delete(page); complain(error); } }
}

function draw() {
  const box = $("rows"), first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 5);
  const end = Math.min(total, first + Math.ceil((box.clientHeight || 600) / HEIGHT) + 10);
  const lines = [];
  for (let at = first; at < end; at++) {
    const page = Math.floor(at / PAGE);
    if (!pages.has(page)) fetchPage(page);
    const row = pages.get(page)?.[at % PAGE];
    if (!row) continue;
    const line = el("a", {class: "line", role: "option", href: `#/latent/${row.latent}`, tabindex: -1, "aria-selected": String(row.latent === shownLatent), "data-latent": row.latent},
      el("span", {}, String(row.latent)),
      el("span", {title: row.label || row.tokens}, row.label ? el("b", {}, ...visible(row.label)) : null, row.label ? "  " : null, ...visible(row.tokens)),
      el("span", {}, share(row.density)), el("span", {}, number(row.largest)));
    line.style.top = `${at * HEIGHT}px`;
    lines.push(line);
  }
  $("space").replaceChildren(...lines);
}

const placeOf = latent => { for (const [page, rows] of pages) { const at = rows?.findIndex(row => row.latent === latent) ?? -1; if (at >= 0) return page * PAGE + at; } return -1; };
function step(by) {
  const at = Math.min(Math.max(placeOf(shownLatent) + by, 0), total - 1), row = pages.get(Math.floor(at / PAGE))?.[at % PAGE];
  if (!row) return;
  location.hash = `#/latent/${row.latent}`;
  const box = $("rows"), top = at * HEIGHT;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + HEIGHT - box.clientHeight;
}

function complain(error) { $("notice").textContent = error.message; $("notice").hidden = false; }

// ---- one latent ---------------------------------------------------------------------------------------------------------

const link = latent => api.inside && !api.inside.has(latent) ? String(latent) : el("a", {href: `#/latent/${latent}`}, String(latent));
const card = (title, ...content) => el("section", {class: "card"}, el("h3", {}, title), ...content);
const table = (heads, rows, kind = "") => el("table", {class: kind}, el("thead", {}, el("tr", {}, heads.map(head => el("th", {}, head)))), el("tbody", {}, rows.map(row => el("tr", {}, row.map(cell => el("td", {}, cell))))));

function bars(counts, low, high, label, title) {
  const width = 340, height = 110, base = 90, most = Math.max(...counts.map(count => Math.log1p(count)), 1e-9), step = width / Math.max(counts.length, 1);
  return el("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label},
    counts.map((count, n) => { const tall = base * Math.log1p(count) / most; return el("rect", {x: n * step + .5, y: base - tall, width: Math.max(step - 1, .5), height: tall}, el("title", {}, title(n, count))); }),
    el("text", {x: 0, y: height - 5}, low), el("text", {x: width, y: height - 5, "text-anchor": "end"}, high));
}

function snippet(example, scale) {
  return el("div", {class: "example"}, el("span", {}, number(example.value)),
    el("div", {class: "text", dir: "auto"}, example.tokens.map((text, n) => {
      const token = el("span", {class: n === example.peak ? "token peak" : "token", title: example.values[n] ? number(example.values[n]) : null}, ...shownToken(text));
      if (example.values[n]) token.style.setProperty("--a", Math.min(1, Math.abs(example.values[n]) / (scale || 1)).toFixed(3));
      return token;
    })));
}

async function showLatent(latent) {
  shownLatent = latent;
  for (const line of $("space").children) line.setAttribute("aria-selected", String(Number(line.dataset.latent) === latent));
  let found;
  try { found = await api.latent(name, latent); } catch (error) { $("detail").replaceChildren(back(), el("p", {class: "error"}, error.message)); return; }
  if (shownLatent !== latent) return;
  const facts = api.dictionaries.find(each => each.name === name), bands = new Map();
  for (const example of found.examples) { if (!bands.has(example.band)) bands.set(example.band, []); bands.get(example.band).push(example); }
  const title = band => band === 0 ? "Strongest activations" : `Drawn at random: band ${band} of ${facts.bands}`;
  const examplesOf = band => card(title(band), ...bands.get(band).map(example => snippet(example, found.largest)));
  const edges = found.histogram.edges;
  $("detail").replaceChildren(
    el("div", {class: "head"}, back(), el("h2", {}, `Latent ${latent}`), found.label && !api.live ? el("b", {}, ...visible(found.label)) : null,
      el("span", {class: "go"}, found.neuronpedia ? el("a", {href: found.neuronpedia, target: "_blank", rel: "noopener noreferrer"}, "Neuronpedia ↗") : null,
        el("button", {type: "button", title: "Previous in the list ( k )", "aria-label": "Previous", onclick: () => step(-1)}, "↑"),
        el("button", {type: "button", title: "Next in the list ( j )", "aria-label": "Next", onclick: () => step(1)}, "↓"))),
    el("p", {class: "numbers"}, found.count ? `fires on ${share(found.density)} of tokens (${found.count.toLocaleString("en")} of ${facts.positions.toLocaleString("en")}) · max ${number(found.largest)} · mean ${number(found.mean)}` : `never fired on ${facts.positions.toLocaleString("en")} tokens`),
    found.note && !api.live ? el("p", {class: "text"}, ...visible(found.note)) : "",
    api.live ? labelForm(latent, found) : "", api.live ? steerForm(latent, found) : "",
    bands.has(0) ? examplesOf(0) : "",
    el("div", {class: "cards"},
      found.promoted.length ? card("Promotes", table(["token", "logit"], found.promoted.map(([text, value]) => [inTable(text), number(value)]), "up")) : null,
      found.suppressed.length ? card("Suppresses", table(["token", "logit"], found.suppressed.map(([text, value]) => [inTable(text), number(value)]), "low")) : null,
      found.count ? card("Activations", bars(found.histogram.counts, number(edges[0]), number(edges.at(-1)), "Histogram of activations", (n, count) => `${number(edges[n])} to ${number(edges[n + 1])}: ${count}`), el("p", {class: "soft"}, "both axes logarithmic")) : null,
      found.logits ? card("Effect on all tokens' logits", bars(found.logits.counts, number(found.logits.low), number(found.logits.high), "Histogram of logits", (n, count) => `${number(found.logits.low + (found.logits.high - found.logits.low) * (n + .5) / found.logits.counts.length)}: ${count} tokens`), el("p", {class: "soft"}, "number of tokens on a logarithmic scale")) : null,
      Object.keys(found.sites).length ? card("Written at", table(["site", "norm"], Object.entries(found.sites).map(([site, norm]) => [site, number(norm)]))) : null),
    ...[...bands.keys()].filter(band => band > 0).map(examplesOf),
    el("div", {class: "cards"},
      found.partners.length ? card("Fires together with", table(["latent", "times", "Jaccard"], found.partners.map(([other, count, jaccard]) => [link(other), String(count), number(jaccard)]))) : null,
      card("Writes alike", table(["latent", "cosine"], found.nearest.map(([other, cosine]) => [link(other), number(cosine)])))),
  );
  $("detail").scrollTop = 0;
}

const back = () => el("a", {class: "back", href: "#/"}, "‹ list");

// ---- with the model behind it -------------------------------------------------------------------------------------------

function labelForm(latent, found) {
  const of = name, label = el("input", {value: found.label, maxlength: 200, "aria-label": "Label", placeholder: "Your label", id: "label", dir: "auto"}), note = el("textarea", {value: found.note, rows: 1, maxlength: 10000, "aria-label": "Note", placeholder: "Your note", id: "note", dir: "auto"}), said = el("span", {class: "soft", "aria-live": "polite"});
  const save = async () => {
    try { await api.label(of, latent, label.value, note.value); said.textContent = "saved"; for (const rows of pages.values()) { const row = rows?.find(each => each.latent === latent); if (row && of === name) row.label = label.value; } draw(); }
    catch (error) { said.textContent = error.message; }
  };
  for (const field of [label, note]) { field.addEventListener("change", save); field.addEventListener("input", () => { said.textContent = ""; }); }
  return el("form", {class: "card form", onsubmit: event => { event.preventDefault(); label.blur(); }}, label, note, el("div", {class: "row"}, el("span", {class: "soft"}, "kept when you leave a field"), said, el("a", {href: `api/labels.json?${new URLSearchParams({dictionary: of})}`, download: "labels.json"}, "export all as JSON")));
}

let running = null, prompt = "I think that";
function steerForm(latent, found) {
  const of = name, scale = found.largest || 1;
  const text = el("textarea", {rows: 2, id: "prompt", "aria-label": "Prompt", maxlength: 2000, value: prompt, dir: "auto"});
  const how = el("select", {id: "how", "aria-label": "What to do"}, [["add", "add"], ["set", "set to"], ["remove", "remove"]].map(([value, label]) => el("option", {value}, label)));
  const range = el("input", {type: "range", min: -4, max: 4, step: .1, value: 1, "aria-label": "Strength"}), amount = el("input", {type: "number", step: "any", id: "amount", "aria-label": "Amount", value: String(Number(scale.toPrecision(3))), style: null});
  const length = el("input", {type: "number", min: 1, max: 200, value: 40, id: "length", "aria-label": "Tokens"}), temperature = el("input", {type: "number", min: 0, max: 5, step: .1, value: 0, "aria-label": "Temperature"});
  for (const field of [amount, length, temperature]) field.style.width = "5.5rem";
  range.addEventListener("input", () => { amount.value = String(Number((scale * range.value).toPrecision(3))); });
  how.addEventListener("change", () => { range.disabled = amount.disabled = how.value === "remove"; });
  const plain = el("div", {class: "text", id: "plain", dir: "auto"}), edited = el("div", {class: "text", id: "edited", dir: "auto"}), said = el("p", {class: "soft", id: "said", "aria-live": "polite"});
  const go = el("button", {class: "main", id: "generate", type: "submit"}, "Generate"), stop = el("button", {type: "button", id: "stop", disabled: true, onclick: () => running?.stop()}, "Stop");
  const show = (box, text) => box.replaceChildren(el("i", {}, ...visible(prompt)), ...visible(text));
  const submit = async event => {
    event.preventDefault();
    running?.stop();
    const control = new AbortController(), job = crypto.randomUUID();
    const mine = running = {stop() { control.abort(); api.stop(job).catch(() => {}); }};
    prompt = text.value; go.disabled = true; stop.disabled = false; said.className = "soft"; said.textContent = "generating …"; show(plain, ""); show(edited, "");
    try {
      await api.generate({dictionary: of, job, text: text.value, latent, how: how.value, amount: Number(amount.value), tokens: Number(length.value), temperature: Number(temperature.value)}, control.signal, part => {
        if (part.error) throw new Error(part.error);
        show(plain, part.plain); show(edited, part.edited);
      });
      said.textContent = "done";
    } catch (error) { said.textContent = error.name === "AbortError" ? "stopped" : error.message; if (error.name !== "AbortError") said.className = "error"; }
    go.disabled = false; stop.disabled = true; if (running === mine) running = null;
  };
  return el("form", {class: "card form", id: "steer", onsubmit: submit}, el("h3", {}, "What does it do?"), text,
    el("div", {class: "row"}, how, amount, range, el("label", {}, "tokens ", length), el("label", {}, "temperature ", temperature), go, stop),
    el("p", {class: "soft"}, found.largest ? `its largest activation on the studied text is ${number(found.largest)}; the slider goes in multiples of that` : "it never fired, so there is no usual size"),
    el("div", {class: "sides"}, el("div", {class: "out"}, el("h4", {}, "untouched"), plain), el("div", {class: "out"}, el("h4", {}, "with the change"), edited)), said);
}

let typed = "", analysis = null;
function showText() {
  shownLatent = null;
  const text = el("textarea", {rows: 3, id: "text", "aria-label": "Text", placeholder: "Type a text", maxlength: 4000, value: typed, dir: "auto"}), go = el("button", {class: "main", id: "run", type: "submit"}, "Show latents");
  const sort = el("select", {id: "by", "aria-label": "Sorted by"}, el("option", {value: "value"}, "activation"), el("option", {value: "effect"}, "effect on the text's probability"));
  const tokens = el("div", {class: "tokens text", dir: "auto", id: "tokens"}), list = el("div", {}), said = el("p", {class: "soft", id: "text-said", "aria-live": "polite"});
  let chosen = null;
  const heat = latent => {
    const values = analysis.tokens.map((_, n) => { const fired = analysis.fired[n]; return latent === null ? fired.reduce((most, each) => Math.max(most, Math.abs(each[1])), 0) : Math.abs(fired.find(each => each[0] === latent)?.[1] ?? 0); });
    const most = Math.max(...values, 1e-9);
    [...tokens.children].forEach((token, n) => token.style.setProperty("--a", (values[n] / most).toFixed(3)));
  };
  const drawList = () => {
    const rows = new Map(), key = sort.value === "effect" ? 2 : 1;
    analysis.fired.forEach((fired, n) => { if (chosen === null ? analysis.counts[n] : n === chosen) for (const [latent, value, effect] of fired) {
      const row = rows.get(latent) || [latent, 0, 0, 0];
      if (Math.abs(value) > Math.abs(row[1])) row[1] = value;
      row[2] += effect ?? 0; row[3]++; rows.set(latent, row);
    } });
    const sorted = [...rows.values()].sort((a, b) => Math.abs(b[key]) - Math.abs(a[key])).slice(0, 100);
    list.replaceChildren(el("h3", {}, chosen === null ? `Latents on the text (${rows.size})` : `Latents on token ${chosen + 1} (${rows.size})`),
      el("table", {class: "words"}, el("thead", {}, el("tr", {}, el("th", {}, "latent"), el("th", {class: "wide"}, "fires on"), el("th", {}, "max"), el("th", {}, "effect"), el("th", {class: "extra"}, "tokens"))),
        el("tbody", {}, sorted.map(([latent, value, effect, times]) => el("tr", {onmouseenter: () => heat(latent), onmouseleave: () => heat(null), onfocusin: () => heat(latent), onfocusout: () => heat(null)},
          el("td", {}, link(latent)), el("td", {class: "wide"}, ...visible(analysis.words[latent] || "")), el("td", {}, number(value)), el("td", {}, analysis.effects ? number(effect) : "–"), el("td", {class: "extra"}, String(times)))))));
  };
  const drawAll = () => {
    tokens.replaceChildren(...analysis.tokens.map((token, n) => el("button", {type: "button", class: "token", "aria-pressed": "false", onclick: event => {
      chosen = chosen === n ? null : n;
      for (const other of tokens.children) other.setAttribute("aria-pressed", "false");
      event.currentTarget.setAttribute("aria-pressed", String(chosen === n));
      drawList();
    }}, ...shownToken(token))));
    said.textContent = `${analysis.tokens.length} tokens in ${number(analysis.seconds, 2)} s; click a token to see its own latents, point at a latent to see where it fires` + (analysis.effects ? "" : "; this model predicts no text, so there are no effects");
    heat(null); drawList();
  };
  const submit = async event => {
    event.preventDefault();
    typed = text.value; go.disabled = true; said.className = "soft"; said.textContent = "running …";
    try { analysis = await api.text(name, typed); chosen = null; drawAll(); } catch (error) { said.className = "error"; said.textContent = error.message; }
    go.disabled = false;
  };
  sort.addEventListener("change", () => analysis && drawList());
  $("detail").replaceChildren(el("form", {class: "card form", onsubmit: submit}, el("h3", {}, "Which latents fire on a text?"), text, el("div", {class: "row"}, go, el("label", {}, "sorted by ", sort)), said), el("div", {class: "card"}, tokens, list));
  if (analysis && analysis.dictionary === name) drawAll();
}

function showCompare() {
  shownLatent = null;
  const choice = (id, chosen) => el("select", {id, "aria-label": id}, api.dictionaries.map(each => el("option", {value: each.name, selected: each.name === chosen}, each.name)));
  const a = choice("a", name), b = choice("b", api.dictionaries.find(each => each.name !== name).name), result = el("div", {});
  const submit = async event => {
    event.preventDefault();
    result.replaceChildren(el("p", {class: "soft"}, "comparing …"));
    try {
      const found = await api.compare(a.value, b.value), to = (which, latent) => el("a", {href: "#/latent/" + latent, onclick: () => choose(which)}, String(latent));
      const pairs = found.pairs.map(([one, other, cosine, text, second]) => el("tr", {}, el("td", {}, to(a.value, one)), el("td", {class: "wide"}, ...visible(text)), el("td", {}, to(b.value, other)), el("td", {class: "wide"}, ...visible(second)), el("td", {}, number(cosine))));
      const lonely = (title, which, rows) => card(title, el("table", {class: "words"}, el("tbody", {}, rows.map(([latent, cosine, text]) => el("tr", {}, el("td", {}, to(which, latent)), el("td", {class: "wide"}, ...visible(text)), el("td", {}, number(cosine)))))));
      result.replaceChildren(el("p", {class: "numbers"}, `${found.matched.toLocaleString("en")} latents are each other's nearest with a cosine of ${found.shared} or more · mean cosine of the nearest ${number(found.mean)}`),
        card("The same in both", !pairs.length ? el("p", {class: "soft"}, "none") : el("table", {class: "words"}, el("thead", {}, el("tr", {}, el("th", {}, "first"), el("th", {class: "wide"}, "fires on"), el("th", {}, "second"), el("th", {class: "wide"}, "fires on"), el("th", {}, "cosine"))), el("tbody", {}, pairs))),
        el("div", {class: "cards"}, lonely(`Only in the first (${found.only_a_count.toLocaleString("en")})`, a.value, found.only_a), lonely(`Only in the second (${found.only_b_count.toLocaleString("en")})`, b.value, found.only_b)));
    } catch (error) { result.replaceChildren(el("p", {class: "error"}, error.message)); }
  };
  $("detail").replaceChildren(el("form", {class: "card form", onsubmit: submit}, el("h3", {}, "What do two dictionaries share?"), el("div", {class: "row"}, a, "and", b, el("button", {class: "main", id: "compare", type: "submit"}, "Compare"))), result);
}

// ---- start --------------------------------------------------------------------------------------------------------------

function choose(which) {
  if (which === name) return;
  name = which;
  const facts = api.dictionaries.find(each => each.name === name);
  $("dictionary").value = name;
  $("name").textContent = $("name").title = document.title = name;
  $("facts").textContent = $("facts").title = `${facts.architecture} · ${facts.d_sae.toLocaleString("en")} latents · ${facts.place} of ${facts.model}`;
  refresh();
}

function route() {
  running?.stop();
  const [, view, rest] = location.hash.split("/"), latent = view === "latent" && /^\d+$/.test(rest ?? "") ? Number(rest) : null;
  const whole = api.live && (view === "text" || (view === "compare" && api.dictionaries.length > 1));
  document.body.classList.toggle("open", whole || latent !== null);
  document.body.classList.toggle("whole", whole);
  for (const tab of $("tabs").children) tab.toggleAttribute("aria-current", tab.hash === (whole ? `#/${view}` : "#/"));
  if (whole) { if (view === "text") showText(); else showCompare(); }
  else if (latent !== null) showLatent(latent);
  else { shownLatent = null; $("detail").replaceChildren(el("p", {class: "soft"}, "Choose a latent on the left. / searches, j and k go through the list.")); draw(); }
}

function start(source) {
  api = source;
  if (api.live) $("tabs").append(...[["#/", "Latents"], ["#/text", "Text"], ...(api.dictionaries.length > 1 ? [["#/compare", "Compare"]] : [])].map(([href, text]) => el("a", {href}, text)));
  $("dictionary").replaceChildren(...api.dictionaries.map(each => el("option", {value: each.name}, each.name)));
  $("dictionary").hidden = api.dictionaries.length < 2;
  $("dictionary").addEventListener("change", event => { choose(event.target.value); route(); });
  let timer;
  $("search").addEventListener("input", () => { $("sort").value = $("search").value.trim() && api.live ? "match" : $("sort").value === "match" ? "largest" : $("sort").value; clearTimeout(timer); timer = setTimeout(refresh, 80); });
  for (const id of ["sort", "min_density", "max_density", "min_largest", "labelled"]) $(id).addEventListener("change", refresh);
  $("down").addEventListener("click", () => { descending = !descending; $("down").textContent = descending ? "↓" : "↑"; refresh(); });
  $("filter").addEventListener("submit", event => { event.preventDefault(); clearTimeout(timer); refresh(); });
  $("rows").addEventListener("scroll", () => requestAnimationFrame(draw), {passive: true});
  addEventListener("resize", draw);
  addEventListener("hashchange", route);
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.key === "/") { event.preventDefault(); if (document.body.classList.contains("whole")) location.hash = "#/"; $("search").focus(); }
    else if (event.key === "j" || (event.key === "ArrowDown" && event.target === $("rows"))) { event.preventDefault(); step(1); }
    else if (event.key === "k" || (event.key === "ArrowUp" && event.target === $("rows"))) { event.preventDefault(); step(-1); }
    else if (event.key === "Escape") location.hash = "#/";
  });
  choose(api.dictionaries[0].name);
  route();
}

if (document.querySelector("meta[name=explorer]")) addEventListener("DOMContentLoaded", async () => {
  try { const answer = await fetch("api/dictionaries"); if (!answer.ok) throw new Error(`the server answered ${answer.status}`); start(fromServer(await answer.json())); } catch (error) { complain(error); }
});
