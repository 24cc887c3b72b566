"""How well an SAE does: error against the variance around the mean, and which latents are alive."""

from __future__ import annotations

import torch
from torch import Tensor

from sarm.sae import TopKSAE
from sarm.training.activations import POSITIONS
from sarm.training.distributed.world import World


class Moments:
    """Sums over states, by kind of position, from which FVU follows.

    Kept on the device: nothing waits for a GPU until `report`.
    """

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        kinds = len(POSITIONS)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.error, self.ratio, self.energy = (zeros(kinds) for _ in range(4))
        self.total, self.active = zeros(kinds, d_model), zeros()

    @torch.no_grad()
    def add(self, x: Tensor, squared: Tensor, kinds: Tensor, vals: Tensor) -> None:
        """A batch: x (N, d_model), each row's squared error (N,), its kind (N,), latents (N, k)."""
        # products with a one-hot matrix instead of atomics: the same sums in every run
        mask = (kinds[:, None] == torch.arange(len(POSITIONS), device=x.device)).to(x.dtype)
        energy = x.square().sum(1)
        self.count += mask.sum(0)
        self.error += squared @ mask
        self.energy += energy @ mask
        self.ratio += (squared / energy.clamp_min(1e-12)) @ mask
        self.total += mask.t() @ x
        self.active += (vals != 0).sum()

    def over(self, world: World) -> Moments:
        """The sums of all data ranks (active latents: of all shards too)."""
        for name in ("count", "error", "ratio", "energy", "total", "active"):
            setattr(self, name, world.sum_data(getattr(self, name)))
        self.active = world.sum_latents(self.active)
        return self

    def report(self) -> dict[str, float]:
        """fvu, normalized_mse, l0 of all states, and fvu/KIND of the kinds there were."""
        count, error, ratio, energy = (
            t.cpu() for t in (self.count, self.error, self.ratio, self.energy)
        )
        total = self.total.cpu()
        n = float(count.sum())
        if n == 0:
            return {}
        found = {
            "fvu": _fvu(error.sum(), energy.sum(), total.sum(0), n),
            "normalized_mse": float(ratio.sum()) / n,
            "l0": float(self.active) / n,
        }
        for i, kind in enumerate(POSITIONS):
            if count[i] > 1:
                found[f"fvu/{kind}"] = _fvu(error[i], energy[i], total[i], float(count[i]))
        return found


def _fvu(error: Tensor, energy: Tensor, total: Tensor, n: float) -> float:
    """Squared error over the squared distance from the mean, sum ||x||^2 - ||sum x||^2 / n."""
    return float(error) / max(float(energy) - float(total.square().sum()) / n, 1e-12)


class Firing:
    """When each latent was last among the k largest, in states seen; also of scored tokens alone.

    last: (n_latents,) int64.  last_scored: the same in scored states, -1: never.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.last = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.last_scored = torch.full_like(self.last, -1)
        self.seen = self.seen_scored = 0

    @torch.no_grad()
    def update(
        self, idx: Tensor, vals: Tensor, scored: Tensor, n_scored: int, n: int | None = None
    ) -> None:
        """A batch's active latents (N, k); scored (N,) bool holds n_scored times True.

        Of rows of a larger batch, n and n_scored are that one's.
        """
        self.seen += len(idx) if n is None else n
        self.last[idx[vals != 0]] = self.seen
        if n_scored:
            self.seen_scored += n_scored
            self.last_scored[idx[(vals != 0) & scored[:, None]]] = self.seen_scored

    def dead(self, after: int) -> Tensor:
        """(n_latents,) bool: silent for more than `after` states."""
        return self.seen - self.last > after

    def alive_scored(self, window: int) -> float:
        """Share of latents that fired at one of the last `window` scored tokens."""
        return float((self.last_scored > max(0, self.seen_scored - window)).float().mean())


@torch.inference_mode()
def alive_share(sae: TopKSAE, states: Tensor, batch: int = 4096) -> float:
    """Share of latents active for at least one of raw residual states (N, d_model).

    Over the scored tokens of a preference set it says how much of an SAE a reward head can use:
    0.0094 for the published model.
    """
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=sae.pre_bias.device)
    for some in states.split(batch):
        vals, idx = sae.encode(some.to(fired.device))
        fired[idx[vals != 0]] = True
    return float(fired.float().mean())


def geometric_median(x: Tensor, steps: int = 50, rows: int = 16384) -> Tensor:
    """(d_model,) point of least summed distance to x (N, d_model), by Weiszfeld's iteration.

    Of an even sample of `rows`: a few extreme states move a mean, not this.
    """
    x = x[:: max(1, len(x) // rows)].double()
    point = x.mean(0)
    for _ in range(steps):
        weight = 1.0 / (x - point).norm(dim=1).clamp_min(1e-8)
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        done = (moved - point).norm() <= 1e-6 * (1e-6 + moved.norm())
        point = moved
        if done:
            break
    return point.float()
