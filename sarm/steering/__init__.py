"""Steering: changing what features weigh in the reward, exactly and without another forward pass.

`Profile` is the short form {feature: factor}; `SteeringProfile` (a YAML file, docs/steering.md)
also adds, clamps, ablates, and may apply only where a gate over the features is open.
"""

from sarm.steering.files import read_profile, write_profile
from sarm.steering.heads import Heads, profile_heads, steered
from sarm.steering.labels import FeatureNames
from sarm.steering.profile import Change, Gate, Profile, SteeringProfile, as_profile

__all__ = [
    "Change",
    "FeatureNames",
    "Gate",
    "Heads",
    "Profile",
    "SteeringProfile",
    "as_profile",
    "profile_heads",
    "read_profile",
    "steered",
    "write_profile",
]
