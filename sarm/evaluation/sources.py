"""Benchmark files narrowed to a part: `FILE#1/2` by prompts, `FILE#source=rmb/*` by a field.

What one command finds must be judged on other prompts. Parts are drawn by a hash of the prompt, so
part 1/2 and part 2/2 of a file share no prompt, in this run and in any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from sarm.data import read_preferences
from sarm.errors import InputError
from sarm.evaluation import benchmarks
from sarm.evaluation.metrics import Benchmark, Item


def read_suite(
    preferences: Sequence[str] | None = None,
    rm_bench: Sequence[str] | None = None,
    reward_bench_2: Sequence[str] | None = None,
) -> list[Benchmark]:
    """One benchmark for each source, which may be narrowed; errors as in `benchmarks`.

    Raises:
        InputError: a part that is not I/N, a field that is no preference row's, or nothing left.
    """
    suite = [_narrowed(benchmarks.preferences, source) for source in preferences or []]
    suite += [_narrowed(benchmarks.rm_bench, source) for source in rm_bench or []]
    suite += [_narrowed(benchmarks.reward_bench_2, source) for source in reward_bench_2 or []]
    names = [_title(one) for one in suite]
    return [
        replace(one, name=name if names.count(name) == 1 else one.source)
        for one, name in zip(suite, names, strict=True)
    ]


def part_of(group: str, parts: int) -> int:
    """Which of `parts` parts a prompt belongs to, from 1."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % parts + 1


def split_prompts(benchmark: Benchmark, parts: int) -> list[Benchmark]:
    """A benchmark in parts that share no prompt, as `#I/N` draws them.

    Raises:
        InputError: a part is left without items.
    """
    out = []
    for part in range(1, parts + 1):
        items = [item for item in benchmark.items if part_of(item.group, parts) == part]
        if not items:
            raise InputError(f"{benchmark.source}: too few prompts for {parts} parts")
        out.append(replace(benchmark, name=f"{benchmark.name} ({part}/{parts})", items=items))
    return out


def _narrowed(read: Callable[..., Benchmark], source: str) -> Benchmark:
    path, mark, wish = source.rpartition("#")
    if not mark or Path(source).exists():
        return read(source)
    found = read(path)
    items: list[Item] = found.items
    for term in wish.split(","):
        if match := re.fullmatch(r"(\d+)/(\d+)", term):
            part, parts = map(int, match.groups())
            if not 1 <= part <= parts:
                raise InputError(f"{source}: part {part} of {parts}; expected 1 to {parts}")
            items = [item for item in items if part_of(item.group, parts) == part]
        elif "=" in term and read is benchmarks.preferences:
            items = _matching(items, path, *term.split("=", 1))
        else:
            raise InputError(
                f"{source}: expected #I/N (a part of the prompts) or, for preferences, "
                f"#FIELD=PATTERN; got {term!r}"
            )
    if not items:
        raise InputError(f"{source}: no items left of {len(found.items)}")
    return replace(found, items=items, source=source)


def _matching(items: list[Item], path: str, field: str, pattern: str) -> list[Item]:
    values = {pair.where: pair.extra.get(field) for pair in read_preferences(path)}
    if not any(value is not None for value in values.values()):
        raise InputError(f"{path}: no row has a field {field!r}")
    return [item for item in items if fnmatchcase(str(values[item.where]), pattern)]


def _title(benchmark: Benchmark) -> str:
    """RM-Bench's and RewardBench 2's names do not tell files apart; their parts do."""
    parts = list(dict.fromkeys(item.part for item in benchmark.items if item.part))
    name = " ".join([benchmark.name, *parts]) if len(parts) == 1 else benchmark.name
    wish = benchmark.source.rpartition("#")[2] if "#" in benchmark.source else ""
    return f"{name} ({wish})" if wish else name
