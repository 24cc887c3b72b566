"""On the real SmolLM2: its GGUF tokenizer survives saving."""

import pytest

from sarm.backbone import load_tokenizer
from sarm.tokens import ConversationEncoder


@pytest.mark.real_model
def test_a_tokenizer_from_gguf_saved_and_reloaded_tokenizes_identically(smollm2, tmp_path):
    before = load_tokenizer(smollm2)
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
