// What needs the model or a place to write: labels, steering, texts, and dictionaries side by side.

const aside = props => el("span", {class: "soft", "aria-live": "polite", ...props});

// ---- label and note -----------------------------------------------------------------------------------------------------

function labelForm(latent, found) {
  const dictionary = name;
  const both = {dir: "auto", autocomplete: "off"};
  const label = el("input", {
    id: "label",
    "aria-label": "Label",
    placeholder: "Your label",
    maxlength: 200,
    value: found.label,
    ...both,
  });
  const note = el("textarea", {
    id: "note",
    "aria-label": "Note",
    placeholder: "Your note",
    maxlength: 10000,
    rows: 1,
    value: found.note,
    ...both,
  });
  const said = aside();
  const save = async () => {
    try {
      await api.label(dictionary, latent, label.value, note.value);
      said.textContent = "saved";
    } catch (error) {
      said.textContent = error.message;
      return;
    }
    if (dictionary !== name) return;
    for (const rows of pages.values()) {
      const row = rows?.find(each => each.latent === latent);
      if (row) row.label = label.value;
    }
    draw();
  };
  for (const field of [label, note]) {
    field.addEventListener("change", save);
    field.addEventListener("input", () => said.replaceChildren());
  }
  const submit = event => {
    event.preventDefault();
    label.blur();
  };
  const all = {href: `api/labels.json?${new URLSearchParams({dictionary})}`, download: "labels.json"};
  const below = el("div", {class: "row"}, soft("kept when you leave a field"), said, el("a", all, "export all as JSON"));
  return el("form", {class: "card form", onsubmit: submit}, el("div", {class: "labels"}, label, note), below);
}

// ---- steering -----------------------------------------------------------------------------------------------------------

let running = null;
let prompt = "I think that";

// Asks for both generations and shows them as they come, until they end, fail or are stopped.
async function generate(asked, show, said) {
  running?.stop();
  const control = new AbortController();
  const job = crypto.randomUUID();
  const mine = {
    stop() {
      control.abort();
      api.stop(job).catch(() => {}); // where the server is gone, nothing runs
    },
  };
  running = mine;
  said.className = "soft";
  said.textContent = "generating …";
  try {
    await api.generate({...asked, job}, control.signal, part => {
      if (part.error) throw new Error(part.error);
      show(part.plain, part.edited);
    });
    said.textContent = "done";
  } catch (error) {
    const stopped = error.name === "AbortError";
    said.textContent = stopped ? "stopped" : error.message;
    said.className = stopped ? "soft" : "error";
  }
  if (running === mine) running = null;
}

function steerForm(latent, found) {
  const dictionary = name;
  const scale = found.largest || 1;
  const times = factor => String(Number((scale * factor).toPrecision(3)));
  const field = (id, label, props) => el("input", {id, type: "number", "aria-label": label, class: "short", ...props});
  const ways = [["add", "add"], ["set", "set to"], ["remove", "remove"]]; // prettier-ignore
  const text = el("textarea", {id: "prompt", "aria-label": "Prompt", rows: 2, maxlength: 2000, value: prompt, dir: "auto"});
  const how = el(
    "select",
    {id: "how", "aria-label": "What to do"},
    ways.map(([value, label]) => el("option", {value}, label)),
  );
  const range = el("input", {type: "range", min: -10, max: 10, step: 0.1, value: 2, "aria-label": "Strength"});
  const amount = field("amount", "Amount", {step: "any", value: times(2)});
  const factor = el("span", {class: "soft factor"}, "2 × largest");
  const length = field("length", "Tokens", {min: 1, max: 200, value: 40});
  const temperature = field("temperature", "Temperature", {min: 0, max: 5, step: 0.1, value: 0});
  const go = el("button", {class: "main", id: "generate", type: "submit"}, "Generate");
  const stop = el("button", {type: "button", id: "stop", disabled: true, onclick: () => running?.stop()}, "Stop");
  const plain = el("div", {class: "text", id: "plain", dir: "auto"});
  const edited = el("div", {class: "text", id: "edited", dir: "auto"});
  const said = el("p", {class: "soft", id: "said", "aria-live": "polite"});

  range.addEventListener("input", () => {
    amount.value = times(range.value);
    factor.textContent = `${Number(range.value)} × largest`;
  });
  amount.addEventListener("input", () => {
    range.value = amount.value / scale;
    factor.textContent = `${number(amount.value / scale, 2)} × largest`;
  });
  how.addEventListener("change", () => {
    range.disabled = amount.disabled = how.value === "remove";
    factor.hidden = how.value === "remove";
  });
  const show = (one, other) => {
    plain.replaceChildren(el("i", {}, ...visible(prompt)), ...visible(one));
    edited.replaceChildren(el("i", {}, ...visible(prompt)), ...visible(other));
  };
  const submit = async event => {
    event.preventDefault();
    prompt = text.value;
    go.disabled = true;
    stop.disabled = false;
    show("", "");
    const asked = {dictionary, latent, text: prompt, how: how.value, amount: Number(amount.value)};
    await generate({...asked, tokens: Number(length.value), temperature: Number(temperature.value)}, show, said);
    go.disabled = false;
    stop.disabled = true;
  };
  const usual = found.largest
    ? `Largest activation on the studied text: ${number(found.largest)}. Beyond a few times that, models lose their language.`
    : "It never fired, so there is no usual size.";
  return el(
    "form",
    {class: "card form", id: "steer", onsubmit: submit},
    el("h3", {}, "What does it do? Change it while the model writes"),
    text,
    el("div", {class: "row"}, how, amount, range, factor),
    el("div", {class: "row"}, el("label", {}, "tokens ", length), el("label", {}, "temperature ", temperature), go, stop),
    soft(usual),
    el(
      "div",
      {class: "sides"},
      el("div", {class: "out"}, el("h4", {}, "untouched"), plain),
      el("div", {class: "out"}, el("h4", {}, "with the change"), edited),
    ),
    said,
  );
}

// ---- a text -------------------------------------------------------------------------------------------------------------

let typed = "";
let analysis = null;

// Latents of some positions: number, largest activation, summed effect, number of positions.
function latentsOn(positions) {
  const rows = new Map();
  for (const position of positions) {
    for (const [latent, value, effect] of analysis.fired[position]) {
      const row = rows.get(latent) || [latent, 0, 0, 0];
      if (Math.abs(value) > Math.abs(row[1])) row[1] = value;
      row[2] += effect ?? 0;
      row[3]++;
      rows.set(latent, row);
    }
  }
  return [...rows.values()];
}

function showText() {
  shownLatent = null;
  const text = el("textarea", {
    id: "text",
    "aria-label": "Text",
    placeholder: "Type a text",
    rows: 3,
    maxlength: 4000,
    value: typed,
    dir: "auto",
  });
  const go = el("button", {class: "main", id: "run", type: "submit"}, "Show latents");
  const by = [["value", "activation"], ["effect", "effect on the text's probability"]]; // prettier-ignore
  const sort = el(
    "select",
    {id: "by", "aria-label": "Sorted by"},
    by.map(([value, label]) => el("option", {value}, label)),
  );
  const tokens = el("div", {class: "tokens text", id: "tokens", dir: "auto"});
  const list = el("div");
  const said = el("p", {class: "soft", id: "text-said", "aria-live": "polite"});
  const result = el("div", {class: "card", hidden: true}, tokens, list);
  let chosen = null;

  // Colours tokens that count by one latent's activation, or by the largest of any.
  const heat = latent => {
    const values = analysis.fired.map((fired, n) => {
      if (!analysis.counts[n]) return 0;
      const own = latent === null ? fired : fired.filter(each => each[0] === latent);
      return Math.max(0, ...own.map(each => Math.abs(each[1])));
    });
    const most = Math.max(...values, 1e-9);
    [...tokens.children].forEach((token, n) => token.style.setProperty("--a", (values[n] / most).toFixed(3)));
  };
  const drawList = () => {
    const counted = analysis.counts.flatMap((counts, n) => (counts ? [n] : []));
    const found = latentsOn(chosen === null ? counted : [chosen]);
    const key = sort.value === "effect" ? 2 : 1;
    const sorted = found.sort((a, b) => Math.abs(b[key]) - Math.abs(a[key])).slice(0, 100);
    const rows = sorted.map(([latent, value, effect, times]) => [
      link(latent),
      of("wide", visible(analysis.words[latent] || "")),
      number(value),
      analysis.effects ? number(effect) : "–",
      of("extra", String(times)),
    ]);
    const ofRow = n => {
      const own = () => heat(sorted[n][0]);
      const all = () => heat(null);
      return {onmouseenter: own, onmouseleave: all, onfocusin: own, onfocusout: all};
    };
    const heads = ["latent", of("wide", "fires on"), "max", "effect", of("extra", "tokens")];
    const where = chosen === null ? "the text" : `token ${chosen + 1}`;
    list.replaceChildren(el("h3", {}, `Latents on ${where} (${found.length})`), table(heads, rows, {kind: "words", ofRow}));
  };
  const choose = position => {
    chosen = chosen === position ? null : position;
    [...tokens.children].forEach((token, n) => token.setAttribute("aria-pressed", String(n === chosen)));
    drawList();
  };
  const drawAll = () => {
    const button = (token, n) =>
      el("button", {type: "button", class: "token", "aria-pressed": "false", onclick: () => choose(n)}, ...shownToken(token));
    tokens.replaceChildren(...analysis.tokens.map(button));
    const none = analysis.effects ? "" : " This model predicts no text, so there are no effects.";
    const what = "Click a token for its own latents, point at a latent to see where it fires.";
    said.textContent = `${analysis.tokens.length} tokens in ${number(analysis.seconds, 2)} s. ${what}${none}`;
    result.hidden = false;
    heat(null);
    drawList();
  };
  const submit = async event => {
    event.preventDefault();
    typed = text.value;
    go.disabled = true;
    said.className = "soft";
    said.textContent = "running …";
    try {
      analysis = await api.text(name, typed);
      chosen = null;
      drawAll();
    } catch (error) {
      said.className = "error";
      said.textContent = error.message;
    }
    go.disabled = false;
  };
  sort.addEventListener("change", () => analysis && drawList());
  const controls = el("div", {class: "row"}, go, el("label", {}, "sorted by ", sort));
  const form = {class: "card form", onsubmit: submit};
  $("detail").replaceChildren(el("form", form, el("h3", {}, "Which latents fire on a text?"), text, controls, said), result);
  if (analysis && analysis.dictionary === name) drawAll();
}

// ---- two dictionaries ---------------------------------------------------------------------------------------------------

function comparison(found, a, b) {
  const to = (which, latent) => el("a", {href: `#/latent/${latent}`, onclick: () => chooseDictionary(which)}, String(latent));
  const pairs = found.pairs.map(([one, other, cosine, text, second]) => [
    to(a, one),
    of("wide", visible(text)),
    to(b, other),
    of("wide", visible(second)),
    number(cosine),
  ]);
  const only = (title, which, count, rows) => {
    const cells = rows.map(([latent, cosine, text]) => [to(which, latent), of("wide", visible(text)), number(cosine)]);
    const heads = ["latent", of("wide", "fires on"), "nearest"];
    return card(`${title} (${many(count)})`, cells.length ? table(heads, cells, {kind: "words"}) : soft("none"));
  };
  const heads = ["first", of("wide", "fires on"), "second", of("wide", "fires on"), "cosine"];
  const matched = `${many(found.matched)} latents are each other's nearest with a cosine of ${found.shared} or more`;
  return [
    el("p", {class: "numbers"}, `${matched} · mean cosine of the nearest ${number(found.mean)}`),
    card("The same in both", pairs.length ? table(heads, pairs, {kind: "words"}) : soft("none")),
    el(
      "div",
      {class: "cards"},
      only("Only in the first", a, found.only_a_count, found.only_a),
      only("Only in the second", b, found.only_b_count, found.only_b),
    ),
  ];
}

function showCompare() {
  shownLatent = null;
  const choice = (id, label, chosen) => {
    const options = api.dictionaries.map(each => el("option", {value: each.name, selected: each.name === chosen}, each.name));
    return el("select", {id, "aria-label": label}, options);
  };
  const a = choice("a", "First dictionary", name);
  const b = choice("b", "Second dictionary", api.dictionaries.find(each => each.name !== name).name);
  const result = el("div");
  const submit = async event => {
    event.preventDefault();
    result.replaceChildren(soft("comparing …"));
    try {
      result.replaceChildren(...comparison(await api.compare(a.value, b.value), a.value, b.value));
    } catch (error) {
      result.replaceChildren(el("p", {class: "error"}, error.message));
    }
  };
  const go = el("button", {class: "main", id: "compare", type: "submit"}, "Compare");
  const title = el("h3", {}, "What do two dictionaries share?");
  $("detail").replaceChildren(
    el("form", {class: "card form", onsubmit: submit}, title, el("div", {class: "row"}, a, "and", b, go)),
    result,
  );
}
