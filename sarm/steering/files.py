"""Profiles as small YAML files: a strict schema, and one line that names file and key.

name: fewer fillers
description: what it is for
model: 1f0c...                     # optional: features fingerprint, another model is refused
features:
  - {feature: 1234, multiply: 0.5}
  - {label: opens with praise, ablate: true}
  - {tag: markdown, add: -0.1, clamp: [null, 2.5]}
when: {weights: {12: 0.3, 77: 1.1}, above: 1.5, slope: 0.4}
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarm.errors import InputError, first_line
from sarm.steering.labels import FeatureNames
from sarm.steering.profile import Change, Gate, SteeringProfile

if TYPE_CHECKING:
    from sarm.modeling import SarmForSequenceClassification

KEYS = ("name", "description", "model", "features", "when")
SELECTORS = ("feature", "label", "tag")
ACTIONS = ("multiply", "add", "clamp", "ablate")


def read_profile(
    path: str | Path,
    *,
    names: FeatureNames | None = None,
    model: SarmForSequenceClassification | None = None,
) -> SteeringProfile:
    """A profile from a YAML file.

    Args:
        names: what labels and tags mean.  model: whose features are meant; checked if given.
    Raises:
        FileNotFoundError: no such file.
        InputError: not YAML, a key that is unknown, missing, twice there or of the wrong kind; an
        unknown feature, label or tag; features of another model.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        fields = yaml.load(path.read_text("utf-8"), Loader=_loader())  # a SafeLoader
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: not UTF-8, or a date like 2001-99-99
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path}{line}: not YAML ({problem})") from error
    except RecursionError:
        raise InputError(f"{path}: not YAML (nested too deeply)") from None
    profile = profile_from_fields(fields, str(path), names)
    if model is not None:
        profile.check_features(model.sae.n_latents, str(path))
        mine = features_fingerprint(model)
        if profile.model not in (None, mine):
            raise InputError(
                f"{path}: made for another model (features {profile.model}, this one has {mine})"
            )
    return profile


def write_profile(profile: SteeringProfile, path: str | Path) -> None:
    """A profile as a file that `read_profile` reads back to the same numbers."""
    from sarm.checkpoint import replace_file

    with replace_file(path) as file:
        file.write(profile_yaml(profile))


def profile_yaml(profile: SteeringProfile) -> str:
    """A profile as the text of a file."""
    import yaml

    return yaml.safe_dump(
        profile_fields(profile),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,  # a feature on a line
        width=110,
    )


def features_fingerprint(model: SarmForSequenceClassification) -> str:
    """Names the features that a model's SAE defines, whatever its head."""
    from sarm.features.identity import identity

    return identity(model)["features"]


def profile_fields(profile: SteeringProfile) -> dict:
    """The plain mapping that a file holds, and `config.json` for clamps and gates."""
    fields: dict[str, Any] = {
        key: value for key in KEYS[:3] if (value := getattr(profile, key)) not in (None, "")
    }
    fields["features"] = [{"feature": j} | _actions(c) for j, c in profile.changes.items()]
    if profile.when:
        weights = {int(j): float(u) for j, u in profile.when.weights.items()}
        fields["when"] = {
            "weights": weights,
            "above": float(profile.when.above),
            "slope": float(profile.when.slope),
        }
    return fields


def _actions(change: Change) -> dict:
    if change == Change(multiply=0.0):
        return {"ablate": True}
    out: dict[str, Any] = {}
    if change.multiply != 1.0:
        out["multiply"] = float(change.multiply)
    if change.add:
        out["add"] = float(change.add)
    if change.clamps:
        bounds = (change.low, change.high)
        out["clamp"] = [float(b) if math.isfinite(b) else None for b in bounds]
    return out or {"multiply": 1.0}


def profile_from_fields(
    fields: Any, where: str, names: FeatureNames | None = None
) -> SteeringProfile:
    """A profile from a plain mapping; errors as in `read_profile`."""
    fields = _mapping(fields, where, KEYS)
    for key in KEYS[:3]:
        if not isinstance(fields.get(key, ""), str):
            raise InputError(f"{where}: {key} must be a string, got {fields[key]!r}")
    entries = fields.get("features", [])
    if not isinstance(entries, list):
        raise InputError(f"{where}: features must be a list, got {type(entries).__name__}")
    changes: dict[int, Change] = {}
    first: dict[int, int] = {}
    for i, entry in enumerate(entries):
        at = f"{where}: features[{i}]"
        entry = _mapping(entry, at, SELECTORS + ACTIONS)
        change = _change(entry, at)
        for feature in _selected(entry, at, names):
            if feature in changes:
                raise InputError(f"{at}: feature {feature} is in features[{first[feature]}] too")
            changes[feature], first[feature] = change, i
    when = _gate(fields["when"], f"{where}: when") if fields.get("when") is not None else None
    if not changes and when is None:
        raise InputError(f"{where}: changes nothing; expected features or when")
    return SteeringProfile(
        changes, when, fields.get("name", ""), fields.get("description", ""), fields.get("model")
    )


def _selected(entry: Mapping, at: str, names: FeatureNames | None) -> list[int]:
    given = [key for key in SELECTORS if key in entry]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise InputError(f"{at}: expected one of {', '.join(SELECTORS)}, got {got}")
    key, value = given[0], entry[given[0]]
    if key == "feature":
        return [_index(value, f"{at}.feature")]
    if not isinstance(value, str):
        raise InputError(f"{at}.{key}: must be a string, got {value!r}")
    if names is None:
        raise InputError(f"{at}.{key}: {value!r} needs the database that names it (--features)")
    return names.find(key, value, f"{at}.{key}")


def _change(entry: Mapping, at: str) -> Change:
    given = [key for key in ACTIONS if key in entry]
    if not given:
        raise InputError(f"{at}: expected one or more of {', '.join(ACTIONS)}")
    if "ablate" in entry:
        if entry["ablate"] is not True or len(given) > 1:
            raise InputError(f"{at}.ablate: must be true, and alone")
        return Change(multiply=0.0)
    low, high = -math.inf, math.inf
    if "clamp" in entry:
        bounds = entry["clamp"]
        if not isinstance(bounds, list) or len(bounds) != 2 or bounds == [None, None]:
            raise InputError(f"{at}.clamp: must be [low, high], one may be null; got {bounds!r}")
        low = low if bounds[0] is None else _number(bounds[0], f"{at}.clamp[0]")
        high = high if bounds[1] is None else _number(bounds[1], f"{at}.clamp[1]")
        if low > high:
            raise InputError(f"{at}.clamp: low {low} is above high {high}")
    multiply = _number(entry.get("multiply", 1.0), f"{at}.multiply")
    return Change(multiply, _number(entry.get("add", 0.0), f"{at}.add"), low, high)


def _gate(fields: Any, at: str) -> Gate:
    fields = _mapping(fields, at, ("weights", "above", "slope"))
    for key in ("weights", "above"):
        if key not in fields:
            raise InputError(f"{at}.{key}: is missing")
    weights = fields["weights"]
    if not isinstance(weights, Mapping) or not weights:
        raise InputError(f"{at}.weights: must map features to numbers, got {weights!r}")
    read = {
        _index(int(j) if isinstance(j, str) and j.isdecimal() else j, f"{at}.weights"): _number(
            value, f"{at}.weights[{j}]"
        )
        for j, value in weights.items()  # the keys are strings where JSON carries them
    }
    above = _number(fields["above"], f"{at}.above")
    return Gate(read, above, _number(fields.get("slope", 0.0), f"{at}.slope"))


def _mapping(value: Any, at: str, known: tuple[str, ...]) -> Mapping:
    if not isinstance(value, Mapping):
        got = "nothing" if value is None else type(value).__name__
        raise InputError(f"{at}: expected a mapping with {', '.join(known)}; got {got}")
    for key in value:
        if key not in known:
            raise InputError(f"{at}: unknown key {key!r}; known are {', '.join(known)}")
    return value


def _number(value: Any, at: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of any size
        raise InputError(f"{at}: must be a finite number, got {repr(value)[:40]}")
    return float(value)


def _index(value: Any, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{at}: must be an integer >= 0, got {value!r}")
    return value


def _loader():
    """YAML's safe loader, that refuses a key twice instead of keeping the last."""
    import yaml

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        seen = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, (str, int)) or name in seen:
                problem = f"key {name!r} is there twice" if name in seen else "a key must be a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Strict
