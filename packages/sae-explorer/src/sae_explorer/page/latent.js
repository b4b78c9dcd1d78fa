// One latent: what it fires on, what it does to the logits, and its relatives.

const FIRST_EXAMPLES = 6;

// A latent's number, as a link where the page has it.
const link = latent =>
  api.inside && !api.inside.has(latent) ? String(latent) : el("a", {href: `#/latent/${latent}`}, String(latent));
const back = () => el("a", {class: "back", href: "#/"}, "‹ list");

function exampleLine(example, largest) {
  const tokens = example.tokens.map((text, n) => {
    const value = example.values[n];
    const props = {class: n === example.peak ? "token peak" : "token", title: value ? number(value) : null};
    const token = el("span", props, ...shownToken(text));
    if (value) token.style.setProperty("--a", Math.min(1, Math.abs(value) / (largest || 1)).toFixed(3));
    return token;
  });
  return el("div", {class: "example"}, el("span", {}, number(example.value)), el("div", {class: "text", dir: "auto"}, tokens));
}

// The strongest examples, all but the first few behind a button.
function strongest(examples, largest) {
  const lines = examples.map(example => exampleLine(example, largest));
  const rest = el("div", {hidden: true}, lines.slice(FIRST_EXAMPLES));
  const more = el("button", {type: "button", class: "more"}, `${lines.length - FIRST_EXAMPLES} more`);
  more.addEventListener("click", () => {
    rest.hidden = false;
    more.remove();
  });
  const long = lines.length > FIRST_EXAMPLES;
  return card("Fires most strongly on", ...lines.slice(0, FIRST_EXAMPLES), ...(long ? [rest, more] : []));
}

function heading(latent, found) {
  const {neuronpedia} = found;
  const away = {href: neuronpedia, target: "_blank", rel: "noopener noreferrer"};
  const button = (text, label, by) =>
    el("button", {type: "button", title: label, "aria-label": label, onclick: () => step(by)}, text);
  return el(
    "div",
    {class: "head"},
    back(),
    el("h2", {}, `Latent ${latent}`),
    found.label && !api.live ? el("b", {}, ...visible(found.label)) : null,
    el(
      "span",
      {class: "go"},
      neuronpedia ? el("a", away, "Neuronpedia ↗") : null,
      button("↑", "Previous in the list ( k )", -1),
      button("↓", "Next in the list ( j )", 1),
    ),
  );
}

function numbers(found, positions) {
  const fires = `fires on ${share(found.density)} of tokens (${many(found.count)} of ${many(positions)})`;
  const sizes = ` · largest activation ${number(found.largest)} · mean ${number(found.mean)}`;
  return el("p", {class: "numbers"}, found.count ? fires + sizes : `never fired on ${many(positions)} tokens`);
}

function tokenCard(title, tokens, kind) {
  if (!tokens.length) return null;
  const rows = tokens.map(([text, value]) => [tokenInTable(text), number(value)]);
  return card(title, table(["token", "logit"], rows, {kind}));
}

function activationCard({counts, edges}) {
  if (!counts.length) return null;
  const title = (n, count) => `${number(edges[n])} to ${number(edges[n + 1])}: ${many(count)}`;
  const drawn = bars(counts, number(edges[0]), number(edges.at(-1)), "Histogram of activations", title);
  return card("Activations", drawn, soft("both axes logarithmic"));
}

function logitCard(logits) {
  if (!logits) return null;
  const {counts, low, high} = logits;
  const middle = n => low + ((high - low) * (n + 0.5)) / counts.length;
  const title = (n, count) => `${number(middle(n))}: ${many(count)} tokens`;
  const drawn = bars(counts, number(low), number(high), "Histogram of logits", title);
  return card("Effect on all tokens' logits", drawn, soft("number of tokens on a logarithmic scale"));
}

function siteCard(sites) {
  const rows = Object.entries(sites).map(([site, norm]) => [site, number(norm)]);
  return rows.length ? card("Written at", table(["site", "norm"], rows)) : null;
}

function partnerCard(partners) {
  if (!partners.length) return null;
  const rows = partners.map(([other, count, jaccard]) => [link(other), String(count), number(jaccard)]);
  return card("Fires together with", table(["latent", "times", "Jaccard"], rows));
}

function nearestCard(nearest) {
  const rows = nearest.map(([other, cosine]) => [link(other), number(cosine)]);
  return card("Writes alike", table(["latent", "cosine"], rows));
}

async function showLatent(latent) {
  shownLatent = latent;
  draw();
  let found;
  try {
    found = await api.latent(name, latent);
  } catch (error) {
    $("detail").replaceChildren(back(), el("p", {class: "error"}, error.message));
    return;
  }
  if (shownLatent !== latent) return;
  const facts = api.dictionaries.find(each => each.name === name);
  const bands = Map.groupBy(found.examples, example => example.band);
  const random = [...bands.keys()].filter(band => band > 0);
  const examples = band => bands.get(band).map(example => exampleLine(example, found.largest));
  $("detail").replaceChildren(
    heading(latent, found),
    numbers(found, facts.positions),
    found.note && !api.live ? el("p", {class: "text"}, ...visible(found.note)) : "",
    api.live ? labelForm(latent, found) : "",
    bands.has(0) ? strongest(bands.get(0), found.largest) : "",
    api.live ? steerForm(latent, found) : "",
    el(
      "div",
      {class: "cards"},
      tokenCard("Promotes", found.promoted, "up"),
      tokenCard("Suppresses", found.suppressed, "low"),
      activationCard(found.histogram),
      logitCard(found.logits),
      siteCard(found.sites),
    ),
    ...random.map(band => card(`Drawn at random: band ${band} of ${facts.bands}, from strong to weak`, ...examples(band))),
    el("div", {class: "cards"}, partnerCard(found.partners), nearestCard(found.nearest)),
  );
  $("detail").scrollTop = 0;
}
