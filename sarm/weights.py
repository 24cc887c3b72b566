"""Where tensors come from: safetensors shards or one GGUF file, read one tensor at a time.

A source lists names without touching data and counts the bytes it reads, so that a caller who
needs half a checkpoint pays for half a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from sarm.errors import InputError

#: What plain weights are stored in; packed ones (int8, fp8) mean nothing without their scales.
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"


class WeightSource(Protocol):
    """Named tensors, read on demand."""

    bytes_read: int

    def names(self) -> Iterable[str]:
        """All tensor names, without reading data."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored (or dequantised) dtype."""
        ...

    def location(self, name: str) -> str:
        """The file that holds `name` (or should list it), for error messages."""
        ...

    def bytes_on_disk(self) -> int:
        """Size of the weight files; those of a hub repository that were never fetched count 0."""
        ...


def read_checked(
    source: WeightSource,
    name: str,
    like: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A tensor of a checkpoint; InputError: missing, misshapen, not plain floats, not finite.

    Args:
        like: its shape (perhaps on the meta device); one of integers demands its dtype.
        dtype: cast to it; None: as stored.
    """
    where = source.location(name)
    if name not in source.names():
        raise InputError(f"{where}: tensor {name} is missing")
    tensor = source.read(name)
    if tensor.shape != like.shape:
        raise InputError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}"
        )
    if not like.dtype.is_floating_point:
        if tensor.dtype != like.dtype:
            raise InputError(
                f"{where}: {name} is stored as {_kind(tensor.dtype)}, expected {_kind(like.dtype)}"
            )
        return tensor.to(device)
    if tensor.dtype not in STORED:
        raise InputError(
            f"{where}: {name} is stored as {_kind(tensor.dtype)}; quantised checkpoints "
            "cannot be read, take the original one"
        )
    tensor = tensor.to(device=device, dtype=dtype)
    if not torch.isfinite(tensor).all():  # after the cast: fp16 overflows at 65504
        raise InputError(f"{where}: {name} holds NaN or infinite values in {_kind(tensor.dtype)}")
    return tensor


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class SafetensorsSource:
    """A directory with `model.safetensors` or an index and its shards.

    Args:
        directory: local folder; shards that are never read need not be there.
        fetch: called with a file name before it is opened (a hub download); None for local.
    """

    def __init__(
        self, directory: Path, fetch: Callable[[str, bool], str | None] | None = None
    ) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._fetch = fetch
        self._open: dict[str, safe_open] = {}
        self._path: dict[str, Path] = {}
        self._lists_names = SAFETENSORS_INDEX
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        index = self._local(SAFETENSORS_INDEX, optional=True)
        if index is not None:
            try:
                return _checked_map(json.loads(index.read_text("utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index}: not a safetensors index ({error})") from error
        self._lists_names = SAFETENSORS_SINGLE
        single = self._local(SAFETENSORS_SINGLE, optional=True)
        if single is None:
            pickles = sorted(p.name for p in self.directory.glob("*.bin"))
            pickles += sorted(p.name for p in self.directory.glob("*.pt"))
            if pickles:
                raise InputError(
                    f"{self.directory}: only pickled weights ({pickles[0]}); they can run code "
                    "when opened, convert the checkpoint to safetensors first"
                )
            raise FileNotFoundError(
                f"{self.directory}: expected {SAFETENSORS_SINGLE}, {SAFETENSORS_INDEX} "
                "or a .gguf file"
            )
        return dict.fromkeys(self._handle(single.name).keys(), single.name)

    def _local(self, name: str, optional: bool = False) -> Path | None:
        path = self.directory / name
        if self._fetch is not None and not path.exists():
            fetched = self._fetch(name, optional)
            return None if fetched is None else Path(fetched)
        if path.exists():
            return path
        if optional:
            return None
        raise FileNotFoundError(f"{path}: listed in {SAFETENSORS_INDEX} but missing")

    def _handle(self, name: str) -> safe_open:
        if name not in self._open:
            path = self._local(name)
            assert path is not None  # only an optional file may be absent
            try:
                self._open[name] = safe_open(os.fspath(path), framework="pt")
                self._path[name] = path
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: corrupt or half-downloaded safetensors file ({error}); fetch it again"
                ) from error
        return self._open[name]

    def names(self) -> Iterable[str]:
        """All tensor names, without reading data."""
        return self._file_of.keys()

    def location(self, name: str) -> str:
        """The shard that holds `name`, or the file that should have listed it."""
        return str(self.directory / self._file_of.get(name, self._lists_names))

    def bytes_on_disk(self) -> int:
        """Size of the shards that are here (of a hub repository: that were opened)."""
        if self._fetch is not None:
            return sum(path.stat().st_size for path in self._path.values())
        files = {self.directory / name for name in self._file_of.values()}
        return sum(path.stat().st_size for path in files if path.is_file())

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        handle = self._handle(self._file_of[name])
        try:
            tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.location(name)}: cannot read {name} ({error})") from error
        self.bytes_read += tensor.nbytes
        return tensor


def _checked_map(weight_map: dict[str, str]) -> dict[str, str]:
    """The weight map of an index: file names in the same folder, nowhere else."""
    if not isinstance(weight_map, dict):
        raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{name} is said to be in {file!r}")
    return weight_map


class GgufSource:
    """A GGUF file under Hugging Face's tensor names, dequantised tensor by tensor.

    The name map is llama.cpp's own (`gguf.get_tensor_name_map`); two things its converter changed
    are undone: the interleaved rotary order of q and k (llama, mistral) and gemma's norm + 1.

    Args:
        path: the .gguf file.
        config: the full (uncut) backbone configuration.
        parameter_names: the names the caller will ask for, as in `model.state_dict()`.
    """

    def __init__(
        self, path: Path, config: PreTrainedConfig, parameter_names: Iterable[str]
    ) -> None:
        import gguf

        self.path = Path(path)
        self.config = config
        self.bytes_read = 0
        reader = open_gguf(self.path)
        architecture = reader.get_field("general.architecture").contents()
        arch = next((a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), None)
        if arch is None:
            raise InputError(f"{path}: GGUF architecture {architecture!r} is not known to gguf")
        name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._architecture = architecture
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self._tensors: dict[str, Any] = {}
        for name in parameter_names:
            key = name_map.get_name("model." + name, try_suffixes=(".weight", ".bias"))
            if key in stored:
                self._tensors[name] = stored[key]

    def names(self) -> Iterable[str]:
        """The parameters that the file holds, without reading data."""
        return self._tensors.keys()

    def location(self, name: str) -> str:
        """The file."""
        return str(self.path)

    def bytes_on_disk(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised."""
        import gguf

        stored = self._tensors[name]
        self.bytes_read += int(stored.n_bytes)
        tensor = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = (
                self.config.num_attention_heads
                if "q_proj" in name
                else self.config.num_key_value_heads
            )
            # rows of a head are stored as (dim/2, 2); Hugging Face wants (2, dim/2)
            tensor = tensor.view(heads, -1, 2, tensor.shape[-1]).transpose(1, 2)
            tensor = tensor.reshape(-1, tensor.shape[-1]).contiguous()
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor - 1.0
        return tensor


def open_gguf(path: Path):
    """A `gguf.GGUFReader`, or one clear line when the file is missing, cut short or not GGUF."""
    import gguf

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy raises on a short buffer
        raise InputError(f"{path}: corrupt or half-downloaded GGUF file ({error})") from error
