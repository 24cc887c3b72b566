"""The harness can fail: kernels with one mistake each, all of which it must find.

A mutant is made by replacing text in a copy of csrc; only the changed kernel is compiled again.
"""

import re
import shutil
from typing import NamedTuple

import emulator_build
import pytest

CUDA = emulator_build.CSRC / "cuda"
# Kernel files that include a header; one is enough to compile.
INCLUDED_BY = {"select.h": "topk_tile.cu", "row_slice.h": "gather_sum.cu"}
BARRIER = "__syncthreads();"


class Mutant(NamedTuple):
    """`find` occurs once (or `occurrence` says which) in csrc/cuda/`file`."""

    name: str
    file: str
    find: str
    replace: str
    report: str  # what the harness says, as a regular expression
    occurrence: int = 0
    sanitizer: str = "address"


def barriers():
    """Every barrier of every kernel, removed one by one."""
    for path in sorted(CUDA.iterdir()):
        for i, _ in enumerate(re.finditer(re.escape(BARRIER), path.read_text())):
            yield Mutant(
                f"barrier {i} of {path.name}", path.name, BARRIER, ";", "", i, sanitizer="thread"
            )


MUTANTS = [
    Mutant(
        "overflow check dropped",
        "topk_tile.cu",
        "__syncthreads_or(end > capacity - kChunk) != 0",
        "__syncthreads_or(false) != 0",
        "use-after-poison|heap-buffer-overflow",
    ),
    Mutant(
        "overflow noticed too late",
        "topk_tile.cu",
        "end > capacity - kChunk",
        "end > capacity",
        "use-after-poison|heap-buffer-overflow",
    ),
    Mutant(
        "one column too many",
        "row_slice.h",
        "column(kVector ? 0 : e) < D",
        "column(kVector ? 0 : e) <= D",
        "heap-buffer-overflow|element",
    ),
    Mutant(
        "load not held back at the row's end",
        "row_slice.h",
        "row + min(column(0), D - kWidth)",
        "row + column(0)",
        "heap-buffer-overflow",
    ),
    Mutant(
        "load held back one element too late",
        "row_slice.h",
        "D - kWidth)",
        "D - kWidth + 1)",
        "heap-buffer-overflow|misaligned",
    ),
    Mutant(
        "vector stored beyond the row",
        "row_slice.h",
        "if (!inside(0)) return;",
        "",
        "heap-buffer-overflow|element",
    ),
    Mutant(
        "one latent too many read",
        "topk_tile.cu",
        "column + i < width ? pre",
        "column + i <= width ? pre",
        "heap-buffer-overflow",
    ),
    Mutant(
        "one task too many",
        "gather_dot.cu",
        "task < tasks;",
        "task <= tasks;",
        "heap-buffer-overflow|element",
    ),
    Mutant(
        "tie broken by the highest index",
        "select.h",
        "(0xFFFFFFFFu - index)",
        "index",
        "is latent",
    ),
    Mutant(
        "sum of the ranges before forgotten",
        "gather_dot.cu",
        "begin == 0 ? total",
        "true ? total",
        "element",
    ),
    Mutant(
        "last piece of a long segment forgotten",
        "scatter_outer.cu",
        "p < s.piece[latent + 1]",
        "p + 1 < s.piece[latent + 1]",
        "element",
    ),
    Mutant(
        "lanes part before a warp intrinsic",
        "sparse_value.cu",
        "const float total = warp_sum(sum[h]);",
        "if (lane == 0) continue;\n      const float total = warp_sum(sum[h]);",
        "the lanes of a mask meet in different|deadlock|has ended",
    ),
    Mutant(
        "a barrier that one warp does not reach",
        "topk_tile.cu",
        "    uint32_t bound = s.bound;",
        "    uint32_t bound = s.bound;\n    if (thread >= kWarp) __syncthreads();",
        "divergent barriers|deadlock",
    ),
    *barriers(),
]


def mutate(mutant, csrc):
    """Copy csrc and make the mistake; returns the kernel file to compile."""
    shutil.copytree(emulator_build.CSRC, csrc)
    path = csrc / "cuda" / mutant.file
    text = path.read_text()
    places = [m.start() for m in re.finditer(re.escape(mutant.find), text)]
    assert len(places) > mutant.occurrence, f"{mutant.find!r} is not in {mutant.file}"
    if mutant.find != BARRIER:
        assert len(places) == 1, f"{mutant.find!r} is not unique in {mutant.file}"
    place = places[mutant.occurrence]
    path.write_text(text[:place] + mutant.replace + text[place + len(mutant.find) :])
    return csrc / "cuda" / INCLUDED_BY.get(mutant.file, mutant.file)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_found(harness, tmp_path, mutant):
    runner = harness(mutant.sanitizer)
    kernel = mutate(mutant, tmp_path / "csrc")
    program = runner.build(tmp_path / "csrc", [kernel])
    result = runner.run(1, 12, kernel.stem, program=program)
    assert result.returncode != 0, "the harness did not notice"
    assert re.search(mutant.report, result.stderr), result.stderr


def test_every_barrier_has_a_mutant():
    # 10 in the selection, 1 in the prefix sum: a sweep over no barriers would prove nothing.
    assert sum(mutant.find == BARRIER for mutant in MUTANTS) >= 10
