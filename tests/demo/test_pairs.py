"""The shipped preference pairs: valid, varied, and without a give-away."""

import collections
import json
from importlib.resources import files

import pytest
import tiny_sarm

from sarm.demo.run import shipped_pairs
from sarm.tokens import ConversationEncoder, check_conversation

CATEGORIES = {"harmlessness", "honesty", "helpfulness", "format", "reasoning", "tone"}


@pytest.fixture(scope="module")
def pairs():
    return shipped_pairs()


def test_there_are_enough_in_six_categories(pairs):
    count = collections.Counter(pair.extra["category"] for pair in pairs)
    assert sum(count.values()) >= 160
    assert set(count) == CATEGORIES
    assert min(count.values()) >= 20


def test_every_row_has_exactly_the_known_fields():
    text = (files("sarm.demo") / "pairs.jsonl").read_text("utf-8")
    for line in text.splitlines():
        assert set(json.loads(line)) == {"id", "category", "prompt", "chosen", "rejected"}


def test_conversations_are_valid_and_end_with_an_answer(pairs):
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            messages = check_conversation(side, pair.where)
            roles = [m["role"] for m in messages if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2), pair.where
            assert all(m["content"].strip() == m["content"] != "" for m in messages), pair.where
        assert pair.chosen[:-1] == pair.rejected[:-1]
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    assert len(ConversationEncoder(tiny_sarm.make_tokenizer(), 10**6).encode(sides)) == 2 * len(
        pairs
    )


def test_ids_prompts_and_answers_are_unique(pairs):
    assert len({pair.extra["id"] for pair in pairs}) == len(pairs)
    # one prompt each: cross-validation may then split by pair
    assert len({pair.prompt_key for pair in pairs}) == len(pairs)
    answers = [side[-1]["content"] for pair in pairs for side in (pair.chosen, pair.rejected)]
    assert len(set(answers)) == len(answers)
    for pair in pairs:
        assert pair.extra["id"].startswith(pair.extra["category"])


def test_length_gives_nothing_away(pairs):
    longer = [len(p.chosen[-1]["content"]) > len(p.rejected[-1]["content"]) for p in pairs]
    assert 0.4 <= sum(longer) / len(longer) <= 0.6
    for category in CATEGORIES:
        mine = [x for x, p in zip(longer, pairs, strict=True) if p.extra["category"] == category]
        assert 0.25 <= sum(mine) / len(mine) <= 0.75, category


def test_the_first_words_give_nothing_away(pairs):
    """No opening such as "Sure" or "Sorry" decides more than a few pairs."""
    first = [
        [side[-1]["content"].split()[0].lower() for side in (p.chosen, p.rejected)] for p in pairs
    ]
    chosen, rejected = (collections.Counter(words) for words in zip(*first, strict=True))
    right = sum(chosen[c] - 1 > rejected[c] for c, _ in first) / len(first)
    assert right < 0.6
