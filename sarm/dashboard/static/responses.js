// A prompt and responses: rewards, the features behind them, their tokens, and what decided.

import { $, featureName, h, signed, table, tell } from "./dom.js";
import { latest, post } from "./api.js";
import * as profile from "./profile.js";
import { strip } from "./tokens.js";

const SHOWN = 12, MOST = 8;
const score = latest((body, signal) => post("/api/score", body, signal));
let about;
let results = []; // of the last scoring: {response, node, repaint}

export function start(found) {
  about = found;
  addAnswer();
  addAnswer();
  $("add").addEventListener("click", () => addAnswer().focus());
  $("score").addEventListener("submit", submit);
  profile.subscribe(() => results.forEach((one) => one.repaint()));
}

function addAnswer() {
  const count = $("answers").children.length + 1;
  const id = `answer-${count}`;
  const area = h("textarea", { id, rows: 4, required: count === 1 });
  $("answers").append(h("div", {}, h("label", { for: id }, `Response ${count}`), area));
  $("add").disabled = count === MOST;
  return area;
}

async function submit(event) {
  event.preventDefault();
  const prompt = $("prompt").value;
  const responses = [...$("answers").querySelectorAll("textarea")].map((a) => a.value).filter(Boolean);
  tell($("score-status"), "Scoring…");
  try {
    const answer = await score({ prompt, responses });
    if (!answer) return;
    show(prompt, responses, answer.responses);
    const rewards = answer.responses.map((r, i) => `response ${i + 1}: ${signed(r.reward)}`);
    tell($("score-status"), `Rewards: ${rewards.join(", ")}`);
  } catch (error) {
    tell($("score-status"), error.message, true);
  }
}

function show(prompt, texts, explanations) {
  results = explanations.map((found, i) => card(prompt, texts[i], found, i));
  const parts = results.map((one) => one.node);
  if (explanations.length > 1) parts.unshift(comparison(explanations));
  $("results").replaceChildren(...parts);
}

// ---- one response ---------------------------------------------------------------------------

function card(prompt, text, found, at) {
  const reward = h("p", { class: "reward" });
  const tokens = h("div");
  const list = h("div", { class: "scroll" });
  const largest = Math.max(1e-30, ...found.contributions.map((c) => Math.abs(c.value)));
  let all = false, coloured = null;

  const rows = () => found.contributions.slice(0, all ? undefined : SHOWN).map((c) => [
    named(c),
    h("span", { class: "wide" }, bar(c.value, largest)),
    signed(c.value, 4),
    h("button", {
      type: "button", "data-tokens": c.feature, "aria-pressed": `${coloured === c.feature}`,
      "aria-label": `Show feature ${c.feature} on the tokens`, onclick: () => colour(c.feature),
    }, "tokens"),
  ]);

  function repaint() {
    const steered = steeredReward(found);
    reward.textContent = `Reward ${signed(found.reward, 4)}` +
      (steered === null ? "" : `, steered ${signed(steered, 4)}`);
  }

  function draw() {
    const left = found.contributions.length - SHOWN;
    const rest = all ? found.rest : found.rest + sum(found.contributions.slice(SHOWN));
    const n = (all ? 0 : Math.max(0, left)) + found.n_rest;
    const lines = rows();
    if (n) lines.push([`${n} others`, "", signed(rest, 4), ""]);
    if (found.bias) lines.push(["gate", "", signed(found.bias, 4), ""]);
    const grid = table(
      `The sum of all contributions is ${signed(found.sum, 6)}, the reward ${signed(found.reward, 6)}.`,
      ["feature", "", "contribution", "show"], lines, ["sum", "", signed(found.sum, 4), ""],
    );
    grid.className = "bars";
    list.replaceChildren(grid, left > 0 ? h("button", {
      type: "button", "aria-expanded": `${all}`, onclick: () => { all = !all; draw(); },
    }, all ? "Only the largest" : `All ${found.contributions.length}`) : "");
  }

  async function colour(feature) {
    coloured = feature;
    list.querySelectorAll("[data-tokens]").forEach((button) =>
      button.setAttribute("aria-pressed", `${Number(button.dataset.tokens) === feature}`));
    try {
      if (!tokens.traced) {
        tokens.replaceChildren(h("p", { role: "status" }, "Reading the reward at every token…"));
        tokens.traced = await traced(prompt, text, found.contributions.length);
        tokens.replaceChildren(tokens.traced.node);
      }
      tokens.traced.choose(coloured);
    } catch (error) {
      tokens.replaceChildren(h("p", { role: "status", class: "bad" }, error.message));
    }
  }

  draw();
  repaint();
  const cut = found.dropped ? `, ${found.dropped} cut from the beginning` : "";
  const node = h("article", { class: "card", "aria-label": `Response ${at + 1}` },
    h("h3", {}, `Response ${at + 1}`), reward, h("p", {}, `${found.n_tokens} tokens${cut}`),
    tokens, list);
  return { node, repaint };
}

/** Tokens of a response with a choice of what colours them. */
async function traced(prompt, response, active) {
  const top = Math.max(1, Math.min(64, active));
  const found = await post("/api/trace", { prompt, response, top });
  const series = [{ name: "reward if the turn ended here", values: found.rewards }];
  found.features.forEach((f) =>
    series.push({ name: featureName(f.feature, f.label), values: f.activations }));
  const tokens = strip(found.tokens, series, "Tokens of the response");
  const choice = h("select", {
    "aria-label": "Colour tokens by",
    onchange: () => tokens.show(Number(choice.value)),
  }, series.map((one, i) => h("option", { value: i }, one.name)));
  return {
    node: h("div", {}, choice, tokens.node),
    choose(feature) {
      const at = found.features.findIndex((f) => f.feature === feature) + 1;
      choice.value = `${at}`;
      tokens.show(at);
    },
  };
}

function named(c) {
  return h("button", {
    type: "button", class: "name", "aria-label": `Steer ${featureName(c.feature, c.label)}`,
    onclick: () => profile.add(c.feature, c.label, c.weight),
  }, featureName(c.feature, c.label));
}

/** A bar from the middle: right and red above zero, left and blue below. */
function bar(value, largest) {
  const width = (48 * Math.abs(value)) / largest;
  return h("svg:svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    h("svg:rect", {
      class: value < 0 ? "negative" : "positive", x: value < 0 ? 50 - width : 50, y: 0, width, height: 10,
    }),
    h("svg:line", { class: "zero", x1: 50, x2: 50, y1: 0, y2: 10 }));
}

const sum = (contributions) => contributions.reduce((total, c) => total + c.value, 0);

/** The reward under the sliders, exact where all active features are listed; null: unknown. */
function steeredReward(found) {
  if (!about.linear || !profile.linear() || found.n_rest || !profile.entries().length) return null;
  return found.reward + found.contributions.reduce(
    (total, c) => total + (profile.factor(c.feature) - 1) * c.value, 0);
}

// ---- two responses --------------------------------------------------------------------------

function comparison(explanations) {
  const body = h("div", { class: "scroll" });
  const pick = (id, label, chosen) => {
    const select = h("select", { id, onchange: draw },
      explanations.map((_, i) => h("option", { value: i, selected: i === chosen }, `Response ${i + 1}`)));
    return [h("label", { for: id }, label), select];
  };
  const best = explanations[1].reward > explanations[0].reward ? 1 : 0;
  const [chosenLabel, chosen] = pick("chosen", "Chosen", best);
  const [rejectedLabel, rejected] = pick("rejected", "Rejected", 1 - best);

  function draw() {
    const sides = [explanations[chosen.value], explanations[rejected.value]];
    const margin = sides[0].reward - sides[1].reward;
    const rows = differences(...sides);
    const rest = rows.slice(SHOWN).reduce((total, r) => total + r.value, 0) + sides[0].rest - sides[1].rest
      + sides[0].bias - sides[1].bias;
    const largest = Math.max(1e-30, ...rows.map((r) => Math.abs(r.value)));
    const lines = rows.slice(0, SHOWN).map((r) => [
      named(r), h("span", { class: "wide" }, bar(r.value, largest)),
      signed(r.chosen), signed(r.rejected), signed(r.value, 4)]);
    if (rows.length > SHOWN) lines.push([`${rows.length - SHOWN} others`, "", "", "", signed(rest, 4)]);
    const grid = table(`What decided: the margin is ${signed(margin, 4)}.`,
      ["feature", "", "chosen", "rejected", "difference"], lines,
      ["sum", "", signed(sides[0].reward), signed(sides[1].reward), signed(margin, 4)]);
    grid.className = "bars";
    body.replaceChildren(grid);
  }

  draw();
  return h("article", { class: "card", "aria-label": "Comparison" },
    h("h3", {}, "Chosen against rejected"),
    h("div", { class: "row" }, chosenLabel, chosen, rejectedLabel, rejected), body);
}

function differences(chosen, rejected) {
  const rows = new Map();
  for (const [side, name] of [[chosen, "chosen"], [rejected, "rejected"]]) {
    for (const { feature, label, weight, value } of side.contributions) {
      const row = rows.get(feature) ?? { feature, label, weight, chosen: 0, rejected: 0 };
      rows.set(feature, { ...row, [name]: value });
    }
  }
  return [...rows.values()].map((r) => ({ ...r, value: r.chosen - r.rejected }))
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value) || a.feature - b.feature);
}
