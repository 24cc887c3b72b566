"""Profiles as YAML: what may stand there, and the one line that says what is wrong."""

import math

import pytest

from sarm import InputError
from sarm.features import FeatureStore
from sarm.steering import Change, FeatureNames, Gate, SteeringProfile, read_profile, write_profile
from sarm.steering.files import features_fingerprint, profile_fields, profile_from_fields

NAMES = FeatureNames({"opens with praise": [4], "Polite end": [7, 9]}, {"style": [4, 9]}, "names")


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "p.yaml"
        path.write_text(text, "utf-8")
        return path

    return make


def test_every_action_and_selector(write):
    path = write(
        "name: calm\ndescription: less praise\nmodel: abc\nfeatures:\n"
        "  - {feature: 1, multiply: 0.5}\n"
        "  - {feature: 2, add: -0.25, clamp: [null, 2.5]}\n"
        "  - {label: ' opens WITH praise ', ablate: true}\n"
        "  - {label: polite end, clamp: [0.5, 1], multiply: 2}\n"
        "when: {weights: {3: 1, 5: -0.5}, above: 1.5, slope: 0.4}\n"
    )
    assert read_profile(path, names=NAMES) == SteeringProfile(
        {
            1: Change(multiply=0.5),
            2: Change(add=-0.25, high=2.5),
            4: Change(multiply=0.0),
            7: Change(multiply=2.0, low=0.5, high=1.0),
            9: Change(multiply=2.0, low=0.5, high=1.0),
        },
        Gate({3: 1.0, 5: -0.5}, 1.5, 0.4),
        "calm",
        "less praise",
        "abc",
    )


def test_a_tag_names_all_its_features(write):
    profile = read_profile(write("features: [{tag: STYLE, multiply: 3}]"), names=NAMES)
    assert profile.changes == {4: Change(3.0), 9: Change(3.0)}


def test_what_is_written_is_read_back(tmp_path):
    profile = SteeringProfile(
        {0: Change(0.0), 3: Change(1 / 3, -1e-17, -math.inf, 2.0), 8: Change()},
        Gate({2: 0.1, 11: -7.0}, -0.5, 1e-3),
        "n",
        "d: é",
    )
    write_profile(profile, tmp_path / "p.yaml")
    assert read_profile(tmp_path / "p.yaml") == profile
    assert profile_from_fields(profile_fields(profile), "x") == profile


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "expected a mapping with name, description, model, features, when; got nothing"),
     ("[1]", "expected a mapping with .* got list"),
     ("features: []", "changes nothing; expected features or when"),
     ("feature: []", "unknown key 'feature'; known are name"),
     ("features: 3", "features must be a list, got int"),
     ("name: 3\nfeatures: [{feature: 1, multiply: 2}]", "name must be a string, got 3"),
     ("features: [3]", r"features\[0\]: expected a mapping with feature, .* got int"),
     ("features: [{multiply: 2}]", r"features\[0\]: expected one of feature, label, tag, got none"),
     ("features: [{feature: 1, tag: a, multiply: 2}]", "got feature and tag"),
     ("features: [{feature: 1}]", r"features\[0\]: expected one or more of multiply, add"),
     ("features: [{feature: -1, multiply: 2}]", r"\[0\].feature: must be an integer >= 0, got -1"),
     ("features: [{feature: 1.5, multiply: 2}]", r"must be an integer >= 0, got 1\.5"),
     ("features: [{feature: 1, multiply: .nan}]", r"\[0\].multiply: must be a finite .* got nan"),
     ("features: [{feature: 1, add: .inf}]", r"\[0\].add: must be a finite number, got inf"),
     ("features: [{feature: 1, add: '2'}]", r"\[0\].add: must be a finite number, got '2'"),
     ("features: [{feature: 1, scale: 2}]", r"features\[0\]: unknown key 'scale'"),
     ("features: [{feature: 1, ablate: false}]", r"\[0\].ablate: must be true, and alone"),
     ("features: [{feature: 1, ablate: true, add: 1}]", r"\[0\].ablate: must be true, and alone"),
     ("features: [{feature: 1, clamp: 2}]", r"\[0\].clamp: must be \[low, high\]"),
     ("features: [{feature: 1, clamp: [null, null]}]", r"\[0\].clamp: must be \[low, high\]"),
     ("features: [{feature: 1, clamp: [3, 2]}]", r"\[0\].clamp: low 3.0 is above high 2.0"),
     ("features: [{feature: 1, clamp: [.nan, 2]}]", r"\[0\].clamp\[0\]: must be a finite number"),
     ("features: [{feature: 1, multiply: 2}, {feature: 1, add: 2}]",
      r"features\[1\]: feature 1 is in features\[0\] too"),
     ("features: [{label: polite ends, multiply: 2}]",
      r"features\[0\].label: names has no label 'polite ends'; the nearest is 'polite end'"),
     ("features: [{tag: styles, multiply: 2}]", r"no tag 'styles'; the nearest is 'style'"),
     ("features: [{label: 3, multiply: 2}]", r"\[0\].label: must be a string, got 3"),
     ("when: {above: 1}", "when.weights: is missing"),
     ("when: {weights: {1: 2}}", "when.above: is missing"),
     ("when: {weights: {}, above: 1}", "when.weights: must map features to numbers, got {}"),
     ("when: {weights: {1: x}, above: 1}", r"when.weights\[1\]: must be a finite number, got 'x'"),
     ("when: {weights: {1: 2}, above: .inf}", "when.above: must be a finite number"),
     ("when: {weights: {1: 2}, above: 1, over: 2}", "when: unknown key 'over'"),
     ("features: [}", r"p\.yaml:1: not YAML"),
     ("a: 1\na: 2", r"p\.yaml:2: not YAML \(key 'a' is there twice\)"),
     ("x: !!python/object/apply:os.system [ls]", r"p\.yaml:1: not YAML \(could not determine")],
)  # fmt: skip
def test_refusals(text, says, write):
    path = write(text)
    with pytest.raises(InputError, match=says) as caught:
        read_profile(path, names=NAMES)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_labels_need_a_database(write):
    with pytest.raises(InputError, match=r"features\[0\].label: 'a' needs the database"):
        read_profile(write("features: [{label: a, multiply: 2}]"))
    with pytest.raises(InputError, match="it has no tags"):
        read_profile(write("features: [{tag: a, multiply: 2}]"), names=FeatureNames({}))


def test_features_of_another_model_are_refused(write, make_sarm):
    model, other = make_sarm(), make_sarm(seed=9)
    line = "features: [{feature: 5, multiply: 2}]"
    path = write(f"model: {features_fingerprint(model)}\n{line}")
    assert read_profile(path, model=model).changes == {5: Change(2.0)}
    with pytest.raises(InputError, match=r"p\.yaml: made for another model \(features "):
        read_profile(path, model=other)
    with pytest.raises(InputError, match=r"feature must be in \[0, 96\), got 96"):
        read_profile(write("features: [{feature: 96, multiply: 2}]"), model=model)
    with pytest.raises(InputError, match=r"feature must be in \[0, 96\), got 96"):
        read_profile(write("when: {weights: {96: 1}, above: 0}"), model=model)


def test_labels_of_a_feature_database(tmp_path, make_sarm):
    path = tmp_path / "features.sqlite"
    with FeatureStore(path, "rw") as store:
        store.add_label(3, "statistics", "praise", details={"tags": ["style", "tone"]})
        store.add_label(3, "model", "flattery")
        store.add_label(5, "model", "Praise")
    names = FeatureNames.of_database(path)
    assert names.find("label", "praise", "x") == [3, 5]
    assert names.find("label", "flattery", "x") == [3]
    assert names.find("tag", "tone", "x") == [3]
    with pytest.raises(InputError, match="another model"):
        FeatureNames.of_database(path, make_sarm())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_profile(tmp_path / "none.yaml")
