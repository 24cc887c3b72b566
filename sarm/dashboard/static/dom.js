// Elements, and numbers as people read them. Text enters the page here as text nodes only: what a
// model or a user wrote is never parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("p", {class: "bad", onclick: f}, "text", child); "svg:rect" is of SVG. */
export function h(tag, fields = {}, ...children) {
  const svg = tag.startsWith("svg:");
  const node = svg ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const $ = (id) => document.getElementById(id);

/** "+1.234" or "−0.050". */
export function signed(x, digits = 3) {
  return (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
}

export const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;

export const featureName = (id, label) => (label ? `${id}: ${label}` : `feature ${id}`);

/** Say something in a live region; errors are marked as such. */
export function tell(region, text, bad = false) {
  region.textContent = text;
  region.classList.toggle("bad", bad);
}

/** Calls `call` once, `ms` after the last time it was asked. */
export function debounced(call, ms) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), ms);
  };
}

/** A table; the first cell of a row is its header. Cells are strings or nodes. */
export function table(caption, columns, rows, foot = null) {
  const row = ([first, ...rest]) =>
    h("tr", {}, h("th", { scope: "row" }, first), rest.map((cell) => h("td", {}, cell)));
  return h(
    "table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map(row)),
    foot ? h("tfoot", {}, row(foot)) : null,
  );
}
