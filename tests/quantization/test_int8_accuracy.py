"""What 8 bits cost on SmolLM2: states of scored tokens against fp32, beside what bf16 costs.

Mean relative error of the normalised state / Spearman of random probes' scores:

                          RM-Bench chat, 120 responses    shipped pairs, 40 answers
    bf16                  0.0120 / 0.997                  0.0103 / 0.994
    naive W8A8            0.0537 / 0.963                  0.0523 / 0.928
    rotated W8A8          0.0222 / 0.994                  0.0225 / 0.987

The shipped answers are short and alike, so their ranks are closer to each other.
SARM_TEST_RM_BENCH names RM-Bench's file (chat_filtered.json); without it the pairs are used.
"""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import sarm
from sarm.demo.run import shipped_pairs
from sarm.quantization import quantize_backbone
from sarm.sae import normalize_tokens
from sarm.tokens import ConversationEncoder

# the same measures as the benchmark's
sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))
from agreement import last_states, relative_error, spearman

RM_BENCH = os.environ.get("SARM_TEST_RM_BENCH")
# of bf16's error; Spearman at least
LIMITS = (2.2, 0.99) if RM_BENCH else (2.4, 0.98)


def conversations():
    """120 RM-Bench responses where the file is given, else the first 40 of the shipped pairs."""
    if RM_BENCH is None:
        pairs = shipped_pairs()[:20]
        return [talk for pair in pairs for talk in (pair.chosen, pair.rejected)]
    with open(RM_BENCH, encoding="utf-8") as file:
        items = json.load(file)[:20]
    return [
        [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": response}]
        for item in items
        for response in item["chosen"] + item["rejected"]
    ]


@pytest.mark.slow
@pytest.mark.real_model
def test_error_is_within_limits_of_bf16s(smollm2, smollm2_backbone):
    encoder = ConversationEncoder(sarm.load_tokenizer(smollm2), 4096)
    rows = [encoded.ids for encoded in encoder.encode(conversations())]
    exact = normalize_tokens(last_states(smollm2_backbone, rows))
    probes = torch.randn(exact.shape[1], 64)

    def error_and_correlation(model):
        ours = normalize_tokens(last_states(model, rows))
        return relative_error(ours, exact), spearman(ours @ probes, exact @ probes)

    measured = {
        "bf16": error_and_correlation(copy.deepcopy(smollm2_backbone).bfloat16()),
        "naive": error_and_correlation(quantize_backbone(smollm2_backbone, rotate=False)),
        "rotated": error_and_correlation(quantize_backbone(smollm2_backbone)),
        "calibrated": error_and_correlation(sarm.load_backbone(smollm2, 15, quantization="int8")),
    }
    for name, (error, correlation) in measured.items():
        print(f"{name:8} error {error:.4f}  Spearman {correlation:.4f}")
    assert measured["rotated"][0] <= LIMITS[0] * measured["bf16"][0]
    assert measured["rotated"][0] < 0.028
    assert measured["rotated"][1] >= LIMITS[1]
    assert measured["calibrated"][0] <= 1.3 * measured["bf16"][0]
    assert measured["calibrated"][1] >= measured["rotated"][1]
    assert measured["naive"][0] > 1.8 * measured["rotated"][0]  # the rotation is what does it
