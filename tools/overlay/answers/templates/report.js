"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { axes, looks, bases, releases } = data;
  const grid = document.getElementById("grid");
  const detail = document.getElementById("detail");
  const form = document.getElementById("settings");
  const cells = [...grid.querySelectorAll(".cell")];
  const columns = axes.capability.length * axes.kv_cache_dtype.length;
  // What is set for all cells, in the order in which it is asked for: axis, name, control.
  const SETTINGS = [
    ["v1", "VLLM_USE_V1", "radio"],
    ["backend", "VLLM_ATTENTION_BACKEND", "select"],
    ["dtype", "dtype", "radio"],
    ["length", "max_model_len", "radio"],
    ["flashinfer", "FlashInfer", "radio"],
  ];
  const chosen = Object.fromEntries(SETTINGS.map(([axis]) => [axis, axes[axis][0]]));
  const VARIANTS = ["stock", "patched"];
  let open = null;

  const word = (axis, value) => (data.labels[axis] || {})[value] || value;

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  /* The outcome at a place of runs such as "3*0 7 2*2". */
  function numberAt(runs, place) {
    for (const run of runs.split(" ")) {
      const [count, number] = run.includes("*") ? run.split("*") : [1, run];
      place -= count;
      if (place < 0) return Number(number);
    }
    return 0;
  }

  /* An outcome, whose message is kept as phrases with places for what the cell is. */
  function outcome(number, capability) {
    const [kind, ...phrases] = data.outcomes[number];
    const message = phrases.map((phrase) => data.phrases[phrase]).join(" ")
      .replaceAll(data.places.backend, chosen.backend)
      .replaceAll(data.places.capability, capability);
    return { ...data.kinds[kind], message };
  }

  /* What stock and patched come to in a cell, with the chosen settings. */
  function found(cell) {
    const { r, g, k } = cell.dataset;
    const name = [chosen.backend, chosen.v1, chosen.length, chosen.flashinfer].join("|");
    const runs = releases[r].rows[name];
    const dtype = axes.dtype.indexOf(chosen.dtype);
    const place = (dtype * axes.kv_cache_dtype.length + Number(k)) * axes.capability.length;
    const capability = axes.capability[g];
    return VARIANTS.map((_, i) =>
      outcome(runs ? numberAt(runs[i], place + Number(g)) : 0, capability));
  }

  /* A verdict's glyph, and the tag of what it rests on. */
  function mark({ verdict, on }) {
    const glyph = element("b", {}, looks[verdict][0]);
    return on ? [glyph, element("i", {}, bases[on][0])] : [glyph];
  }

  function paint() {
    const counted = VARIANTS.map(() => new Map());
    for (const cell of cells) {
      const both = found(cell);
      both.forEach((one, i) => {
        const half = cell.children[i];
        half.dataset.v = one.verdict;
        half.dataset.b = one.on || "";
        half.replaceChildren(...mark(one));
        counted[i].set(one.verdict, (counted[i].get(one.verdict) || 0) + 1);
      });
      const place = cell.getAttribute("aria-label").split(": ")[0];
      const said = both.map(({ verdict, on }, i) =>
        `${VARIANTS[i]} ${verdict}${on ? ` (${on})` : ""}`).join(", ");
      cell.setAttribute("aria-label", `${place}: ${said}`);
    }
    document.getElementById("tally").replaceChildren(...counted.flatMap(tally));
    const words = SETTINGS.map(([axis, name]) => `${name} ${word(axis, chosen[axis])}`);
    document.getElementById("shown").textContent = `Shown: ${words.join(", ")}.`;
    if (open) show(open);
  }

  /* How many of the cells that are shown come to what: a bar, and numbers by group. */
  function tally(counts, i) {
    const bar = element("div", { className: "share", ariaHidden: "true" });
    const groups = new Map();
    for (const [verdict, [, , group]] of Object.entries(looks)) {
      const count = counts.get(verdict);
      if (!count) continue;
      const part = element("i", {});
      part.dataset.v = verdict;
      part.style.flexGrow = count;
      bar.append(part);
      const name = { Runs: verdict, Dies: "die" }[group] || group.toLowerCase();
      groups.set(name, (groups.get(name) || 0) + count);
    }
    const words = [...groups].map(([name, count]) => `${count} ${name}`).join(", ");
    const variant = VARIANTS[i].replace(/^./, (first) => first.toUpperCase());
    return [element("b", {}, variant), bar, element("span", {}, words)];
  }

  /* FlashInfer's presence was tried where it can matter: by default, and for its own backends. */
  function matters(value) {
    const start = `${chosen.backend}|`;
    return releases.some(({ rows }) =>
      Object.keys(rows).some((name) => name.startsWith(start) && name.endsWith(`|${value}`)));
  }

  function choose() {
    const state = new FormData(form);
    for (const [axis] of SETTINGS) chosen[axis] = state.get(axis) || axes[axis][0];
    for (const radio of form.elements.flashinfer) {
      radio.disabled = !matters(radio.value);
      if (radio.disabled && radio.checked) {
        form.elements.flashinfer[0].checked = true;
        chosen.flashinfer = axes.flashinfer[0];
      }
    }
    paint();
  }

  function control([axis, name, kind]) {
    const values = axes[axis];
    if (kind === "select") {
      const options = values.map((value) => element("option", { value }, word(axis, value)));
      const select = element("select", { name: axis }, ...options);
      return element("label", { className: "setting" }, element("span", {}, name), select);
    }
    const radios = values.map((value, i) => {
      const radio = element("input", { type: "radio", name: axis, value, checked: i === 0 });
      return element("label", {}, radio, element("span", {}, word(axis, value)));
    });
    const choices = element("div", { className: "choices" }, ...radios);
    return element("fieldset", { className: "setting" }, element("legend", {}, name), choices);
  }

  function side(variant, { verdict, engine, backend, stage, message, on, known }) {
    const badge = element("span", { className: "v", ariaHidden: "true" }, looks[verdict][0]);
    badge.dataset.v = verdict;
    const list = element("dl", {});
    const facts = {
      engine: engine && engine.toUpperCase(), backend, "ended in": stage, message,
      "known from": on && [`${on}: ${bases[on][1]}`, ...(known ? [known] : [])].join("\n"),
    };
    for (const [term, text] of Object.entries(facts)) {
      if (!text) continue;
      const described = element("dd", { className: term.replace(" ", "-") }, text);
      list.append(element("div", {}, element("dt", {}, term), described));
    }
    const made = element("section", {},
      element("h4", {}, variant, " ", badge, " ", element("b", {}, verdict)),
      element("p", { className: "meaning" }, `${looks[verdict][2]}. ${looks[verdict][1]}`), list);
    made.dataset.variant = variant;
    return made;
  }

  function show(cell) {
    if (open) open.setAttribute("aria-expanded", "false");
    open = cell;
    cell.setAttribute("aria-expanded", "true");
    const { r, g, k } = cell.dataset;
    const capability = axes.capability[g];
    const names = data.gpus[capability];
    const title = `${releases[r].name} on capability ${capability}`;
    const words = SETTINGS.map(([axis, name]) => `${name} ${word(axis, chosen[axis])}`);
    words.unshift(`KV cache ${axes.kv_cache_dtype[k]}`);
    const close = element("button", { type: "button", id: "close", ariaLabel: "Close" }, "×");
    close.addEventListener("click", () => hide(true));
    const head = element("div", { className: "head" },
      element("h3", { id: "detail-title" }, title), close);
    const settings = element("ul", { className: "words" },
      ...words.map((text) => element("li", {}, text)));
    const sides = element("div", { className: "sides" },
      ...found(cell).map((one, i) => side(VARIANTS[i], one)));
    const gpus = element("p", { className: "gpus" }, `Capability ${capability}: `, names.join(", "));
    detail.replaceChildren(head, settings, sides, ...(names.length ? [gpus] : []));
    detail.hidden = false;
    detail.scrollTop = 0;
    // The sheet covers the page's end: what is scrolled to must stop above it.
    const height = `${detail.offsetHeight}px`;
    document.documentElement.style.scrollPaddingBottom = height;
    document.body.style.paddingBottom = height;
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function hide(back) {
    if (!open) return;
    const cell = open;
    cell.setAttribute("aria-expanded", "false");
    open = null;
    detail.hidden = true;
    document.documentElement.style.scrollPaddingBottom = "";
    document.body.style.paddingBottom = "";
    if (back) cell.focus();
  }

  function focus(cell) {
    grid.querySelector('.cell[tabindex="0"]').tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus({ preventScroll: true });
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (open) show(cell);
  }

  /* Where a key leads from a place in the grid, or -1. */
  function target(key, place, whole) {
    const column = place % columns;
    const start = whole ? 0 : place - column;
    const end = whole ? cells.length - 1 : start + columns - 1;
    switch (key) {
      case "ArrowLeft": return column > 0 ? place - 1 : -1;
      case "ArrowRight": return column < columns - 1 ? place + 1 : -1;
      case "ArrowUp": return place - columns;
      case "ArrowDown": return place + columns;
      case "Home": return start;
      case "End": return end;
      default: return -1;
    }
  }

  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell || event.altKey || event.metaKey) return;
    const next = cells[target(event.key, cells.indexOf(cell), event.ctrlKey)];
    const isMove = /^(Arrow|Home|End)/.test(event.key);
    if (isMove) event.preventDefault();
    if (next) focus(next);
  });
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    if (cell === open) {
      hide(false);
    } else {
      open = open || cell;
      focus(cell);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open) hide(true);
  });

  /* Wide tables without anything to focus scroll by keyboard only if they can be focused. */
  function scrollers() {
    for (const box of document.querySelectorAll(".scroller:not(.grid)")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Pages from a file may have no storage: then the choice lasts as long as the page.
  const storage = { get: () => null, set: () => undefined };
  try {
    const local = window.localStorage;
    storage.get = () => local.getItem("theme");
    storage.set = (value) => local.setItem("theme", value);
  } catch { /* as above */ }
  function setTheme(value) {
    const now = value || (dark.matches ? "dark" : "light");
    if (value) document.documentElement.dataset.theme = value;
    theme.textContent = now === "dark" ? "Light" : "Dark";
    theme.setAttribute("aria-label", `${theme.textContent} colours`);
  }
  theme.addEventListener("click", () => {
    const next = theme.textContent.toLowerCase();
    storage.set(next);
    setTheme(next);
  });
  dark.addEventListener("change", () => setTheme(document.documentElement.dataset.theme));

  form.append(...SETTINGS.map(control));
  form.addEventListener("change", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const hidden of document.querySelectorAll(".script")) hidden.hidden = false;
  for (const cell of cells) cell.setAttribute("aria-expanded", "false");
  form.hidden = theme.hidden = document.getElementById("tally").hidden = false;
  detail.setAttribute("aria-live", "polite");
  setTheme(storage.get());
  // On a phone the grid comes first; on paper nothing is folded.
  const legend = document.getElementById("legend");
  legend.open = !matchMedia("(max-width: 40rem)").matches;
  addEventListener("beforeprint", () => { legend.open = true; });
  addEventListener("resize", scrollers);
  scrollers();
  choose();
})();
