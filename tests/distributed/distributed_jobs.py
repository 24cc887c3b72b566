"""What the processes of tests/distributed run; a module of its own so that they can import it."""

import datetime
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm
import torch
import torch.distributed as dist

from sarm.backbone import load_backbone, load_tokenizer
from sarm.data import Record, to_pair
from sarm.sae import TopKSAE
from sarm.tokens import ConversationEncoder
from sarm.training import stream
from sarm.training.collate import PairDataset
from sarm.training.distributed import ShardedTopKSAE, World
from sarm.training.distributed.sharded_sae import unsharded
from sarm.training.distributed.world import grid
from sarm.training.end_to_end import save_pairs, train_pairs
from sarm.training.sae import SaeTrainer
from sarm.training.trainer import PairTrainConfig

TEXTS = tiny_sarm.make_texts(24)


def run(pipe, store, rank, size, job, args):
    """The life of a process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=60),
            )
        send(pipe, "value", job(*args))
    except BaseException as error:
        send(pipe, "error", error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def send(pipe, kind, value):
    """Tensors as bytes: shared memory would go with this process."""
    buffer = io.BytesIO()
    torch.save((kind, value), buffer)
    pipe.send_bytes(buffer.getvalue())


def world_of(shards):
    return World(grid("cpu", shards)) if dist.is_initialized() else World()


# ---- the sharded SAE -------------------------------------------------------------------------


def small_sae(n_latents=48, k=20, d_model=16, seed=0):
    torch.manual_seed(seed)
    sae = TopKSAE(d_model, n_latents, k, normalization="none")
    with torch.no_grad():
        sae.pre_bias.normal_()
        sae.latent_bias.normal_()
    return sae


def encode_and_differentiate(shards, n_latents, k):
    """Encoding, reconstruction and gradients of a sharded SAE, put together again."""
    sae = ShardedTopKSAE(small_sae(n_latents, k), world_of(shards))
    torch.manual_seed(1)
    x = torch.randn(33, sae.d_model)
    latents = sae.encode_normalized(x)
    decoded = sae.decode(latents)
    (decoded - x).square().sum().backward()
    whole = sae.whole_latents(latents)
    with torch.no_grad():
        gradients = ShardedTopKSAE(small_sae(n_latents, k), sae.world)
        for name, parameter in sae.named_parameters():
            gradients.get_parameter(name).copy_(parameter.grad)
    found = unsharded(gradients)
    return (
        tuple(t.clone() for t in whole),
        decoded.detach(),
        None if found is None else {n: p.detach() for n, p in found.named_parameters()},
    )


# ---- SAE training ----------------------------------------------------------------------------


def train_sae(backbone_dir, out, config, shards=1, kill_at=None, conversations=False):
    """Losses by step, of rank 0; `kill_at`: this step ends every process."""
    stream.PIECE = 16
    backbone, tokenizer = load_backbone(backbone_dir, device="cpu"), load_tokenizer(backbone_dir)
    trainer = SaeTrainer(backbone, tokenizer, config, out, log_every=1, world=world_of(shards))
    losses = []

    def on_step(metrics):
        losses.append(metrics["loss"])
        if metrics["step"] == kill_at:
            raise KeyboardInterrupt

    talks = [
        (f"row {i}", [*row["prompt"], *row["chosen"]])
        for i, row in enumerate(tiny_sarm.make_pairs(12))
    ]
    try:
        report = trainer.run(
            lambda: iter(TEXTS), (lambda: iter(talks)) if conversations else None, on_step=on_step
        )
    except KeyboardInterrupt:
        return losses, None
    return losses, report


# ---- reward models ---------------------------------------------------------------------------

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def train_pairs_of(backbone_dir, out, mode, n_pairs=22, fsdp=False, kill_at=None, valid=False):
    """(log, whether this is rank 0); `kill_at`: this step ends every process."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if fsdp:
        os.environ.update(FSDP2)
    tokenizer, backbone = load_tokenizer(backbone_dir), load_backbone(backbone_dir, device="cpu")
    encoder = ConversationEncoder(tokenizer, 512)

    def pairs(count, seed):
        rows = tiny_sarm.make_pairs(count, seed=seed)
        made = [to_pair(Record(f"pairs:{i}", row)) for i, row in enumerate(rows)]
        return PairDataset(made, encoder, backbone.config.vocab_size, turns=True)

    torch.manual_seed(0)
    sae = TopKSAE(32, 128, 8)
    config = PairTrainConfig(
        mode, epochs=2, batch_size=8, micro_batch=2, lr=1e-3, lr_sae=2e-3, lr_head=3e-3, clip=0.5,
        eval_every=2, weight_decay=0.01,
    )  # fmt: skip

    def progress(step, of, logs):
        if step == kill_at and "loss" in logs:
            raise KeyboardInterrupt

    head = 0.1 * torch.randn(1, 128)
    try:
        fit = train_pairs(
            backbone, sae, pairs(n_pairs, 0), config, out, head=head, progress=progress,
            valid=pairs(7, 1) if valid else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        return None
    save_pairs(fit, tokenizer, out, {})
    return fit.log
