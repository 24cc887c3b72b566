// Features by number, label and words of their contexts; a page of them at a time, sorted by the
// server, so that 65,000 cost a browser as much as 50.

import { $, debounced, featureName, h, percent, signed, table, tell } from "./dom.js";
import { get, latest } from "./api.js";
import * as profile from "./profile.js";
import { strip } from "./tokens.js";

const PAGE = 50;
const NAMES = {
  contribution: "|contribution|", weight: "|weight|", contrast: "|chosen/rejected contrast|",
  frequency: "frequency", mean: "mean activation", max: "largest activation",
  length_corr: "|correlation with length|", markdown_corr: "|correlation with markdown|",
  id: "number (from 0)",
};
const ask = latest((query, signal) => get(`/api/features?${query}`, signal));
let offset = 0;

export function start(about, first) {
  const known = about.orders.filter((name) => name in NAMES)
    .sort((a, b) => Object.keys(NAMES).indexOf(a) - Object.keys(NAMES).indexOf(b));
  $("order").append(...known.map((name) =>
    h("option", { value: name, selected: name === first.order }, NAMES[name])));
  const again = () => { offset = 0; refresh(); };
  $("query").addEventListener("input", debounced(again, 80));
  $("order").addEventListener("change", again);
  $("search").addEventListener("submit", (event) => { event.preventDefault(); again(); });
  $("previous").addEventListener("click", () => turn(-PAGE));
  $("next").addEventListener("click", () => turn(PAGE));
  $("list").addEventListener("keydown", move);
  show(first.features);
}

async function turn(by) {
  offset = Math.max(0, offset + by);
  await refresh();
  $("list").querySelector("button")?.focus();
}

async function refresh() {
  const query = new URLSearchParams(
    { q: $("query").value, order: $("order").value, offset, limit: PAGE });
  try {
    const found = await ask(query);
    if (found) show(found);
  } catch (error) {
    tell($("search-status"), error.message, true);
  }
}

function show(found) {
  const last = found.offset + found.features.length;
  $("list").replaceChildren(...found.features.map(item));
  $("list").start = found.offset + 1;
  $("previous").disabled = !found.offset;
  $("next").disabled = last >= found.total;
  tell($("search-status"),
    found.total ? `${found.offset + 1} to ${last} of ${found.total} features` : "No feature found.");
}

function item(feature) {
  const open = h("button", { type: "button", class: "item", "aria-expanded": "false" },
    h("span", { class: "title" }, featureName(feature.id, feature.label)),
    h("span", { class: "numbers" }, numbers(feature)),
    feature.excerpt ? h("span", { class: "excerpt" }, feature.excerpt) : null);
  const row = h("li", {}, open);
  open.addEventListener("click", async () => {
    if (row.children.length > 1) {
      row.lastChild.remove();
      open.setAttribute("aria-expanded", "false");
      return;
    }
    try {
      row.append(detail(await get(`/api/features/${feature.id}`), feature.label));
      open.setAttribute("aria-expanded", "true");
    } catch (error) {
      tell($("search-status"), error.message, true);
    }
  });
  return row;
}

function numbers(f) {
  const parts = [`weight ${signed(f.weight)}`];
  if (f.frequency !== undefined) {
    parts.push(`contribution ${signed(f.contribution, 4)}`, `in ${percent(f.frequency)} of responses`);
  }
  if (f.contrast !== undefined && f.contrast !== null) parts.push(`contrast ${signed(f.contrast, 2)}`);
  return parts.join(" · ");
}

function detail(found, label) {
  const contexts = found.contexts.map((c) => h("li", {},
    h("p", { class: "excerpt" }, `${c.kind}, activation ${signed(c.activation, 3)}, ${c.source}`),
    strip(c.tokens, [{ name: "activation", values: c.activations }], "Context").node));
  return h("div", { class: "detail" },
    h("button", { type: "button", onclick: () => profile.add(found.id, label, found.weight) },
      `Steer feature ${found.id}`),
    found.labels.map((one) => h("p", {}, `${one.label} (${one.method}) ${one.explanation ?? ""}`)),
    h("div", { class: "scroll" }, table(`Statistics of feature ${found.id}`, ["what", "value"], found.facts)),
    contexts.length ? h("h3", {}, "Contexts") : null,
    h("ul", { class: "plain" }, contexts));
}

/** Arrow keys move between the features of the list. */
function move(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const items = [...$("list").querySelectorAll("button.item")];
  const to = items[items.indexOf(event.target) + by];
  if (!by || !to || !event.target.matches("button.item")) return;
  event.preventDefault();
  to.focus();
}
