// Tokens coloured by a series of numbers: red above zero, blue below, the strongest at the largest
// value. One tab stop; arrow keys move within. Of the pages of `sarm explain --html`, which hold this
// text inline, and of `sarm dashboard`, which imports it.

const MINUS = "\u2212";
const number = (x) => (x < 0 ? MINUS : "+") + Math.abs(x).toPrecision(4);

/** `spans`: an element a token; `told`: where a token's values are said; `series`: [{name, values}],
 *  a value a token. Shows the first of them; returns show(index). */
export function strip(spans, told, series) {
  let shown = 0;

  function tell(i) {
    const [first, chosen] = [series[0], series[shown]];
    const said = [...new Set([chosen, first])].map((s) => `${s.name} ${number(s.values[i])}`);
    told.textContent =
      `token ${i + 1} of ${spans.length}, ${JSON.stringify(spans[i].textContent)}: ${said.join("; ")}`;
  }

  function move(event, i) {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[i].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  }

  function show(index) {
    shown = index;
    const { values } = series[shown];
    const largest = values.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-30);
    spans.forEach((span, i) => {
      const side = values[i] < 0 ? "--neg" : "--pos";
      span.style.backgroundColor = values[i]
        ? `rgb(var(${side}) / ${(0.6 * Math.abs(values[i])) / largest})` : "";
    });
  }

  spans.forEach((span, i) => {
    span.addEventListener("focus", () => tell(i));
    span.addEventListener("pointerenter", () => tell(i));
    span.addEventListener("keydown", (event) => move(event, i));
  });
  show(0);
  return show;
}
