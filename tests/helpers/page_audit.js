// What axe calls violations, of the rules that matter on this page; an expression that gives a list
// of lines "rule: element". Names of controls are tested on the browser's accessibility tree.
() => {
  const found = [];
  const say = (rule, node, more = "") =>
    found.push(`${rule}: <${node.localName} id="${node.id}" class="${node.className}"> ${more}`);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex]";

  // ---- structure
  const ids = all("[id]").map((node) => node.id);
  for (const node of all("[id]")) if (ids.filter((id) => id === node.id).length > 1) say("duplicate-id", node);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const node of all(`[${name}]`)) {
      for (const id of node.getAttribute(name).split(" ")) {
        if (!document.getElementById(id)) say("aria-valid-attr-value", node, `${name}=${id}`);
      }
    }
  }
  for (const node of all("[tabindex]")) if (node.tabIndex > 0) say("tabindex", node);
  for (const node of all("[aria-hidden=true]")) {
    if (node.matches(FOCUSABLE) || node.querySelector(FOCUSABLE)) say("aria-hidden-focus", node);
  }
  for (const node of all("ul > :not(li), ol > :not(li)")) say("list", node);
  for (const node of all("caption")) if (!node.textContent.trim()) say("empty-caption", node);
  if (!document.documentElement.lang) say("html-has-lang", document.documentElement);
  if (!document.title) say("document-title", document.documentElement);
  if (all("main").length !== 1) say("landmark-one-main", document.body);
  for (const node of document.body.children) {
    if (!node.matches("header, main, dialog, script")) say("region", node);
  }
  for (const node of all("*").filter(shown)) {
    const style = getComputedStyle(node);
    const scrolls = /auto|scroll/.test(style.overflowX + style.overflowY)
      && (node.scrollWidth > node.clientWidth + 1 || node.scrollHeight > node.clientHeight + 1);
    if (scrolls && node !== document.documentElement && node.localName !== "textarea"
        && !node.matches("[tabindex]") && !node.querySelector(FOCUSABLE)) {
      say("scrollable-region-focusable", node);
    }
  }

  // ---- contrast (WCAG 2.2, 1.4.3)
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
  const behind = (node) => {
    if (!node) return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(node.parentElement));
  };
  const luminance = (c) => {
    const [r, g, b] = c.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(node) || node.closest(":disabled, script, option")) continue;
    texts += 1;
    const style = getComputedStyle(node), ground = behind(node);
    const [high, low] = [over(rgba(style.color), ground), ground].map(luminance).sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    if (ratio < (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5)) {
      say("color-contrast", node, `${ratio.toFixed(2)} of ${walker.currentNode.data.trim().slice(0, 20)}`);
    }
  }
  return { found, texts };
}
