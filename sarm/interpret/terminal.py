"""Explanations as terminal tables. What models and users wrote is shown literally, never obeyed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sarm.interpret.attribution import Comparison
from sarm.interpret.trace import Trace
from sarm.scorer import Explanation

POSITIVE, NEGATIVE = (178, 24, 43), (33, 102, 172)


def explanation_table(explanation: Explanation) -> Table:
    """Feature, activation, weight and contribution; the last rows sum to the reward."""
    cut = f", {explanation.dropped} cut from the left" if explanation.dropped else ""
    labelled = any(c.label for c in explanation.contributions)
    table = Table(
        "feature",
        "activation",
        "x weight",
        "= contribution",
        *(["label"] if labelled else []),
        title=f"reward {explanation.reward:+.6f}  ({explanation.n_tokens} tokens{cut})",
        box=None,
    )
    for c in explanation.contributions:
        cells = (str(c.feature), f"{c.activation:+.4f}", f"{c.weight:+.6f}", f"{c.value:+.6f}")
        table.add_row(*cells, literal(c.label or ""))
    if explanation.n_rest:
        table.add_row(f"{explanation.n_rest} others", "", "", f"{explanation.rest:+.6f}")
    table.add_row("bias", "", "", f"{explanation.bias:+.6f}")
    total = explanation.bias + explanation.rest + sum(c.value for c in explanation.contributions)
    # rounded to fp32 as the reward is: the last printed digit would differ now and then
    table.add_row("sum", "", "", f"{np.float32(total):+.6f}", style="bold")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Feature and its contribution on either side; the differences sum to the margin."""
    labelled = any(d.label for d in comparison.differences)
    table = Table(
        "feature",
        "first",
        "second",
        "difference",
        *(["label"] if labelled else []),
        title=f"margin {comparison.margin:+.6f} = {comparison.chosen.reward:+.6f} - "
        f"({comparison.rejected.reward:+.6f})",
        box=None,
    )
    for d in comparison.differences:
        cells = (str(d.feature), f"{d.chosen:+.6f}", f"{d.rejected:+.6f}", f"{d.value:+.6f}")
        table.add_row(*cells, literal(d.label or ""))
    if comparison.n_rest:
        table.add_row(f"{comparison.n_rest} others", "", "", f"{comparison.rest:+.6f}")
    total = comparison.rest + sum(d.value for d in comparison.differences)
    table.add_row("sum", "", "", f"{total:+.6f}", style="bold")
    return table


def trace_text(trace: Trace) -> Text:
    """The response coloured by its reward at each token, then by each feature."""
    what = "reward if the turn ended here" if trace.reading == "ended" else "reward read here"
    text = Text()
    for name, values in [
        (what, trace.rewards),
        *((f"feature {f.feature} {f.label or ''}", f.activations) for f in trace.features),
    ]:
        low, high = min(values), max(values)
        text.append(literal(name).append(f"  {low:+.4f} to {high:+.4f}\n", style="dim"))
        text.append(coloured(trace.tokens, values)).append("\n\n")
    return text


def coloured(tokens: Sequence[str], values: Sequence[float]) -> Text:
    """Tokens on a background that is the stronger the larger their value: red +, blue -."""
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    text = Text()
    for token, value in zip(tokens, values, strict=True):
        share = abs(value) / largest
        if share < 0.05:
            text.append(literal(token))
            continue
        full = POSITIVE if value > 0 else NEGATIVE
        r, g, b = (round(255 + share * (c - 255)) for c in full)
        ink = "white" if share > 0.5 else "black"
        text.append(literal(token).plain, Style(color=ink, bgcolor=f"rgb({r},{g},{b})"))
    return text


def literal(text: str) -> Text:
    """Text without markup, its control characters (escape sequences, bidi marks) made visible."""
    shown = (
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\u{ord(c):04x}"
        for c in text
    )
    return Text("".join(shown))
