// Where data come from: a dashboard on a disk, whose data come by script tags, since a page from a disk may not fetch, or the
// local server. Both answer `search` and `latent`; the server has the model behind it.

const waiting = new Map();
const received = new Map();

// What the data's own scripts call: the index, or a block of latents by its number.
function receive(name, data) {
  received.set(name, data);
  waiting.get(name)?.(data);
  if (name === "index") addEventListener("DOMContentLoaded", () => start(fromDisk(data)));
}

function fromDisk({facts, columns, block}) {
  const names = Object.keys(columns);
  const tokens = columns.tokens.map(text => ` ${text} `.toLowerCase());
  const own = columns.label.map((text, n) => `${text} ${columns.note[n]}`.toLowerCase());
  const words = columns.promotes.map((text, n) => tokens[n] + text.toLowerCase() + " " + own[n]);
  const row = n => Object.fromEntries(names.map(name => [name, columns[name][n]]));
  let last = "";
  let order = [];

  const fits = (n, query, asked) => {
    const density = columns.density[n];
    if (density < query.min_density || density > query.max_density || columns.largest[n] < query.min_largest) return false;
    if (query.labelled && !columns.label[n] && !columns.note[n]) return false;
    return asked.every(word => words[n].includes(word)) || String(columns.latent[n]) === query.text.trim().replace("#", "");
  };
  // How well a latent fits: by its number, then by one's own words, then by what it fires on, whole words before parts.
  const weight = (n, word) => {
    if (String(columns.latent[n]) === word.replace("#", "")) return 1e6;
    if (own[n].includes(word)) return 100;
    return tokens[n].includes(` ${word} `) ? 10 : tokens[n].includes(word) ? 5 : 1;
  };
  const wanted = query => {
    const asked = query.text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let n = 0; n < words.length; n++) if (fits(n, query, asked)) found.push(n);
    const byFit = query.sort === "match" && asked.length;
    const fit = new Map(byFit ? found.map(n => [n, asked.reduce((sum, word) => sum + weight(n, word), 0)]) : []);
    const key = columns[query.sort] || columns.largest;
    const sign = query.descending || byFit ? -1 : 1;
    return found.sort((a, b) => (byFit && fit.get(b) - fit.get(a)) || sign * (key[a] - key[b]) || a - b);
  };
  const load = number =>
    new Promise((resolve, reject) => {
      if (received.has(number)) return resolve(received.get(number));
      waiting.set(number, resolve);
      const missing = () => reject(new Error(`data/${number}.js is missing`));
      document.head.append(el("script", {src: `data/${number}.js`, onerror: missing}));
    });
  return {
    live: false,
    dictionaries: [facts],
    inside: new Set(columns.latent),
    async search(name, query) {
      const {offset, limit, ...rest} = query;
      const key = JSON.stringify(rest);
      if (key !== last) [order, last] = [wanted(query), key];
      return {total: order.length, rows: order.slice(offset, offset + limit).map(row)};
    },
    async latent(name, latent) {
      const n = columns.latent.indexOf(latent);
      if (n < 0) throw new Error(`latent ${latent} is not in this dashboard`);
      const found = (await load(Math.floor(latent / block)))[latent];
      return {...found, label: columns.label[n], note: columns.note[n]};
    },
  };
}

function fromServer(dictionaries) {
  const ask = async (path, options = {}) => {
    const answer = await fetch(path, options);
    if (answer.ok) return answer;
    let said = `the server answered ${answer.status}`;
    try {
      said = (await answer.json()).error;
    } catch {} // no JSON: the status says it
    throw new Error(said);
  };
  const get = async (path, query) => (await ask(`${path}?${new URLSearchParams(query)}`)).json();
  const post = (path, body, options = {}) =>
    ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), ...options});
  return {
    live: true,
    dictionaries,
    search: (name, query) => get("api/latents", {dictionary: name, ...query}),
    latent: (name, latent) => get("api/latent", {dictionary: name, latent}),
    compare: (a, b) => get("api/compare", {a, b}),
    text: async (name, text) => (await post("api/text", {dictionary: name, text})).json(),
    label: (name, latent, label, note) => post("api/label", {dictionary: name, latent, label, note}),
    stop: job => post("api/stop", {job}),
    // Each line of the answer is a JSON value, taken as it comes.
    async generate(body, signal, take) {
      const reader = (await post("api/generate", body, {signal})).body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ; ) {
        const {done, value} = await reader.read();
        if (done) return;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines.filter(Boolean)) take(JSON.parse(line));
      }
    },
  };
}
