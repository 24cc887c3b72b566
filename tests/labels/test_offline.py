"""Names by word statistics."""

import math

import chat_endpoint
import numpy as np
import pytest

from sarm.features import FeatureStore
from sarm.labels.contexts import Sampling, Splits
from sarm.labels.offline import MARK, METHOD, Background, label_offline, name, terms


def test_terms():
    assert terms("I'm sorry ** I") == {"i'm", "sorry", "**", "i", "i'm sorry", "sorry **", "** i"}


def test_tokens_of_a_template_name_nothing():
    """And nothing is a pair across them."""
    text = "No.<|im_end|>\n<|im_start|>user <start_of_turn> a</s> < b |> c <|eot_id|>"
    assert terms(text) == {
        "no",
        ".",
        "no .",
        "user",
        "a",
        "<",
        "b",
        "|>",
        "c",
        "< b",
        "b |>",
        "|> c",
    }


def test_scores_are_c_tf_idf(store):
    """Against a table of counts by scikit-learn."""
    from sklearn.feature_extraction.text import CountVectorizer

    features = range(4)
    texts = {f: sorted({c.text for c in store.contexts(f, kind=None)}) for f in features}
    counter = CountVectorizer(analyzer=terms, binary=True)
    table = counter.fit_transform([t for f in features for t in texts[f]]).toarray()
    owner = np.repeat(list(features), [len(texts[f]) for f in features])
    per_class = np.stack([table[owner == f].sum(0) for f in features])
    weight = np.log1p(per_class.sum(1).mean() / per_class.sum(0))
    background = Background(store, lambda features: None)
    vocabulary = counter.vocabulary_
    for term, column in vocabulary.items():
        assert background.weight(term) == pytest.approx(weight[column])
    shown = Splits(store, Sampling())(2).shown
    named = name(shown, background, count=1)
    mine = np.stack([counter.transform([c.text]).toarray()[0] for c in shown]).sum(0)
    best = max(vocabulary, key=lambda t: (mine[vocabulary[t]] * weight[vocabulary[t]], t))
    top = mine * weight
    assert math.isclose(top[vocabulary[next(iter(named.terms))]], top[vocabulary[best]])


def test_labels_say_that_they_are_statistics(store):
    records, failed = label_offline(store, range(4), Sampling())
    assert (records.labelled, failed) == (4, {})
    for feature, label in enumerate(store.labels(method=METHOD)):
        assert label.feature == feature
        assert label.label.startswith(MARK)
        assert f"topic{feature}" in label.label
        assert "longer responses" in label.label  # length_corr 0.5
        assert label.explanation.startswith("By statistics, not by a reader")
        assert label.score is None
        assert label.details["statistical"] is True


def test_detection_is_of_the_held_out_contexts(store):
    label_offline(store, [1], Sampling(held_out=6))
    (label,) = store.labels(1, METHOD)
    assert label.details["detection"]["positives"] == 6
    assert label.details["detection"]["hits"] == 6
    part = Splits(store, Sampling(held_out=6))(1)
    assert not set(label.details["shown"]) & {c.id for c in part.held_out}
    named = set(label.details["terms"])
    right = sum(terms(c.text).isdisjoint(named) for c in part.negatives)
    assert label.details["detection"]["rejections"] == right
    assert label.detection == (1 + right / 6) / 2


def test_without_a_repeated_term_there_is_no_label(tmp_path):
    words = iter(range(10000))
    path = chat_endpoint.make_database(
        tmp_path / "d.db", features=1, quote=lambda text: f"w{next(words)}"
    )
    with FeatureStore(path, "rw") as store:
        with store.transaction() as db:
            db.execute("""UPDATE span SET tokens = replace(tokens, '<|im_end|>', '')""")
        records, failed = label_offline(store, [0], Sampling())
        assert failed == {0: "no term is in two of its contexts"}
        assert store.labels() == []
        assert records.failures() == failed


def test_control_characters_do_not_get_into_labels(tmp_path):
    path = chat_endpoint.make_database(tmp_path / "f.db", quote=lambda text: f"\x1b\u202e {text}")
    with FeatureStore(path, "rw") as store:
        label_offline(store, range(4), Sampling())
        labels = store.labels(method=METHOD)
    assert len(labels) == 4
    for label in labels:
        assert label.label.isprintable()
        assert label.explanation.isprintable()
