"""The half backbone: a decoder cut at its middle layer, built and read without the other half."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from sarm.errors import InputError, first_line
from sarm.hub import hub_file
from sarm.weights import (
    GgufSource,
    SafetensorsSource,
    WeightSource,
    open_gguf,
    read_checked,
)

if TYPE_CHECKING:
    from sarm.quantization import Int8Decoder

#: Decoders whose layer stack, rotary embedding and final norm are laid out as in Llama.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
QUANTIZATIONS = (None, "int8", "bnb-int8")


@dataclass(frozen=True)
class LoadReport:
    """What loading a backbone read: `bytes_read` of tensor data out of `bytes_on_disk`."""

    source: str
    source_layers: int
    kept_layers: int
    bytes_read: int
    bytes_on_disk: int


def load_backbone(
    path_or_id: str | os.PathLike,
    layer: int | str = "middle",
    *,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel | Int8Decoder:
    """The first `layer` decoder layers of a causal language model, without its final norm.

    Only the tensors of the kept layers are read (and, from the hub, only the shards that hold
    them are fetched); the other layers are never built. `backbone.load_report` says how many bytes
    were read.

    Args:
        path_or_id: directory with config.json and safetensors, a .gguf file (or a directory with
            one), or a hub id. Llama, Mistral, Qwen2, Qwen3 and Gemma-2 configurations.
        layer: "middle" (n_layers // 2) or the number of layers to keep, 1 .. n_layers.
        quantization: None: the weights stay in `dtype`.  "int8": W8A8 in a rotated basis, quantised
            while reading, layer by layer (`sarm.quantization`; not for Gemma-2), and calibrated on
            the scored token where the tokenizer has a chat template (`sarm.calibration`).
            "bnb-int8": bitsandbytes' LLM.int8 linears, to save memory; slower than `dtype`'s.
        dtype: of weights that are not 8-bit (embedding) and of attention. None: the checkpoint's
            dtype, but fp32 on a CPU without bf16 instructions, where bf16 products are several
            times slower.
        device: None: cuda when there is one, else cpu.
        gguf_file: name of the .gguf inside `path_or_id` (needed only for hub ids).
        revision: hub revision.
    Returns:
        the transformers decoder (e.g. `LlamaModel`) in eval mode, `norm` replaced by the identity;
        `backbone(ids).last_hidden_state` is the residual stream after the last kept layer. With
        "int8" an `Int8Decoder` with the same calling convention.
    Raises:
        FileNotFoundError: no checkpoint there;  InputError: unknown architecture, layer out of
        range, missing or misshapen tensors, corrupt files, non-finite weights.
    """
    check_quantization("load_backbone", quantization)
    origin = locate(path_or_id, gguf_file=gguf_file, revision=revision)
    full = origin.config()
    kept = resolve_layer(layer, full.num_hidden_layers)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = cut_config(full, kept)
    try:
        model: Any = build_decoder(config)
    except Exception as error:  # whatever the architecture makes of, say, zero attention heads
        raise InputError(f"{path_or_id}: the config fits no model ({first_line(error)})") from error
    names = list(model.state_dict())
    source = origin.weights(full, names)
    dtype = dtype or preferred_dtype(device, full.dtype)
    if quantization == "int8":
        from sarm.calibration import quantize_checkpoint, rows_for

        rows = rows_for(path_or_id, config.vocab_size, revision, gguf_file)
        model = quantize_checkpoint(model, source, prefix_in(source), dtype, device, rows)
    else:
        fill(model, source, dtype=dtype, device=device)
    if quantization == "bnb-int8":
        from sarm.quantization.bnb import bnb_linears

        bnb_linears(model)
    model.config.dtype = dtype
    model.load_report = LoadReport(
        source=str(path_or_id),
        source_layers=full.num_hidden_layers,
        kept_layers=kept,
        bytes_read=source.bytes_read,
        bytes_on_disk=source.bytes_on_disk(),
    )
    return model.eval()


def check_quantization(who: str, quantization: str | None) -> None:
    """InputError for an unknown kind."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise InputError(f"{who}: quantization must be one of {known}, got {quantization!r}")


def load_tokenizer(path_or_id: str | os.PathLike, *, gguf_file=None, revision=None):
    """The checkpoint's tokenizer (from its GGUF metadata when that is all there is)."""
    origin = locate(path_or_id, gguf_file=gguf_file, revision=revision)
    kwargs: dict[str, Any] = {"gguf_file": origin.gguf_file} if origin.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(origin.root, revision=revision, **kwargs)
    except Exception as error:  # the tokenizers library raises plain Exception on a broken file
        raise InputError(f"{path_or_id}: no usable tokenizer ({first_line(error)})") from error


def resolve_layer(layer: int | str, n_layers: int) -> int:
    """Number of layers to keep; "middle" is n_layers // 2 (at least one)."""
    if layer == "middle" and n_layers > 0:
        return max(1, n_layers // 2)
    try:
        # a command line gives "12"; 2.5 or True are mistakes
        kept = int(layer) if isinstance(layer, str) else index(layer)
    except (TypeError, ValueError):
        kept = 0
    if isinstance(layer, bool) or not 1 <= kept <= n_layers:
        raise InputError(f'layer must be "middle" or in [1, {n_layers}], got {layer!r}')
    return kept


def cut_config(config: PreTrainedConfig, kept: int) -> PreTrainedConfig:
    """A copy of the backbone configuration with `kept` layers; checks the architecture."""
    if config.model_type not in SUPPORTED:
        raise InputError(
            f"unknown backbone architecture {config.model_type!r}; "
            f"supported: {', '.join(SUPPORTED)}"
        )
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = kept
    if getattr(cut, "layer_types", None):
        cut.layer_types = list(cut.layer_types)[:kept]
    cut.use_cache = False
    cut.architectures = None
    return cut


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The cut decoder with parameters on the meta device and real (rotary) buffers, no norm."""
    # soft-capped attention scores exist only in the eager implementation
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, attn_implementation=attention)
    model.norm = nn.Identity()
    return model


def fill(
    model: nn.Module, source: WeightSource, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter of `model` its tensor from `source`, one at a time, checked."""
    prefix = prefix_in(source)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        state[name] = read_checked(source, prefix + name, parameter, dtype=dtype, device=device)
    model.load_state_dict(state, assign=True)
    model.to(device)  # buffers
    model.requires_grad_(True)


def prefix_in(source: WeightSource) -> str:
    """What stands before the decoder's tensor names in a checkpoint."""
    return "model." if any(name.startswith("model.") for name in source.names()) else ""


def preferred_dtype(device: torch.device, stored: torch.dtype | str | None) -> torch.dtype:
    """The checkpoint's dtype, except on a CPU that would emulate it."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return stored if isinstance(stored, torch.dtype) else torch.float32


# ---- where a checkpoint lies ---------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """A checkpoint's place: a folder (perhaps a hub snapshot) and the GGUF inside it, if any."""

    root: str
    gguf_file: str | None
    revision: str | None
    on_hub: bool

    def config(self) -> PreTrainedConfig:
        """The full backbone's configuration."""
        kwargs: dict[str, Any] = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(self.root, revision=self.revision, **kwargs)
        except Exception as error:  # json, hub, validation and, for GGUF, struct errors
            if self.gguf_file and not self.on_hub:
                open_gguf(Path(self.root, self.gguf_file))  # says so if the file is cut short
            where = os.path.join(self.root, self.gguf_file) if self.gguf_file else self.root
            raise InputError(f"{where}: no usable config ({first_line(error)})") from error
        return config

    def weights(self, config: PreTrainedConfig, names: list[str]) -> WeightSource:
        """Where the tensors come from."""
        if self.gguf_file:
            return GgufSource(Path(self._file(self.gguf_file)), config, names)
        if self.on_hub:
            return SafetensorsSource(Path(self.root), fetch=self._fetch)
        return SafetensorsSource(Path(self.root))

    def _file(self, name: str) -> str:
        fetched = self._fetch(name, False) if self.on_hub else None
        return fetched or os.path.join(self.root, name)

    def _fetch(self, name: str, optional: bool) -> str | None:
        return hub_file(self.root, name, self.revision, optional=optional)


def locate(path_or_id: str | os.PathLike, *, gguf_file=None, revision=None) -> Origin:
    """Decide whether `path_or_id` is a folder, a GGUF file or a hub id."""
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: expected a checkpoint directory or a .gguf file")
        return Origin(str(path.parent), path.name, None, on_hub=False)
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").exists():
            found = sorted(p.name for p in path.glob("*.gguf"))
            if not found:
                raise FileNotFoundError(f"{path}: expected config.json or a .gguf file in it")
            if len(found) > 1:
                raise InputError(f"{path}: several .gguf files, name one of {', '.join(found)}")
            gguf_file = found[0]
        return Origin(str(path), gguf_file, None, on_hub=False)
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".gguf")
    if looks_local or "/" not in text:
        raise FileNotFoundError(f"{text}: no such file or directory (nor a hub id, owner/name)")
    return Origin(text, gguf_file, revision, on_hub=True)


class quiet_transformers:
    """Context: transformers logs errors only (its GGUF path warns about normal things)."""

    def __enter__(self) -> None:
        self._level = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()

    def __exit__(self, *exc) -> None:
        hf_logging.set_verbosity(self._level)
