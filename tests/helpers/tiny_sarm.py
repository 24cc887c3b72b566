"""Tiny backbones with a real tokenizer and chat template, and texts and preferences to train on."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
SENTENCE = "the cat sat on a mat while rain fell and nobody in town asked why it was so cold"
WORDS = SENTENCE.split()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}


def make_tokenizer(template=CHATML):
    """Bytes plus whole words; <|im_end|> is eos and pad, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([f" {word}" for word in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_causal_lm(kind="llama", seed=0, **changes):
    """A random causal language model, with weights large enough that its states vary."""
    torch.manual_seed(seed)
    fields = {**SIZES, "vocab_size": len(make_tokenizer()), "initializer_range": 0.3, **changes}
    fields.update(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**fields)).float().eval()


def save_backbone(folder, kind="llama", tokenizer=None, **changes):
    """A checkpoint directory with model and tokenizer."""
    make_causal_lm(kind, **changes).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return Path(folder)


def make_texts(count, seed=0, sentences=5):
    """Documents of sentences over a few words."""
    draw = random.Random(seed)
    return [
        " ".join(
            " ".join(draw.choices(WORDS, k=draw.randint(3, 18))) + draw.choice(".?!")
            for _ in range(draw.randint(1, sentences))
        )
        for _ in range(count)
    ]


def make_pairs(count, seed=0):
    """Preference rows (TRL, conversational): the better answer ends politely, the worse rudely."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        start = " ".join(draw.choices(WORDS, k=draw.randint(2, 8)))
        rows.append(
            {
                "id": f"pair-{i}",
                "prompt": [{"role": "user", "content": f"question {i} " + start}],
                "chosen": [{"role": "assistant", "content": start + " thanks"}],
                "rejected": [{"role": "assistant", "content": start + " ugh no"}],
            }
        )
    return rows


def write_jsonl(path, rows):
    """Rows as JSON lines."""
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
