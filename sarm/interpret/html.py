"""Explanations as a page of their own: one file, no request to any host, usable by keyboard.

Everything a model or a user wrote is escaped, and a content security policy names the hashes of the
page's own style and script: markup that got through would still not run or load anything. Without
JavaScript the tables remain.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from sarm.explanation import Explanation
from sarm.interpret.attribution import Comparison
from sarm.interpret.trace import Trace

if TYPE_CHECKING:
    from sarm.features.store import Context, Feature, Label

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #c8c8d0; --pos: 178 24 43;
  --neg: 33 102 172; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --paper: #16161a; --line: #44444c; --pos: 244 109 92;
    --neg: 92 160 224; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--line); }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tfoot td, tfoot th { font-weight: bold; }
fieldset { border: 1px solid var(--line); margin: 1rem 0; } label { margin-right: 1rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  padding: .6rem; font-family: ui-monospace, monospace; }
.tokens span:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
output { display: block; min-height: 3em; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
"""

#: A module: strip.js as it is, and what finds the strips of a page.
SCRIPT = (
    files("sarm.interpret").joinpath("strip.js").read_text("utf-8")
    + """
const strips = JSON.parse(document.getElementById("strips").textContent);
document.querySelectorAll("section.strip").forEach((section, at) => {
  const show = strip(
    [...section.querySelectorAll(".tokens span")], section.querySelector("output"), strips[at]);
  section.querySelectorAll("input").forEach((input) =>
    input.addEventListener("change", () => show(Number(input.value))));
});
"""
)


@dataclass(frozen=True)
class Series:
    """A value for every token of a strip, and what it is."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Strip:
    """Tokens that are coloured by one of several series."""

    title: str
    tokens: Sequence[str]
    series: Sequence[Series]


def explanation_page(explanation: Explanation) -> str:
    """The contributions of one response."""
    title = f"Reward {explanation.reward:+.6f}"
    return _page(title, _contributions(explanation))


def trace_page(trace: Trace) -> str:
    """A response coloured by its reward or a feature's activation at each token, and the sum."""
    what = "reward if the turn ended here" if trace.reading == "ended" else "reward read here"
    series = [Series(what, trace.rewards)]
    series += [Series(_name(f.feature, f.label), f.activations) for f in trace.features]
    title = f"Reward {trace.explanation.reward:+.6f}"
    strip = Strip("Along the response", trace.tokens, series)
    return _page(title, _contributions(trace.explanation), [strip])


def comparison_page(comparison: Comparison) -> str:
    """What decided between two responses."""
    first, second = comparison.chosen.reward, comparison.rejected.reward
    rows = [
        (str(d.feature), d.label or "", f"{d.chosen:+.6f}", f"{d.rejected:+.6f}", f"{d.value:+.6f}")
        for d in comparison.differences
    ]
    if comparison.n_rest:
        rows.append((f"{comparison.n_rest} others", "", "", "", f"{comparison.rest:+.6f}"))
    total = ("sum", "", f"{first:+.6f}", f"{second:+.6f}", f"{comparison.margin:+.6f}")
    columns = ("feature", "label", "first", "second", "difference")
    return _page(f"Margin {comparison.margin:+.6f}", _table(columns, rows, total))


def feature_page(feature: Feature, labels: Sequence[Label], contexts: Sequence[Context]) -> str:
    """One feature of a database with its contexts."""
    rows = [(name, value) for name, value in facts(feature)]
    named = "".join(
        f"<p><strong>{escape(x.label)}</strong> ({escape(x.method)}) "
        f"{escape(x.explanation or '')}</p>"
        for x in labels
    )
    strips = [
        Strip(
            f"{c.kind} {i}: {c.activation:+.4f}, {c.source}",
            c.tokens,
            [Series("activation", c.activations)],
        )
        for i, c in enumerate(contexts, 1)
    ]
    return _page(f"Feature {feature.id}", named + _table(("", "value"), rows), strips)


def facts(feature: Feature) -> list[tuple[str, str]]:
    """(name, value) of a feature's statistics, as shown to people."""
    found = [
        ("active in", f"{feature.rows} responses ({100 * feature.frequency:.2f} %)"),
        ("activation where active", f"mean {feature.mean:.4f}, largest {feature.max:.4f}"),
        ("head weight", f"{feature.weight:+.6f}"),
        ("contribution, mean over responses", f"{feature.contribution:+.6f}"),
    ]
    for name, value in (
        ("contrast of chosen and rejected", feature.contrast),
        ("correlation with length", feature.length_corr),
        ("correlation with markdown", feature.markdown_corr),
    ):
        found.append((name, "unknown" if value is None else f"{value:+.3f}"))
    return found


def _contributions(explanation: Explanation) -> str:
    rows = [
        (
            str(c.feature),
            c.label or "",
            f"{c.activation:+.4f}",
            f"{c.weight:+.6f}",
            f"{c.value:+.6f}",
        )
        for c in explanation.contributions
    ]
    if explanation.n_rest:
        rows.append((f"{explanation.n_rest} others", "", "", "", f"{explanation.rest:+.6f}"))
    total = ("sum", "", "", "", f"{explanation.reward:+.6f}")
    columns = ("feature", "label", "activation", "× weight", "= contribution")
    cut = f", {explanation.dropped} cut from the left" if explanation.dropped else ""
    return f"<p>{explanation.n_tokens} tokens{cut}</p>" + _table(columns, rows, total)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None
) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(_row(row) for row in rows)
    foot = f"<tfoot>{_row(total)}</tfoot>" if total else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}'
        "</table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    first, *rest = (escape(cell) for cell in cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>'


def _strip(strip: Strip, number: int) -> str:
    choices = "".join(
        f'<label><input type="radio" name="series-{number}" value="{i}"'
        f"{' checked' if i == 0 else ''}> {escape(s.name)}</label>"
        for i, s in enumerate(strip.series)
    )
    picker = f"<fieldset><legend>Colour by</legend>{choices}</fieldset>"
    spans = "".join(
        f'<span tabindex="{0 if i == 0 else -1}">{escape(token)}</span>'
        for i, token in enumerate(strip.tokens)
    )
    return (
        f'<section class="strip"><h2>{escape(strip.title)}</h2>'
        f"{picker if len(strip.series) > 1 else ''}"
        f'<div class="tokens" role="group" aria-label="tokens; move with the arrow keys">{spans}'
        '</div><output aria-live="polite"></output></section>'
    )


def _page(title: str, body: str, strips: Sequence[Strip] = ()) -> str:
    data = [[{"name": s.name, "values": list(s.values)} for s in x.series] for x in strips]
    policy = (
        f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = "".join(_strip(strip, i) for i, strip in enumerate(strips))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{sections}{body}</main>"
        f'<script type="application/json" id="strips">{_json(data)}</script>'
        f'<script type="module">{SCRIPT}</script></body></html>\n'
    )


def _json(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _name(feature: int, label: str | None) -> str:
    return f"{feature}: {label}" if label else f"feature {feature}"
