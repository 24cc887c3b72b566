"""Profiles that a page sends: read with the rules of files, written into one folder only."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

from sarm.errors import InputError
from sarm.modeling import SarmForSequenceClassification
from sarm.steering import SteeringProfile
from sarm.steering.files import features_fingerprint, profile_from_fields, profile_yaml
from sarm.steering.files import read_profile as read_file
from sarm.steering.files import write_profile as write_file
from sarm.steering.labels import FeatureNames

LONGEST_NAME = 80
#: Profiles listed, and bytes of one.
MOST, LARGEST = 500, 2**20


def read_profile(fields: Any, model: SarmForSequenceClassification) -> SteeringProfile:
    """A profile from a request's JSON; one without changes is the model as it is.

    Raises:
        InputError: as `sarm.steering.read_profile`.
    """
    if isinstance(fields, dict) and fields.get("features") == [] and not fields.get("when"):
        return SteeringProfile()
    profile = profile_from_fields(fields, "profile")
    profile.check_features(model.sae.n_latents, "profile")
    mine = features_fingerprint(model) if profile.model else None
    if profile.model not in (None, mine):
        raise InputError(
            f"profile: made for another model (features {profile.model}, this one has {mine})"
        )
    return profile


def as_yaml(profile: SteeringProfile, model: SarmForSequenceClassification) -> str:
    """The file of a profile, with the fingerprint of the features it speaks of."""
    return profile_yaml(replace(profile, model=features_fingerprint(model)))


def file_name(name: str) -> str:
    """A file name of a profile's name: letters, digits, dash and underscore, and `.yaml`.

    Raises:
        InputError: nothing is left of it, or it is too long.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-_")
    if not slug:
        raise InputError(f"name: expected letters or digits to make a file name of, got {name!r}")
    if len(slug) > LONGEST_NAME:
        raise InputError(f"name: at most {LONGEST_NAME} characters, got {len(slug)}")
    return f"{slug}.yaml"


def saved(folder: Path) -> list[str]:
    """Names of the profile files in `folder`, at most MOST of them; links are left out."""
    if not folder.is_dir():
        return []
    files = (p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.is_symlink())
    return sorted(p.name for p in files if p.is_file())[:MOST]


def load(
    name: str, folder: Path, model: SarmForSequenceClassification, names: FeatureNames | None
) -> SteeringProfile:
    """The profile in the file `name` of `folder`.

    Raises:
        InputError: no such file there, one larger than a request may be, or as
        `sarm.steering.read_profile`.
    """
    if name not in saved(folder):  # a name of the list: no path
        raise InputError(f"profiles: there is no {name[:LONGEST_NAME]!r}")
    path = folder / name
    if path.stat().st_size > LARGEST:
        raise InputError(f"{name}: is larger than {LARGEST} bytes")
    return read_file(path, names=names, model=model)


def save(
    profile: SteeringProfile,
    model: SarmForSequenceClassification,
    folder: Path,
    overwrite: bool = False,
) -> Path:
    """Write a profile into `folder`, whole or not at all; returns its path.

    Raises:
        FileExistsError: there is one of this name and `overwrite` is not set.
        InputError: no name, or a link stands where the file would.
    """
    path = folder / file_name(profile.name)
    if path.is_symlink():
        raise InputError(f"{path.name}: is a link in the profiles' folder; choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path.name}: is there already")
    write_file(replace(profile, model=features_fingerprint(model)), path)
    return path
