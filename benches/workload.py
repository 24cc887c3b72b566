"""What the scoring suites score: real conversations; and with what: a SARM in any precision.

Scorers keep no prefixes across calls: repeated runs would find their own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from rounded import rounded
from suite import BenchError, Missing, Options

from sarm import SarmForSequenceClassification, SARMScorer, TopKSAE, load_backbone
from sarm.backbone import load_tokenizer
from sarm.calibration import calibrate, calibration_rows
from sarm.demo.fetch import smollm2
from sarm.demo.run import shipped_pairs
from sarm.errors import InputError
from sarm.evaluation import rules
from sarm.evaluation.benchmarks import preferences, rm_bench
from sarm.evaluation.metrics import Benchmark, Item, Measure
from sarm.packing import last_states
from sarm.quantization import quantize_backbone

LAYERS, N_LATENTS, K = 15, 9216, 27
RM_BENCH = Path("rm_bench", "chat_filtered.json")
PREFERENCES = Path("preferences_valid.jsonl.gz")


def make_scorer(
    device: str,
    dtype: torch.dtype | None = None,
    model: Path | None = None,
    max_length: int = 4096,
) -> SARMScorer:
    """Of the checkpoint `model`, else SmolLM2's lower half with a random SAE and head.

    dtype None: bf16 on a GPU, on a CPU what `load_backbone` finds fast.
    """
    if dtype is None and device == "cuda":
        dtype = torch.bfloat16
    if model is not None:
        return SARMScorer.from_pretrained(
            model, device, dtype, max_length=max_length, prefix_cache_mib=0
        )
    path = smollm2()
    backbone = load_backbone(path, LAYERS, device=device, dtype=dtype)
    torch.manual_seed(0)
    sae = TopKSAE(backbone.config.hidden_size, N_LATENTS, K, dtype=backbone.dtype).to(device)
    made = SarmForSequenceClassification.from_parts(backbone, sae, torch.randn(1, N_LATENTS))
    return SARMScorer(made, load_tokenizer(path), max_length=max_length, prefix_cache_mib=0)


def in_dtype(scorer: SARMScorer, dtype: torch.dtype) -> SARMScorer:
    """The same weights in a dtype, SAE included."""
    if scorer.model.model.dtype == dtype:
        return scorer
    return with_model(scorer, copy.deepcopy(scorer.model).to(dtype))


def in_bf16(scorer: SARMScorer) -> SARMScorer:
    """bf16, by rounding where the CPU would emulate it; the SAE in fp32 then."""
    model = scorer.model
    if model.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return in_dtype(scorer, torch.bfloat16)
    parts = (model.sae, model.score.weight, model.config.sarm["activation"])
    return with_model(
        scorer, SarmForSequenceClassification.from_parts(rounded(model.model), *parts)
    )


def in_int8(scorer: SARMScorer) -> SARMScorer | Missing:
    """The same SAE and head on the rotated 8-bit form of the backbone, or why there is none."""
    model = scorer.model
    try:
        backbone = quantize_backbone(model.model)
        rows = calibration_rows(scorer.tokenizer, model.config.vocab_size)
        calibrate(backbone, rows, last_states(model.model, rows))
    except InputError as error:
        return Missing(str(error))
    parts = (backbone, model.sae, model.score.weight, model.config.sarm["activation"])
    return with_model(scorer, SarmForSequenceClassification.from_parts(*parts))


def with_model(scorer: SARMScorer, model: SarmForSequenceClassification) -> SARMScorer:
    """As `scorer`, but this model."""
    return SARMScorer(model, scorer.tokenizer, max_length=scorer.max_length, prefix_cache_mib=0)


def conversations(options: Options) -> tuple[str, int, list]:
    """(source, number of prompts, message lists in the data set's order)."""
    found = rm_bench_chat(options.data)
    if found is not None:
        items = found.items[: options.prompts]
        return found.name, len(items), [talk for item in items for talk in item.conversations]
    pairs = shipped_pairs()[: options.prompts]
    return "demo pairs", len(pairs), [side for p in pairs for side in (p.chosen, p.rejected)]


def benchmarks(options: Options) -> list[Benchmark]:
    """RM-Bench chat and the held-out preferences where --data has them, else the demo's pairs.

    The first `options.items` items of each.
    """
    found = [rm_bench_chat(options.data)]
    if options.data is not None and (options.data / PREFERENCES).is_file():
        found.append(preferences(options.data / PREFERENCES))
    real = [benchmark for benchmark in found if benchmark is not None]
    if options.data is not None and not real:
        raise BenchError(f"--data {options.data}: neither {RM_BENCH} nor {PREFERENCES}")
    if not real:
        items = [Item([p.chosen, p.rejected], 1, p.where, p.prompt_key) for p in shipped_pairs()]
        accuracy = (Measure("accuracy", {"accuracy": 1.0}),)
        real = [Benchmark("demo pairs", items, rules.each(rules.pair), accuracy)]
    most = options.items or None
    return [replace(b, items=b.items[:most]) for b in real]


def rm_bench_chat(data: Path | None) -> Benchmark | None:
    """RM-Bench chat of a data folder, if it is there."""
    if data is None or not (data / RM_BENCH).is_file():
        return None
    return replace(rm_bench(data / RM_BENCH), name="RM-Bench chat")
