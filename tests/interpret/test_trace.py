"""A reward along a response is the reward of the response cut there, and ends at the reward."""

import pytest

from sarm.errors import InputError
from sarm.interpret.trace import response_start, trace
from sarm.scorer import SARMScorer

ANSWER = "the cat sat on a mat. naïve 🙂 cold"


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_ended_is_the_reward_of_the_shorter_response(explained, talk, quantization):
    scorer = explained(quantization=quantization)
    turns = talk("why was it so cold", ANSWER)
    found = trace(scorer, turns, top=4)
    assert "".join(found.tokens) == ANSWER
    (encoded,) = scorer.encode([turns])
    exact = 0 if quantization else 1e-5
    assert found.rewards[-1] == pytest.approx(found.explanation.reward, abs=exact)
    assert found.rewards[-1] == pytest.approx(scorer.score([turns]).item(), abs=exact)
    first = response_start(scorer, turns, encoded)
    for at in (0, 3, len(found.tokens) - 2):
        text = "".join(found.tokens[: at + 1])
        (cut,) = scorer.encode([talk("why was it so cold", text)])
        if cut.ids == [*encoded.ids[: first + at + 1], encoded.ids[-1]]:  # same tokens when cut
            assert found.rewards[at] == pytest.approx(
                scorer.score_token_ids([cut.ids]).item(), abs=exact
            )
    assert len(found.features) == 4
    for feature, part in zip(found.features, found.explanation.contributions, strict=False):
        assert (feature.feature, feature.weight) == (part.feature, part.weight)
        assert feature.activations[-1] == pytest.approx(part.activation, abs=exact)


def test_read_ends_at_the_reward_too(explained, talk):
    scorer = explained()
    turns = talk("why", ANSWER)
    found = trace(scorer, turns, top=3, reading="read")
    assert "".join(found.tokens) == ANSWER + "<|im_end|>"
    assert found.rewards[-1] == pytest.approx(scorer.score([turns]).item(), abs=1e-5)
    ended = trace(scorer, turns, top=3, reading="ended")
    assert found.rewards[0] != pytest.approx(ended.rewards[0], abs=1e-3)


def test_all_features_at_a_token_sum_to_its_reward(explained, talk):
    found = trace(explained(), talk("why", "the cat"), top=10**6, reading="read")
    total = sum(f.weight * f.activations[-1] for f in found.features)
    assert total == pytest.approx(found.rewards[-1], abs=1e-5)


def test_cut_from_the_left(explained, talk):
    whole = explained()
    scorer = SARMScorer(whole.model, whole.tokenizer, max_length=12, prefix_cache_mib=0)
    found = trace(scorer, talk("a question that is longer than twelve tokens", "the cat sat"))
    assert "".join(found.tokens) == "the cat sat"
    assert found.explanation.dropped > 0
    long = trace(scorer, talk("q", "the cat sat on a mat while rain fell and nobody in town"))
    assert len(long.tokens) == 11


def test_empty_response_and_bad_arguments(explained, talk):
    scorer = explained()
    assert len(trace(scorer, talk("q", "")).rewards) == 1
    with pytest.raises(InputError, match="reading must be one of ended, read, got 'x'"):
        trace(scorer, talk("q", "a"), reading="x")
    with pytest.raises(InputError, match="top must be >= 0"):
        trace(scorer, talk("q", "a"), top=-1)
    with pytest.raises(InputError, match="has no sparse features"):
        trace(explained("none"), talk("q", "a"))
