#!/usr/bin/env bash
# The reward model on one H100: published data and schedule, but the backbone learns by LoRA
# (its fp32 weights with Adam, 64 GB, would leave no room). SAE and head learn in full.
set -euo pipefail
${RUN:-python -m sarm} train-rm "${BACKBONE:-meta-llama/Llama-3.1-8B-Instruct}" \
    "${OUT:-runs}/llama3_8b_sae" "${PREFERENCES:-hub:Skywork/Skywork-Reward-Preference-80K-v0.2}" \
    -o "${OUT:-runs}/llama3_8b_sarm" --mode 3 --layer 16 --max-length 4096 --epochs 3 \
    --batch-size 512 --micro-batch 2 --lr 2e-6 --weight-decay 1e-3 --bf16 --checkpointing \
    --dtype bf16 --lora 64 --log tensorboard
