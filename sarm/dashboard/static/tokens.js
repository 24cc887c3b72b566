// Tokens coloured by one of several series; the colours and keys are those of `sarm explain --html`.

import { h } from "./dom.js";
import { strip as colour } from "./strip.js";

/** `series`: [{name, values}], one value a token. Returns {node, show(index)}. */
export function strip(tokens, series, label) {
  const told = h("output", { "aria-live": "polite" });
  const spans = tokens.map((token, i) => h("span", { tabindex: i ? -1 : 0 }, token));
  const group = h("div", { class: "tokens", role: "group", "aria-label": `${label}; arrow keys move` }, spans);
  return { node: h("div", {}, group, told), show: colour(spans, told, series) };
}
