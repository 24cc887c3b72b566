#!/usr/bin/env bash
# The same SAE on eight H100s of one machine: each extracts an eighth of the states and holds an
# eighth of the latents; batches and result are those of sae_1gpu.sh up to the order of sums.
set -euo pipefail
${RUN:-torchrun --nproc-per-node 8 -m sarm} train-sae \
    "${BACKBONE:-meta-llama/Llama-3.1-8B-Instruct}" "$TEXT" \
    -o "${OUT:-runs}/llama3_8b_sae" --layer 16 --n-latents 65536 --k 192 --dtype bf16 \
    --activations sentence --context 1024 --max-states 50000000 \
    --batch-size 4096 --chunk-states 131072 --lr 5e-4 --log tensorboard --shards 8
