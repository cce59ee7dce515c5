// The head explorer: maps of layers by heads, and what is known of the chosen heads. `state` is what the address keeps.
(() => {
  const source = document.getElementById("data");
  if (!source) return;
  const finite = (_, value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value);
  const { statistics, readings, models } = JSON.parse(source.textContent, finite);
  const root = document.getElementById("explorer");
  const OF_READINGS = ["c", "next", "double"];
  const BOUNDED = ["c", "c_n", "softmax"];
  const FEW = 5;
  const FILTERS = { all: "every head", large: "large: c above the bound", growing: "growing", undecided: "undecided" };
  const SETS = { all: "every query with every key", own: "the model's own mask" };
  const READINGS = Object.keys(readings).filter((name) => models.some((model) => model.readings?.[name]));
  const statisticOf = (key) => statistics.find((one) => one.key === key);
  const modelOf = (key) => models.find((model) => model.key === key);
  // A statistic without values of its own for the model's mask has those of all entries: there the mask hides nothing.
  const kindOf = (values, set) => (values?.[set] ? set : "all");
  const place = (model, head) => [Math.floor(head / model.heads), head % model.heads];

  function found(model, key, { set, reading }) {
    if (reading !== "printed" && OF_READINGS.includes(key)) {
      const kinds = model.readings?.[reading];
      const values = kinds?.[kindOf(kinds, set)]?.[key];
      return values ? { v: values } : null;
    }
    return model.values[key]?.[kindOf(model.values[key], set)] ?? null;
  }

  const largest = (model, rank = 0) => {
    const values = (model.values.c ?? model.values.c_n ?? Object.values(model.values)[0]).all.v;
    return values.map((value, head) => [value ?? -1, head]).sort((a, b) => b[0] - a[0])[rank]?.[1] ?? 0;
  };

  function start() {
    const [first, second] = [models[0], models[1] ?? models[0]];
    return {
      stat: statistics.find((one) => models.some((model) => model.values[one.key])).key,
      set: "all", reading: "printed", filter: "all", two: false,
      a: { model: first.key, head: largest(first) },
      b: { model: second.key, head: largest(second, second === first ? 1 : 0) },
    };
  }

  // The part of the address after #, and back; what it does not have or has wrong is as at the start.
  function written({ stat, set, reading, filter, two, a, b }) {
    const side = ({ model, head }) => [model, ...place(modelOf(model), head)].join("~");
    const parts = { stat, set, reading, filter, a: side(a), ...(two ? { b: side(b) } : {}) };
    return "#" + new URLSearchParams(parts);
  }
  function read(hash) {
    const [given, state] = [new URLSearchParams(hash.slice(1)), start()];
    const known = { stat: statistics.map((one) => one.key), set: Object.keys(SETS) };
    Object.assign(known, { reading: ["printed", ...READINGS], filter: Object.keys(FILTERS) });
    for (const [name, words] of Object.entries(known)) if (words.includes(given.get(name))) state[name] = given.get(name);
    for (const side of ["a", "b"]) {
      const [key, layer, head] = (given.get(side) ?? "").split("~");
      const model = modelOf(key);
      const inside = model && +layer >= 0 && +layer < model.layers && +head >= 0 && +head < model.heads;
      if (inside) state[side] = { model: key, head: +layer * model.heads + +head };
    }
    state.two = given.has("b");
    return state;
  }

  // Ends of the colours and of a strip: the statistic's own or those of all models, so that two can be compared.
  function domainOf(key, state, among = models) {
    const one = statisticOf(key);
    const all = among.flatMap((model) => found(model, key, state)?.v ?? []);
    const usable = all.filter((v) => v != null && Number.isFinite(v) && (!one.log || v > 0)).sort((a, b) => a - b);
    if (!usable.length) return [one.low ?? 1, one.high ?? 10];
    const at = (share) => usable[Math.round(share * (usable.length - 1))];
    const [low, high] = [one.low ?? at(0.02), one.high ?? at(0.98)];
    return high > low ? [low, high] : [low, one.log ? low * 2 : low + 1];
  }

  function passes(model, head, { filter, set }) {
    const kind = kindOf(model.size, set);
    const [size, trend] = [model.size?.[kind][head], model.trend?.[kind][head]];
    const c = model.values.c;
    if (filter === "large") return size ? size === "large" : (c?.[kindOf(c, set)].v[head] ?? 0) > model.bound;
    if (filter === "growing") return trend === "grows";
    if (filter === "undecided") return size === "undecided" || trend === "undecided";
    return true;
  }

  const between = (values, head) =>
    values?.low?.[head] == null ? "" : `${shown(values.low[head])} to ${shown(values.high[head])}`;
  const words = (model, head, set) => {
    const kind = kindOf(model.size, set);
    return model.size ? `${model.size[kind][head]}, ${model.trend[kind][head]}` : "";
  };

  let state = read(location.hash);
  const tip = el("div", { id: "tip", role: "tooltip", hidden: true });
  const live = el("p", { class: "sr", "aria-live": "polite" });
  const link = el("a", { href: "#" }, "link to this view");
  const counted = el("output", { id: "counted" });
  const panels = el("div", { class: "panels" });
  const controls = {};
  root.append(form(), panels, live, tip);

  function choice(name, title, options) {
    const select = el("select", { id: name, onchange: () => change({ [name]: select.value }) });
    for (const [value, label, off] of options) select.append(el("option", { value, disabled: off }, label));
    controls[name] = select;
    return el("label", {}, title, select);
  }

  function form() {
    const has = (key) => models.some((model) => model.values[key]);
    const two = el("input", { type: "checkbox", id: "two", onchange: () => change({ two: two.checked }) });
    controls.two = two;
    const sets = Object.entries(SETS).map(([key, name]) => [key, name, !models.some((model) => model.sets.includes(key))]);
    return el(
      "div", { class: "controls" },
      choice("stat", "Statistic", statistics.map((one) => [one.key, one.title + (has(one.key) ? "" : " (no table)"), !has(one.key)])),
      choice("set", "Entries", sets),
      choice("reading", "Reading", ["printed", ...READINGS].map((name) => [name, `${name}: ${readings[name]}`])),
      choice("filter", "Heads", Object.entries(FILTERS)),
      el("label", { class: "check" }, two, "side by side"),
      el("span", { class: "aside" }, counted, " ", link),
    );
  }

  function change(part) {
    state = { ...state, ...part };
    history.replaceState(null, "", written(state));
    draw();
  }

  function draw() {
    const focused = document.activeElement?.id;
    const boxes = [...panels.querySelectorAll(".scroll")];
    const scrolled = Object.fromEntries(boxes.map((box) => [box.id, [box.scrollLeft, box.scrollTop]]));
    for (const name of ["stat", "set", "reading", "filter"]) controls[name].value = state[name];
    controls.two.checked = state.two;
    controls.reading.disabled = !READINGS.length || !OF_READINGS.includes(state.stat);
    controls.reading.title = READINGS.length ? "Of c and the order ratios" : "The tables have no readings per head";
    link.href = written(state);
    const sides = state.two ? ["a", "b"] : ["a"];
    panels.replaceChildren(...sides.map(panel));
    panels.classList.toggle("two", state.two);
    for (const box of panels.querySelectorAll(".scroll")) {
      const chosen = box.querySelector(".chosen").parentNode;
      const at = scrolled[box.id] ?? [chosen.offsetLeft - box.clientWidth / 2, chosen.offsetTop - 150];
      [box.scrollLeft, box.scrollTop] = at;
    }
    counted.textContent = sides
      .map((side) => {
        const model = modelOf(state[side].model);
        const all = model.layers * model.heads;
        const kept = Array.from({ length: all }, (_, head) => head).filter((head) => passes(model, head, state)).length;
        return `${kept} of ${all} heads`;
      })
      .join("; ");
    if (focused && panels.contains(document.getElementById(focused))) document.getElementById(focused).focus();
  }

  function panel(side) {
    const model = modelOf(state[side].model);
    const choose = el("select", {
      id: `model-${side}`, "aria-label": `model, ${side === "a" ? "first" : "second"} panel`,
      onchange: () => change({ [side]: { model: choose.value, head: largest(modelOf(choose.value)) } }),
    });
    for (const one of models) choose.append(el("option", { value: one.key, selected: one === model }, `${one.label}, ${one.corpus}`));
    return el("section", { class: "panel", "aria-label": model.label }, choose, map(side, model), details(side, model));
  }

  function map(side, model) {
    const one = statisticOf(state.stat);
    const values = found(model, state.stat, state);
    if (!values) return el("p", { class: "note" }, `The tables of ${model.label} do not have this: ${one.title}.`);
    const domain = domainOf(state.stat, state);
    const at = scale(domain, one.log, 0, 1);
    const table = el("table", { class: "map", role: "grid", id: `map-${side}`, "aria-label": `${one.title} by layer and head` });
    table.style.setProperty("--heads", model.heads);
    const numbers = Array.from({ length: model.heads }, (_, head) => el("th", { scope: "col" }, String(head)));
    table.append(el("thead", {}, el("tr", {}, el("th", { class: "corner" }, el("span", { class: "sr" }, "layer")), numbers)));
    const body = el("tbody");
    for (let layer = 0; layer < model.layers; layer++) {
      const row = el("tr", {}, el("th", { scope: "row" }, String(layer)));
      for (let head = 0; head < model.heads; head++) row.append(el("td", {}, cell(side, model, layer * model.heads + head, values, at)));
      body.append(row);
    }
    table.append(body);
    for (const [event, act] of [["pointerover", hover], ["focusin", hover], ["pointerout", hide], ["focusout", hide]]) {
      table.addEventListener(event, act);
    }
    table.addEventListener("keydown", move);
    const steps = Array.from({ length: 11 }, (_, i) => colour(i / 10).back).join(", ");
    const marks = ticks(domain, one.log, 5).map((tick) => el("span", { style: `left: ${100 * at(tick)}%` }, shown(tick)));
    const outlined = BOUNDED.includes(state.stat) ? ` Outlined: above ${shown(model.bound)}.` : "";
    const reading = state.reading !== "printed" && OF_READINGS.includes(state.stat) ? ` Read as ${state.reading}.` : "";
    const legend = el("div", { class: "legend", "aria-hidden": "true" }, el("div", { class: "bar", style: `background: linear-gradient(90deg, ${steps})` }), el("div", { class: "marks" }, marks));
    const own = kindOf(model.values[state.stat], state.set) === "own";
    const more = own && model.whole.includes(state.stat) ? model.left_out.map((one) => `, ${one}`).join("") : "";
    const what = own ? model.mask + more : SETS.all;
    return el("div", { class: "frame" }, el("p", { class: "note" }, `${one.title}; entries: ${what}. ${one.about}${reading}${outlined}`), el("div", { class: "scroll", id: `scroll-${side}` }, table), legend);
  }

  function cell(side, model, head, values, at) {
    const [layer, number] = place(model, head);
    const value = values.v[head];
    const chosen = state[side].head === head;
    const [pass, above] = [passes(model, head, state), BOUNDED.includes(state.stat) && value > model.bound];
    const classes = [...(chosen ? ["chosen"] : []), ...(pass ? [] : ["dim"]), ...(above ? ["above"] : [])].join(" ");
    const { back, ink } = value == null ? { back: "transparent", ink: "inherit" } : colour(at(value));
    const named = [words(model, head, state.set), pass ? "" : "filtered out"].filter(Boolean).join(", ");
    return el(
      "button",
      {
        type: "button", id: `${side}-${layer}-${number}`, class: classes, style: `background: ${back}; color: ${ink}`,
        tabindex: chosen ? 0 : -1, "aria-pressed": String(chosen), "data-side": side, "data-head": head,
        "aria-label": `layer ${layer}, head ${number}: ${statisticOf(state.stat).title} ${shown(value)}${named && `; ${named}`}`,
        onclick: () => choose(side, model, head),
      },
      brief(value),
    );
  }

  function choose(side, model, head) {
    change({ [side]: { model: model.key, head } });
    live.textContent = `Layer ${place(model, head).join(", head ")} is shown below the map.`;
  }

  function move(event) {
    const button = event.target.closest("button[data-head]");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") tip.hidden = true;
    if (!button || !step) return;
    event.preventDefault();
    const [, layer, head] = button.id.split("-").map(Number);
    document.getElementById(`${button.dataset.side}-${layer + step[0]}-${head + step[1]}`)?.focus();
  }

  const hide = () => (tip.hidden = true);
  function hover(event) {
    const button = event.target.closest("button[data-head]");
    if (!button) return;
    const [model, head] = [modelOf(state[button.dataset.side].model), +button.dataset.head];
    const [layer, number] = place(model, head);
    const lines = statistics
      .map((one) => [one, found(model, one.key, state)])
      .filter(([, values]) => values)
      .map(([one, values]) => el("div", {}, `${one.title}: ${shown(values.v[head])}`, between(values, head) ? ` (${between(values, head)})` : ""));
    tip.replaceChildren(el("strong", {}, `layer ${layer}, head ${number}`), ` ${words(model, head, state.set)}`, ...lines);
    tip.hidden = false;
    const [box, size] = [button.getBoundingClientRect(), tip.getBoundingClientRect()];
    const wide = document.documentElement.clientWidth;
    const below = box.bottom + size.height + 8 < window.innerHeight;
    tip.style.left = `${Math.max(4, Math.min(box.left, wide - size.width - 4))}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - size.height - 6)}px`;
  }

  function details(side, model) {
    const head = state[side].head;
    const [layer, number] = place(model, head);
    const kind = kindOf(model.curves, state.set);
    const parts = [el("h3", {}, `Layer ${layer}, head ${number}`), words(model, head, state.set) ? el("p", { class: "badges" }, words(model, head, state.set)) : null];
    const curves = model.curves?.[kind];
    const visible = (state.two ? ["a", "b"] : ["a"]).map((one) => modelOf(state[one].model));
    if (curves) parts.push(curveFigure(model, kind, curves, head, layer, number));
    for (const key of ["next", "double"]) {
      const values = found(model, key, state);
      if (!values) continue;
      const name = statisticOf(key).title;
      const label = `${name} of this head ${shown(values.v[head])}; median of the model ${shown(median(values.v))}`;
      const [low, high] = domainOf(key, state, visible);
      const strip = stripChart(values.v, values.v[head], [low, Math.max(high, 1.1 * low)], true, label);
      parts.push(el("figure", {}, el("figcaption", {}, label), strip));
    }
    parts.push(numbers(model, head));
    return el("div", { class: "details" }, parts);
  }

  function curveFigure(model, kind, curves, head, layer, number) {
    const x = model.curves.lengths;
    const points = (values) => values.map((y, i) => ({ x: x[i], y, few: curves.texts[i] < FEW })).filter((p) => p.y > 0);
    const middle = x.map((_, i) => median(curves.c.map((row) => row[i])));
    const [from, to] = model.octave?.[kind] ?? [0, 0];
    const exponent = model.values.exponent?.[kind].v[head];
    const own = curves.c[head];
    const [start, end] = [own[x.indexOf(from)], own[x.indexOf(to)]];
    // The line of the exponent goes through the middle of its octave.
    const centre = Math.sqrt(start * end);
    const at = (n) => ({ x: n, y: centre * (n / Math.sqrt(from * to)) ** exponent });
    const line = exponent != null && centre > 0 ? [at(from), at(to)] : null;
    const visible = (state.two ? ["a", "b"] : ["a"]).map((side) => [modelOf(state[side].model), state[side].head]).filter(([one]) => one.curves);
    const seen = visible.flatMap(([one, place]) => one.curves[kindOf(one.curves, state.set)].c[place]).concat(middle).filter((y) => y > 0);
    const lengths = visible.flatMap(([one]) => one.curves.lengths);
    const domain = { x: [Math.min(...lengths), Math.max(...lengths)], y: [Math.max(1e-4, Math.min(1, ...seen) / 1.5), 1.5 * Math.max(model.bound, ...seen)] };
    const label = `c against the length n: layer ${layer}, head ${number}, and the median head`;
    const drawn = [{ name: "median head", kind: "median", points: points(middle), line: null }, { name: "this head", kind: "own", points: points(own), line }];
    const rows = x.map((n, i) => el("tr", {}, [n.toLocaleString("en"), curves.texts[i], shown(own[i]), shown(middle[i])].map((word) => el("td", {}, String(word)))));
    const names = ["n", "texts", "this head", "median head"].map((name) => el("th", { scope: "col" }, name));
    const printed = state.reading === "printed" ? "" : " As printed, whatever the reading.";
    return el(
      "figure", {},
      el("figcaption", {}, `c(n) of this head and, dashed, of the median head; thick: the exponent. Hollow: fewer than five texts.${printed}`),
      curveChart(drawn, model.bound, domain, label),
      el("details", {}, el("summary", {}, "c(n) in numbers"), el("table", { class: "numbers" }, el("thead", {}, el("tr", {}, names)), el("tbody", {}, rows))),
    );
  }

  function numbers(model, head) {
    const rows = statistics.map((one) => [one, found(model, one.key, state)]).filter(([, values]) => values);
    const cells = ([one, values]) => [shown(values.v[head]), between(values, head) || "–", shown(median(values.v))].map((word) => el("td", {}, word));
    const names = ["", "this head", "95 % interval", "median head"].map((name) => el("th", { scope: "col" }, name));
    return el(
      "table", { class: "numbers" },
      el("caption", { class: "sr" }, "Statistics of this head beside the model's median"),
      el("thead", {}, el("tr", {}, names)),
      el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row[0].title), cells(row)))),
    );
  }

  window.addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    state = read(location.hash);
    draw();
  });
  draw();
  if (location.hash.includes("=")) root.scrollIntoView();
})();
