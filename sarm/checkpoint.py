"""Checkpoints on disk: written whole or not at all; SAEs in our layout and the published one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.errors import InputError, first_line
from sarm.sae import TopKSAE

SAE_WEIGHTS = "sae.safetensors"
SAE_CONFIG = "sae.json"
SAE_TENSORS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")


@contextlib.contextmanager
def replace_files(directory: str | os.PathLike) -> Iterator[Path]:
    """A staging folder beside the final files; on success its files are fsynced and moved in.

    If anything fails (a full disk) the files already in `directory` are as they were; a kill can
    only harm while the finished files are being moved. Other files in `directory` stay. Weights
    are moved before `*.json`, so a config never names weights that are not there yet.
    """
    target = Path(directory)
    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    complete = False
    try:
        yield staging
        _move_in(staging, target)
        complete = True
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and not complete:
            with contextlib.suppress(OSError):  # not empty: somebody else writes there
                target.rmdir()


def _move_in(staging: Path, target: Path) -> None:
    """Move all files of `staging` into `target`; on an error put the old ones back."""
    sources = sorted(p for p in staging.rglob("*") if p.is_file())
    sources.sort(key=lambda p: p.suffix == ".json")  # stable: weights first
    for file in sources:
        _fsync(file)
    names = [file.relative_to(staging) for file in sources]
    old = {name for name in names if (target / name).is_file()}
    stale: set[Path] = set()
    if any(name.match("model*.safetensors") for name in names):
        # a model saved over one with other shards must not leave them or their index behind
        stale = {path.relative_to(target) for path in target.glob("model*.safetensors*")}
    backup = staging / ".old"
    for name in old | stale:  # second names for the old files, not copies
        (backup / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a file system without hard links: no way back
            os.link(target / name, backup / name)
    moved: list[Path] = []
    try:
        for file, name in zip(sources, names, strict=True):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target / name)
            moved.append(name)
        for name in stale - set(names):
            (target / name).unlink()
        _fsync(target)
    except BaseException:
        for name in moved:
            if name not in old:
                (target / name).unlink()
        for name in old | stale:
            if (backup / name).exists():
                (backup / name).rename(target / name)
        raise


@contextlib.contextmanager
def replace_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """An open file that becomes `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_sae(sae: TopKSAE, directory: str | os.PathLike, extra: dict | None = None) -> None:
    """Write `sae.safetensors` (published names and shapes) and `sae.json`; see `load_sae`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    config = {
        "d_model": sae.d_model,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "normalization": sae.normalization,
        **(extra or {}),
    }
    with replace_files(directory) as staging:
        save_file(tensors, staging / SAE_WEIGHTS)
        (staging / SAE_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def load_sae(path: str | os.PathLike, *, k: int | None = None) -> TopKSAE:
    """The SAE of a folder `sarm train-sae` wrote, of a SARM checkpoint, or of a published `.pt`.

    A `.pt` is opened with `weights_only=True`; its k is read from a file name such as
    `..._Latent65536_Layer16_K192_...pt` unless `k` is given.

    Raises:
        FileNotFoundError: nothing there;  InputError: corrupt or unsafe file, missing tensors,
        wrong shapes, k out of range.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix in (".pt", ".pth"):
        config: dict[str, Any] = {"k": _k_of_name(path.name)}
        tensors = _read_pt(path)
    elif (path / SAE_WEIGHTS).is_file():
        tensors, config = _read_safetensors(path / SAE_WEIGHTS), _read_json(path / SAE_CONFIG)
    elif (path / "config.json").is_file():
        tensors, config = _sae_of_sarm(path)
    elif path.exists():
        raise InputError(f"{path}: expected {SAE_WEIGHTS}, a SARM checkpoint or a .pt file")
    else:
        raise FileNotFoundError(f"{path}: no such SAE")
    k = k if k is not None else config.get("k")
    if k is None:
        raise InputError(f"{path}: neither its config nor its name gives k; pass k")
    if isinstance(k, bool) or not isinstance(k, int):
        raise InputError(f"{path}: k must be an integer, got {k!r}")
    return _build_sae(path, tensors, k, config.get("normalization", "token"))


def _build_sae(path: Path, tensors: dict[str, Tensor], k: int, normalization: str) -> TopKSAE:
    missing = [name for name in SAE_TENSORS if name not in tensors]
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing")
    shape = tuple(tensors["encoder.weight"].shape)
    if len(shape) != 2:
        raise InputError(f"{path}: encoder.weight has shape {shape}, expected (n_latents, d_model)")
    n_latents, d_model = shape
    dtype = tensors["encoder.weight"].dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"{path}: encoder.weight is stored as {kind}, expected plain floats")
    try:
        sae = TopKSAE(d_model, n_latents, k, normalization=normalization, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for name, parameter in sae.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values")
        parameter.copy_(tensor)
    return sae.eval()


def _sae_of_sarm(path: Path) -> tuple[dict[str, Tensor], dict]:
    from sarm.config import SarmConfig
    from sarm.weights import SafetensorsSource

    try:
        config = SarmConfig.from_dict(_read_json(path / "config.json")).sarm
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    source = SafetensorsSource(path)
    stored = set(source.names())
    names = [n for n in SAE_TENSORS if f"sae.{n}" in stored]
    return {name: source.read(f"sae.{name}") for name in names}, config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: corrupt or half-written safetensors file ({error})") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, and whatever a damaged archive leads to
        raise InputError(
            f"{path}: refused, it is corrupt or holds more than plain tensors "
            f"({first_line(error)[:120]})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _k_of_name(name: str) -> int | None:
    found = re.search(r"_K(\d+)(?:_|\.|$)", name)
    return int(found.group(1)) if found else None


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with safe_open(os.fspath(path), framework="pt") as file:
        return file.metadata() or {}
