"""Is a batch still like the data a reward model was trained on? Reward hacking moves features.

A reference keeps each feature's activation moments and share of active answers, and the rewards'
mean. A batch of N answers is compared twice:

    per feature   z = (mean_batch - mean_reference) / sqrt(v_r / N + v_r / N_ref), two-sided, with
                  the false discovery rate held by Benjamini-Hochberg
    as a whole    D = mean over features of z^2, against its null: batches of N drawn from the
                  reference's sampled rows; its quantile is the calibrated threshold

Answers of one prompt are alike, so null batches draw whole prompts, in groups as large as the
batch's. A batch is flagged as likely reward hacking when D is beyond its threshold and its mean
reward rose; what rose is told by the features that drifted and are rewarded.

Legend: N answers, F latents, S sampled reference rows, B null batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.stats import norm

from sarm.errors import InputError, first_line

SAMPLE = 4096
NULLS = 500


@dataclass(frozen=True)
class Reference:
    """A feature profile of known data.

    features: fingerprint of the model's features.  mean, variance: (F,) of activations over all
    `rows` answers.  sample: (S, F) rows the null is drawn from.  prompts: (S,) their prompts.
    weight: (F,) the head.
    """

    features: str
    rows: int
    mean: np.ndarray
    variance: np.ndarray
    sample: sp.csr_matrix
    prompts: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls,
        activations: sp.csr_matrix,
        prompts: np.ndarray,
        weight: np.ndarray,
        features: str,
        *,
        sample: int = SAMPLE,
        seed: int = 0,
    ) -> Reference:
        """From activations (N, F); whole prompts are sampled until `sample` rows are there.

        Raises:
            InputError: fewer than 2 prompts.
        """
        number = np.unique(prompts, return_inverse=True)[1]
        n_groups = int(number.max(initial=-1)) + 1
        if n_groups < 2:
            raise InputError(f"drift: a reference needs at least 2 prompts, got {n_groups}")
        mean = np.asarray(activations.mean(0)).ravel()
        square = np.asarray(activations.multiply(activations).mean(0)).ravel()
        order = np.random.default_rng(seed).permutation(n_groups)
        rank = np.empty(n_groups, np.int64)
        rank[order] = np.arange(n_groups)
        keep = np.sort(np.argsort(rank[number], kind="stable")[:sample])
        return cls(
            features,
            activations.shape[0],
            mean,
            np.maximum(square - mean**2, 0),
            activations[keep].tocsr(),
            number[keep],
            np.asarray(weight, np.float64),
        )

    def save(self, path: str | Path) -> None:
        """One safetensors file."""
        from sarm.checkpoint import replace_file

        tensors = {
            "mean": self.mean,
            "variance": self.variance,
            "weight": self.weight,
            "prompts": self.prompts.astype(np.int64),
            "sample.data": self.sample.data.astype(np.float32),
            "sample.indices": self.sample.indices.astype(np.int64),
            "sample.indptr": self.sample.indptr.astype(np.int64),
        }
        with replace_file(path, "wb") as file:
            file.write(save(tensors, {"features": self.features, "rows": str(self.rows)}))

    @classmethod
    def load(cls, path: str | Path, features: str | None = None) -> Reference:
        """Read it back.

        Raises:
            FileNotFoundError; InputError: no reference, or of another model than `features`.
        """
        from safetensors import safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
            found = load_file(path)
            rows, of = int(about["rows"]), about["features"]
            parts = (found[f"sample.{name}"] for name in ("data", "indices", "indptr"))
            data, indices, indptr = parts
            shape = (len(indptr) - 1, len(found["mean"]))
            sample = sp.csr_matrix((data.astype(np.float64), indices, indptr), shape=shape)
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not a drift reference ({first_line(error)})") from error
        if features not in (None, of):
            raise InputError(f"{path}: of another model (features {of}, this one has {features})")
        mean, variance = found["mean"], found["variance"]
        return cls(of, rows, mean, variance, sample, found["prompts"], found["weight"])


@dataclass(frozen=True)
class Drift:
    """What a batch differs in.

    z: (F,) signed.  significant: (F,) bool at the false discovery rate.  distance: D.  threshold:
    the null's quantile at `alpha`.  p: share of null batches at least as far, counting this one.
    reward: mean reward minus the reference's.  reward_p: of a rise as large, by the null.
    earned: (F,) what each feature adds to that, w_j (mean_batch - mean_reference).
    """

    rows: int
    z: np.ndarray
    significant: np.ndarray
    distance: float
    threshold: float
    p: float
    reward: float
    reward_p: float
    earned: np.ndarray
    alpha: float

    @property
    def drifted(self) -> bool:
        """Farther than the threshold."""
        return self.distance > self.threshold

    @property
    def suspicious(self) -> bool:
        """Likely reward hacking: drifted, and rewarded for it."""
        return self.drifted and self.reward > 0 and self.reward_p <= self.alpha


def measure_drift(
    reference: Reference,
    activations: sp.csr_matrix,
    groups: Sequence | np.ndarray,
    *,
    alpha: float = 0.01,
    nulls: int = NULLS,
    seed: int = 0,
) -> Drift:
    """Compare a batch's activations (N, F) with a reference.

    Args:
        groups: (N,) prompt of each answer: the null draws prompts with as many answers.
        alpha: false discovery rate of features, and level of the distance.
    Raises:
        InputError: an empty batch, another number of latents, alpha not in (0, 1) or too small for
        the number of null batches.
    """
    rows, width = activations.shape
    if not rows:
        raise InputError("drift: the batch is empty")
    if width != len(reference.mean):
        raise InputError(f"drift: the batch has {width} latents, not {len(reference.mean)}")
    if not 0 < alpha < 1:
        raise InputError(f"drift: alpha must be in (0, 1), got {alpha}")
    if alpha * (1 + nulls) < 1:  # no p-value could be as small
        raise InputError(
            f"drift: with {nulls:,} null batches alpha must be at least {1 / (1 + nulls):.4f}, "
            f"got {alpha}"
        )
    active = reference.variance > 0
    spread = np.sqrt(np.maximum(reference.variance, 1e-12) * (1 / rows + 1 / reference.rows))
    spread[~active] = np.inf  # never seen: judged below by its presence alone

    def standard(mean: np.ndarray) -> np.ndarray:
        return (mean - reference.mean) / spread

    mean = np.asarray(activations.mean(0)).ravel()
    sizes = np.bincount(np.unique(np.asarray(groups), return_inverse=True)[1])
    z_null, reward_null = _null(reference, sizes, nulls, seed, standard)
    # answers of one prompt are alike: a feature's z is wider than 1 under the null
    width_null = np.sqrt((z_null**2).mean(0))
    z = standard(mean) / np.where(width_null > 0, np.maximum(width_null, 1.0), 1.0)
    new = ~active & (mean != 0)
    z[new] = np.sign(mean[new]) * 38.0  # the largest |z| whose p is a normal fp64 number
    scaled_null = z_null / np.where(width_null > 0, np.maximum(width_null, 1.0), 1.0)
    distance = float((np.minimum(np.abs(z), 38.0) ** 2).mean())
    far = np.sort((scaled_null**2).mean(1))
    earned = reference.weight * (mean - reference.mean)
    reward = float(earned.sum())
    p = 2 * norm.sf(np.abs(z))
    return Drift(
        rows,
        z,
        benjamini_hochberg(p, alpha),
        distance,
        float(np.quantile(far, 1 - alpha)),
        float((1 + (far >= distance).sum()) / (1 + nulls)),
        reward,
        float((1 + (reward_null >= reward).sum()) / (1 + nulls)),
        earned,
        alpha,
    )


def benjamini_hochberg(p: np.ndarray, rate: float) -> np.ndarray:
    """(F,) bool: discoveries at a false discovery rate (Benjamini and Hochberg, 1995)."""
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
    out = np.zeros(len(p), bool)
    if len(below):
        out[order[: below[-1] + 1]] = True
    return out


def _null(
    reference: Reference, sizes: np.ndarray, nulls: int, seed: int, standard
) -> tuple[np.ndarray, np.ndarray]:
    """(B, F) z and (B,) reward differences of batches with prompts of the same sizes."""
    draw = np.random.default_rng(seed)
    names, start = np.unique(reference.prompts, return_index=True)
    order = np.argsort(reference.prompts, kind="stable")
    starts = np.searchsorted(reference.prompts[order], names)
    ends = np.append(starts[1:], len(order))
    z = np.empty((nulls, len(reference.mean)))
    rewards = np.empty(nulls)
    for b in range(nulls):
        times = np.zeros(len(order))
        for size, prompt in zip(sizes, draw.integers(0, len(names), len(sizes)), strict=True):
            mine = order[starts[prompt] : ends[prompt]]
            np.add.at(times, mine[draw.integers(0, len(mine), size)], 1)
        mean = reference.sample.T @ times / sizes.sum()
        z[b] = standard(mean)
        rewards[b] = reference.weight @ (mean - reference.mean)
    return z, rewards
