#!/usr/bin/env bash
# The published SAE on one H100: Llama-3.1-8B cut at 16, 65,536 latents, k 192, 50 M sentence ends
# (about 1 B tokens of OpenWebText2), Adam lr 5e-4 with 5 % warm-up and a decay over the last 20 %.
# What differs from the paper is on by default: standardised states and AuxK for dead latents.
# TEXT: a folder of .jsonl.gz or .parquet, or hub:owner/name. RUN=echo shows the command.
set -euo pipefail
${RUN:-python -m sarm} train-sae "${BACKBONE:-meta-llama/Llama-3.1-8B-Instruct}" "$TEXT" \
    -o "${OUT:-runs}/llama3_8b_sae" --layer 16 --n-latents 65536 --k 192 --dtype bf16 \
    --activations sentence --context 1024 --max-states 50000000 \
    --batch-size 4096 --chunk-states 131072 --lr 5e-4 --log tensorboard
