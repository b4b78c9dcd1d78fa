// Which view the address asks for, and what the keys do.

function chooseDictionary(which) {
  if (which === name) return;
  name = which;
  const facts = api.dictionaries.find(each => each.name === name);
  $("dictionary").value = name;
  $("name").textContent = $("name").title = document.title = name;
  const said = `${facts.architecture} · ${many(facts.d_sae)} latents · ${facts.place} of ${facts.model}`;
  $("facts").textContent = $("facts").title = said;
  refresh();
}

// What somebody sees who comes here for the first time.
function showWelcome() {
  const facts = api.dictionaries.find(each => each.name === name);
  const line = (what, ...how) => el("li", {}, el("b", {}, what), ...how);
  const live = [
    line("What does it do? ", "In its page, add it while the model writes, and read both texts side by side."),
    line("What fires on my text? ", el("a", {href: "#/text"}, "Type one"), " and click a token."),
  ];
  $("detail").replaceChildren(
    el("h2", {}, "Latents"),
    el(
      "p",
      {},
      `Each of the ${many(facts.d_sae)} latents fires on something: ${many(facts.active)} did on ${many(facts.positions)} tokens.`,
    ),
    el(
      "ul",
      {class: "welcome"},
      line("What is one about? ", "Choose it on the left; its page begins with the texts on which it is strongest."),
      ...(api.live ? live : []),
      line(
        "Where is the one for …? ",
        "Search a word (",
        el("kbd", {}, "/"),
        "); ",
        el("kbd", {}, "j"),
        " and ",
        el("kbd", {}, "k"),
        " go through the list.",
      ),
    ),
  );
}

function route() {
  running?.stop();
  const [, view, rest] = location.hash.split("/");
  const latent = view === "latent" && /^\d+$/.test(rest ?? "") ? Number(rest) : null;
  const whole = api.live && (view === "text" || (view === "compare" && api.dictionaries.length > 1));
  document.body.classList.toggle("open", whole || latent !== null);
  document.body.classList.toggle("whole", whole);
  for (const tab of $("tabs").children) {
    if (tab.hash === (whole ? `#/${view}` : "#/")) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (whole) return view === "text" ? showText() : showCompare();
  if (latent !== null) return showLatent(latent);
  shownLatent = null;
  showWelcome();
  draw();
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const inList = event.target === $("rows");
  if (event.key === "/") {
    if (document.body.classList.contains("whole")) location.hash = "#/";
    $("search").focus();
  } else if (event.key === "j" || (event.key === "ArrowDown" && inList)) step(1);
  else if (event.key === "k" || (event.key === "ArrowUp" && inList)) step(-1);
  else if (event.key === "Escape") location.hash = "#/";
  else return;
  event.preventDefault();
}

function start(source) {
  api = source;
  const tabs = [["#/", "Latents"], ["#/text", "Text"], ["#/compare", "Compare"]]; // prettier-ignore
  const shown = tabs.slice(0, api.live ? (api.dictionaries.length > 1 ? 3 : 2) : 0);
  $("tabs").append(...shown.map(([href, text]) => el("a", {href}, text)));
  $("dictionary").replaceChildren(...api.dictionaries.map(each => el("option", {value: each.name}, each.name)));
  $("dictionary").hidden = api.dictionaries.length < 2;
  $("dictionary").addEventListener("change", event => {
    chooseDictionary(event.target.value);
    route();
  });
  let timer;
  $("search").addEventListener("input", () => {
    if ($("search").value.trim()) $("sort").value = "match";
    else if ($("sort").value === "match") $("sort").value = "largest";
    clearTimeout(timer);
    timer = setTimeout(refresh, 80);
  });
  for (const id of ["sort", "min_density", "max_density", "min_largest", "labelled"]) $(id).addEventListener("change", refresh);
  $("down").addEventListener("click", () => {
    descending = !descending;
    $("down").textContent = descending ? "↓" : "↑";
    refresh();
  });
  $("filter").addEventListener("submit", event => {
    event.preventDefault();
    clearTimeout(timer);
    refresh();
  });
  $("rows").addEventListener("scroll", () => requestAnimationFrame(draw), {passive: true});
  addEventListener("resize", draw);
  addEventListener("hashchange", route);
  addEventListener("keydown", pressed);
  chooseDictionary(api.dictionaries[0].name);
  route();
}

if (document.querySelector("meta[name=explorer]")) {
  addEventListener("DOMContentLoaded", async () => {
    try {
      const answer = await fetch("api/dictionaries");
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      start(fromServer(await answer.json()));
    } catch (error) {
      complain(error);
    }
  });
}
