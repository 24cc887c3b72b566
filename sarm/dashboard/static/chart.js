// A histogram before (filled) and after (outline), with the same numbers as a table.

import { h, signed, table } from "./dom.js";

const WIDTH = 400, HEIGHT = 160;

export function histogram({ edges, before, after }, mean, summary) {
  const low = edges[0], span = edges[edges.length - 1] - low || 1;
  const most = Math.max(1, ...before, ...after);
  const x = (value) => ((value - low) / span) * WIDTH;
  const y = (count) => HEIGHT - (count / most) * (HEIGHT - 4);
  const bars = before.map((count, i) => h("svg:rect", {
    class: "before", x: x(edges[i]), width: x(edges[i + 1]) - x(edges[i]),
    y: y(count), height: HEIGHT - y(count),
  }));
  const outline = after
    .map((count, i) => `L${x(edges[i])} ${y(count)}L${x(edges[i + 1])} ${y(count)}`).join("");
  const line = (value, name) => h("svg:line", { class: name, x1: x(value), x2: x(value), y1: 0, y2: HEIGHT });
  return h(
    "figure", { class: "row" },
    h("svg:svg", { class: "histogram", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary },
      bars,
      h("svg:path", { class: "after", d: `M0 ${HEIGHT}${outline}L${WIDTH} ${HEIGHT}` }),
      line(mean.before, "mean-before"), line(mean.after, "mean-after")),
    h("figcaption", { class: "legend" },
      h("div", { class: "axis", "aria-hidden": "true" },
        h("span", {}, signed(low, 2)), h("span", {}, "reward"), h("span", {}, signed(low + span, 2))),
      h("p", { class: "key" }, h("i", { class: "before" }), "before", h("i", { class: "after" }),
        "after; dashed: means")),
    numbers(edges, before, after),
  );
}

function numbers(edges, before, after) {
  const details = h("details", {}, h("summary", {}, "The same as a table"));
  details.addEventListener("toggle", () => { // made when it is wanted: sliders redraw often
    if (details.open && details.children.length === 1) {
      details.append(h("div", { class: "scroll" }, table(
        "Responses by reward", ["reward from", "to", "before", "after"],
        before.map((count, i) => [signed(edges[i]), signed(edges[i + 1]), `${count}`, `${after[i]}`]),
      )));
    }
  });
  return details;
}
