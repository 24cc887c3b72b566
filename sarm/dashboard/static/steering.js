// Sliders, and what they do to an evaluation set while they move.

import { $, debounced, featureName, h, percent, signed, table, tell } from "./dom.js";
import { get, latest, post } from "./api.js";
import { histogram } from "./chart.js";
import * as profile from "./profile.js";

// a slider fires at every pixel; the server answers in milliseconds, a screen draws in 16
const WAIT_MS = 30;
const ask = latest((body, signal) => post("/api/shift", body, signal));
let set = 0;

export function start(about, first) {
  sets(about.sets);
  const soon = debounced(refresh, WAIT_MS);
  profile.subscribe((kind) => {
    if (kind === "list") draw();
    if (about.sets.length) soon();
  });
  if (first.shift) show(first.shift);
  else tell($("shift-status"), "No evaluation set: start with --set FILE to see a distribution move.");
  $("add-feature").addEventListener("submit", addByNumber);
  $("reset-all").addEventListener("click", () => profile.clear());
}

function sets(found) {
  if (found.length < 2) return;
  const choice = h("select", { id: "set", onchange: () => { set = Number(choice.value); refresh(); } },
    found.map((one, i) => h("option", { value: i }, `${one.name} (${one.responses})`)));
  $("sets").append(h("label", { for: "set" }, "Evaluation set"), choice);
}

async function refresh() {
  try {
    const found = await ask({ profile: profile.fields(), set });
    if (found) show(found);
  } catch (error) {
    tell($("shift-status"), error.message, true);
  }
}

function show(found) {
  const { shift, accuracies, mean } = found;
  const first = accuracies[0];
  const summary = `${found.set}: mean reward moves by ${signed(shift.all)} sd`;
  const open = $("chart").querySelector("details")?.open;
  $("chart").replaceChildren(histogram(found.histogram, mean, `Histogram of rewards. ${summary}`));
  if (open) $("chart").querySelector("details").open = true;
  tell($("shift-status"), `${summary} (chosen ${signed(shift.chosen)}, rejected ` +
    `${signed(shift.rejected)}); ${first.name} ${percent(first.before)} → ${percent(first.after)}; ` +
    `${percent(found.order_changed)} of pairs change their order.`);
  $("accuracies").replaceChildren(table("Ranking accuracy", ["measure", "before", "after", "change"],
    accuracies.map((a) => [a.name, percent(a.before), percent(a.after),
      signed(100 * (a.after - a.before), 1)])));
}

// ---- sliders --------------------------------------------------------------------------------

async function addByNumber(event) {
  event.preventDefault();
  const text = $("feature-number").value.trim();
  try {
    const found = await get(`/api/features/${encodeURIComponent(text)}`);
    profile.add(found.id, found.label, found.weight);
    $("feature-number").value = "";
  } catch (error) {
    tell($("shift-status"), error.message, true);
  }
}

function draw() {
  const had = new Set([...$("sliders").children].map((node) => Number(node.dataset.feature)));
  for (const node of [...$("sliders").children]) {
    if (!profile.has(Number(node.dataset.feature))) node.remove();
  }
  for (const [feature, entry] of profile.entries()) {
    if (!had.has(feature)) $("sliders").append(slider(feature, entry));
  }
}

/** What a file asks of a feature beyond a factor of its weight. */
const clamped = ({ clamp }) =>
  clamp ? `, activation clamped to ${clamp.map((x) => x ?? "∞").join(" … ")}` : "";

function slider(feature, { label, weight, more }) {
  const id = `slider-${feature}`;
  const shown = h("span");
  const input = h("input", {
    type: "range", id, min: Math.min(profile.LOW, profile.factor(feature)),
    max: Math.max(profile.HIGH, profile.factor(feature)), step: 0.05, value: 1,
    oninput: () => profile.set(feature, Number(input.value)),
  });
  function paint() {
    const factor = profile.factor(feature);
    if (Number(input.value) !== factor) input.value = factor;
    const text = factor === 0 ? "ablated" : `times ${factor.toFixed(2)}`;
    input.setAttribute("aria-valuetext", text);
    shown.textContent = ` ${text}, weight ${signed(weight * factor + (more.add ?? 0))}${clamped(more)}`;
  }
  const button = (name, call) =>
    h("button", { type: "button", "aria-label": `${name} feature ${feature}`, onclick: call }, name);
  const node = h("li", { "data-feature": feature },
    h("label", { for: id }, featureName(feature, label)), shown, input,
    h("div", { class: "row" },
      button("Ablate", () => profile.set(feature, 0)),
      button("Reset", () => profile.set(feature, 1)),
      button("Remove", () => { profile.remove(feature); $("feature-number").focus(); })));
  profile.subscribe(() => { if (node.isConnected) paint(); });
  paint();
  return node;
}
