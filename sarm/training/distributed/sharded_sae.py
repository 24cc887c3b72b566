"""A TopK SAE whose latents are spread over processes, with exact top-k.

Every shard holds n_latents / shards rows of encoder and decoder, their gradients and optimiser
state. Encoding takes the k largest of each shard (`ops.topk_encode`), tells all shards the values,
and keeps those among the k largest of all; decoding sums the shards' reconstructions. A step sends
4 N min(k, n_local) bytes of values and 4 N d_model of reconstructions a process; FSDP would send
the weights and their gradients: at 65,536 latents, d_model 4,096, k 192, N 4,096 and 8 processes
that is 70 MB instead of 6 GB. No weight ever leaves its process, so this is also all that FSDP
would save of memory.

    N rows    S shards    n_local latents of a shard    w = min(k, n_local)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sarm import ops
from sarm.errors import InputError
from sarm.ops import SparseLatents
from sarm.sae import TopKSAE
from sarm.training.distributed.files import gathered
from sarm.training.distributed.world import World


class ShardLatents(NamedTuple):
    """A shard's part of the k active latents of every row; 0 where a latent is not active.

    vals (N, w) fp32.  idx (N, w) int64, counted from the shard's first latent.  places (N, w):
    where the latent stands among all k; k or more: it is not one of them.
    """

    vals: Tensor
    idx: Tensor
    places: Tensor


def merged_places(vals: Tensor) -> Tensor:
    """Where each shard's largest values stand in the order of all of them.

    Args:
        vals: (S, N, w), each row descending, equal values by index: what `ops.topk_encode` gives
            for each of S shards, whose latents follow one another.
    Returns:
        (S, N, w) int64: 0 is the largest of the row. A stable sort keeps equal values in the order
        shard, position, which is that of their indices: the op's own order, NaN first.
    """
    s, n, w = vals.shape
    row = vals.transpose(0, 1).reshape(n, s * w)
    order = row.sort(dim=1, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places.scatter_(1, order, torch.arange(s * w, device=order.device).expand(n, -1))
    return places.view(n, s, w).transpose(0, 1)


def sharded_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, world: World, width: int | None = None
) -> SparseLatents | ShardLatents:
    """The k largest of x @ w_enc.T + b_enc over all shards' rows of w_enc, each shard's own part.

    Args:
        x: (N, d_model), equal on all shards.   w_enc (n_local, d_model), b_enc (n_local,).
        width: columns that every shard offers, at least min(k, its n_local); None: that.
            Shards with fewer latents fill up with -inf.
    Returns:
        `ShardLatents`; with one shard the op's own `SparseLatents`.
    """
    if world.shards == 1:
        return ops.topk_encode(x, w_enc, b_enc, k)
    width = min(k, len(w_enc)) if width is None else width
    most = min(width, len(w_enc))
    if most:
        vals, idx = ops.topk_encode(x, w_enc, b_enc, most)
    else:  # no dead latent here, say
        vals, idx = b_enc.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64)
    offered = nn.functional.pad(vals.detach(), (0, width - most), value=-torch.inf)
    places = merged_places(world.all_latents(offered[None]))[world.shard, :, :most]
    return narrowed(ShardLatents(vals, idx.to(vals.device), places), k)


def narrowed(latents: Any, k: int) -> Any:
    """The k largest of more: `SparseLatents` or `ShardLatents`, as given."""
    if not isinstance(latents, ShardLatents):
        return SparseLatents(latents.vals[:, :k], latents.idx[:, :k])
    vals, idx, places = latents
    # rows are descending: what is active comes first, on average k / S of the columns
    wide = max(1, int((places < k).sum(1).max())) if places.numel() else 0
    vals, idx, places = vals[:, :wide], idx[:, :wide], places[:, :wide]
    return ShardLatents(vals.masked_fill(places >= k, 0.0), idx, places)


class ShardedTopKSAE(TopKSAE):
    """A shard of a TopK SAE: the same methods, called by all shards with the same inputs.

    `n_latents` and `k` are the whole SAE's; parameters have n_latents / shards rows, beginning
    with latent `first`; pre_bias is on all shards. `encode_normalized` returns `ShardLatents`.

    Raises:
        InputError: n_latents is no multiple of the number of shards.
    """

    def __init__(self, whole: TopKSAE, world: World) -> None:
        if whole.n_latents % world.shards:
            raise InputError(
                f"n_latents must be a multiple of the number of shards, {world.shards}, "
                f"got {whole.n_latents}"
            )
        local = whole.n_latents // world.shards
        super().__init__(
            whole.d_model,
            local,
            min(whole.k, local),
            normalization=whole.normalization,
            relu=whole.relu,
            device="meta",
        )
        self.n_latents, self.k = whole.n_latents, whole.k
        self.first, self.world = world.shard * local, world
        mine = slice(self.first, self.first + local)
        self.pre_bias = nn.Parameter(whole.pre_bias.detach().clone())
        self.latent_bias = nn.Parameter(whole.latent_bias.detach()[mine].clone())
        self.encoder.weight = nn.Parameter(whole.encoder.weight.detach()[mine].clone())
        self.decoder.weight = nn.Parameter(whole.w_dec.detach()[mine].clone().t())

    def _topk(self, x: Tensor, bias: Tensor, k: int, relu: bool) -> Any:
        w_enc = self.encoder.weight
        centred = (x - self.world.into_shards(self.pre_bias)).to(w_enc.dtype)
        found = sharded_topk(centred, w_enc, bias, k, self.world)
        return found._replace(vals=found.vals.relu()) if relu else found

    def decode(self, latents: SparseLatents | ShardLatents) -> Tensor:
        """(N, d_model) fp32 reconstruction, the same on all shards."""
        return self.world.from_shards(weighted_rows(latents, self.w_dec)) + self.pre_bias

    @torch.no_grad()
    def whole_latents(self, latents: ShardLatents) -> SparseLatents:
        """The k active latents of all shards, descending, as the unsharded SAE returns them."""
        vals, idx, places = latents
        n, k = len(vals), self.k
        row = torch.arange(n, device=vals.device)[:, None].expand_as(places)
        active = places < k
        found = vals.new_zeros(n, k), idx.new_zeros(n, k)
        for target, source in zip(found, (vals, idx + self.first), strict=True):
            target[row[active], places[active]] = source[active]
        return SparseLatents(*(self.world.sum_latents(t) for t in found))


def weighted_rows(latents: SparseLatents | ShardLatents, w_dec: Tensor) -> Tensor:
    """(N, d_model) fp32: what a shard's own latents add to the reconstruction."""
    if latents.vals.shape[1] == 0:
        return w_dec.new_zeros(len(latents.vals), w_dec.shape[1], dtype=torch.float32)
    return ops.gather_sum(latents.vals, latents.idx, w_dec).float()


def shard_dim(name: str) -> int | None:
    """The dimension that counts latents, of an SAE's tensor or of a checkpoint's; or None."""
    if "pre_bias" in name or name in ("mean", "std") or name.endswith("/step"):
        return None
    return 1 if name.endswith("decoder.weight") else 0  # optimiser states lie latent by latent


def shard_of(sae: TopKSAE, world: World) -> TopKSAE:
    """This process's part of an SAE; the SAE itself where latents are not spread."""
    return sae if world.shards == 1 else ShardedTopKSAE(sae, world)


@torch.no_grad()
def unsharded(sae: TopKSAE) -> TopKSAE | None:
    """The whole SAE, on the CPU of rank 0 (None elsewhere); all processes have to call this."""
    if not isinstance(sae, ShardedTopKSAE):
        return sae
    whole = None
    if sae.world.main:
        whole = TopKSAE(
            sae.d_model, sae.n_latents, sae.k, normalization=sae.normalization, relu=sae.relu
        )
    for name, tensor in sae.state_dict().items():
        full = gathered(tensor, shard_dim(name), sae.world)
        if whole is not None and full is not None:
            whole.get_parameter(name).copy_(full)
    return whole
