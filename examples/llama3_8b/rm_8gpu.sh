#!/usr/bin/env bash
# The published reward model on eight H100s: everything learns, fp32 weights and Adam's moments are
# spread over the GPUs (FSDP2), 3 epochs, 512 pairs a step, cosine with 3 % warm-up, bf16.
set -euo pipefail
HERE=$(dirname "$0")
${RUN:-accelerate launch --config_file $HERE/../distributed/fsdp2.yaml --num_processes 8 -m sarm} \
    train-rm "${BACKBONE:-meta-llama/Llama-3.1-8B-Instruct}" \
    "${OUT:-runs}/llama3_8b_sae" "${PREFERENCES:-hub:Skywork/Skywork-Reward-Preference-80K-v0.2}" \
    -o "${OUT:-runs}/llama3_8b_sarm" --mode 3 --layer 16 --max-length 4096 --epochs 3 \
    --batch-size 512 --micro-batch 8 --lr 2e-6 --weight-decay 1e-3 --bf16 --checkpointing \
    --log tensorboard
