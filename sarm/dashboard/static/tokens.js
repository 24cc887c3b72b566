// Tokens coloured by a series of numbers, as the pages of `sarm explain --html` show them: red above
// zero, blue below, the strongest at the largest value. One tab stop; arrow keys move within.

import { h, signed } from "./dom.js";

/** `series`: [{name, values}], one value a token. Returns {node, show(index)}. */
export function strip(tokens, series, label) {
  const told = h("output", { "aria-live": "polite" });
  const spans = tokens.map((token, i) => {
    const span = h("span", { tabindex: i ? -1 : 0 }, token);
    span.addEventListener("focus", () => tell(i));
    span.addEventListener("pointerenter", () => tell(i));
    span.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to === undefined || !spans[to]) return;
      event.preventDefault();
      span.tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    });
    return span;
  });
  let shown = 0;

  function tell(i) {
    const { name, values } = series[shown];
    told.textContent =
      `token ${i + 1} of ${tokens.length}, ${JSON.stringify(tokens[i])}: ${name} ${signed(values[i], 4)}`;
  }

  function show(index) {
    shown = index;
    const values = series[shown].values;
    const largest = Math.max(1e-30, ...values.map(Math.abs));
    spans.forEach((span, i) => {
      const side = values[i] < 0 ? "--neg" : "--pos";
      span.style.backgroundColor = values[i]
        ? `rgb(var(${side}) / ${(0.6 * Math.abs(values[i])) / largest})` : "";
    });
  }

  show(0);
  const group = h("div", { class: "tokens", role: "group", "aria-label": `${label}; arrow keys move` }, spans);
  return { node: h("div", {}, group, told), show };
}
