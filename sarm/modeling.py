"""The model: cut backbone -> TopK SAE on the scored token -> linear head on the active latents."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from sarm import ops
from sarm.backbone import (
    build_decoder,
    check_quantization,
    cut_config,
    locate,
    preferred_dtype,
    quiet_transformers,
)
from sarm.calibration import quantize_checkpoint, rows_for
from sarm.checkpoint import replace_files
from sarm.config import SarmConfig
from sarm.errors import InputError, first_line
from sarm.packing import last_state
from sarm.quantization import Int8Decoder
from sarm.quantization.bnb import bnb_linears
from sarm.quantization.loading import read_quantized
from sarm.sae import SparseAutoencoder, new_sae
from sarm.steering import Heads
from sarm.weights import read_checked


@dataclass
class SarmOutput(ModelOutput):
    """Rewards and what they are made of.

    loss: mean squared error against `labels` when given.  logits: (B, num_labels) fp32 rewards.
    latents, indices: (B, k) active latents of the scored token (None for activation "none").
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    latents: Tensor | None = None
    indices: Tensor | None = None


class SarmForSequenceClassification(PreTrainedModel):
    """A reward model whose score is an exact sum over k sparse features.

    The scored token is the last real one of each row, found from the attention mask and never from
    the pad id, so pad = eos, left and right padding all give the same score. Head, SAE biases and
    scores are fp32 in every dtype.
    """

    config_class = SarmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["score", "sae.pre_bias", "sae.latent_bias"]  # noqa: RUF012
    # the published files carry the final norm that the formula does not use
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^model\.norm\.",
        r"^lm_head\.",
        r"rotary_emb\.inv_freq",
    ]

    def __init__(self, config: SarmConfig) -> None:
        super().__init__(config)
        if not config.sarm:
            raise InputError("SarmForSequenceClassification: the config has no `sarm` section")
        backbone_config = config.backbone_config()
        backbone_config = cut_config(backbone_config, config.sarm["source_layer"])
        softcapped = getattr(backbone_config, "attn_logit_softcapping", None)
        attention = "eager" if softcapped else config._attn_implementation
        self.model = AutoModel.from_config(backbone_config, attn_implementation=attention)
        self.model.norm = nn.Identity()
        self.sae = new_sae(
            config.sarm["activation"],
            backbone_config.hidden_size,
            config.sarm["n_latents"],
            config.sarm["k"],
            normalization=config.sarm["normalization"],
            skip=config.sarm["skip"],
            dtype=torch.get_default_dtype(),  # transformers sets it to the requested dtype
        )
        if config.sarm["sae_dtype"] == "float32":  # beside a 16-bit backbone
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, "sae"]
        self.score = nn.Linear(
            config.sarm["n_latents"], config.num_labels or 1, bias=False, dtype=torch.float32
        )
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        backbone: PreTrainedModel | Int8Decoder,
        sae: SparseAutoencoder,
        head: Tensor,
        activation: str | None = None,
    ) -> SarmForSequenceClassification:
        """A SARM that shares the given cut backbone, SAE and head weight (P, n_latents).

        activation: None: the SAE's own; "none": linear in all latents of a signed TopK SAE.
        """
        allowed = (sae.activation, "none") if sae.activation == "topk" else (sae.activation,)
        if activation not in (None, *allowed):
            raise InputError(
                f"activation must be one of {allowed} with this SAE, got {activation!r}"
            )
        if sae.d_model != backbone.config.hidden_size:
            raise InputError(
                f"the SAE has d_model={sae.d_model}, the backbone {backbone.config.hidden_size}"
            )
        if head.ndim != 2 or head.shape[1] != sae.n_latents:
            raise InputError(
                f"head must have shape (P, n_latents={sae.n_latents}), got {tuple(head.shape)}"
            )
        sae_dtype = sae.encoder.weight.dtype
        int8 = isinstance(backbone, Int8Decoder)
        dtype: Any = backbone.attention_dtype if int8 else backbone.dtype
        config = SarmConfig.from_backbone(
            backbone.config,
            n_latents=sae.n_latents,
            k=sae.k,
            activation=activation or sae.activation,
            normalization=sae.normalization,
            skip=sae.skip is not None,
            sae_dtype=None if sae_dtype == dtype else str(sae_dtype).split(".")[-1],
            quantization="int8" if int8 else None,
        )
        config.num_labels = head.shape[0]
        config.dtype = dtype
        with torch.device("meta"):
            model = cls(config)
        model.model, model.sae = backbone, sae
        model.score.weight = nn.Parameter(head.detach().float().to(backbone.device))
        return model.eval()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SparseAutoencoder):
            return  # initialised in its constructor; its parts must not be drawn again
        if module is getattr(self, "score", None):
            nn.init.zeros_(module.weight)  # as published
        elif not any(module is m for m in self.sae.modules()):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, path_or_id, *model_args, **kwargs):  # type: ignore[override]
        """Load our layout or the published one; as in transformers, but a bad file is an error.

        Missing tensors, wrong shapes and non-finite values raise InputError instead of leaving
        random weights behind; layers beyond the cut are passed over. No remote code is ever run.
        device: where the model is put (default: as transformers does).  dtype: None keeps the
        checkpoint's (of the backbone and of the SAE), but fp32 on a CPU that would emulate bf16.
        quantization: "int8" or "bnb-int8" for the backbone, as in `load_backbone`; SAE and head
        are never quantised. A checkpoint saved in 8 bits is read back as such.
        decoder: False leaves the SAE's decoder out, which rewards do not need; such a model cannot
        be saved.
        """
        text = os.fspath(path_or_id)
        looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1
        if looks_local and not os.path.isdir(os.path.expanduser(text)):
            raise FileNotFoundError(f"{text}: no such checkpoint directory")
        text = os.path.expanduser(text) if looks_local else text
        for name in ("trust_remote_code", "ignore_mismatched_sizes"):
            kwargs.pop(name, None)
        config = kwargs.pop("config", None)
        kwargs.pop("num_labels", None)  # one reward per row of the head, whatever is asked for
        with_info = kwargs.pop("output_loading_info", False)
        asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        asked = None if asked == "auto" else asked
        device = kwargs.pop("device", None)
        quantization = kwargs.pop("quantization", None)
        decoder = kwargs.pop("decoder", True)
        check_quantization(cls.__name__, quantization)
        place = torch.device(device or ("cuda" if kwargs.get("device_map") else "cpu"))
        try:
            with quiet_transformers():
                if looks_local and not os.path.isfile(os.path.join(text, "config.json")):
                    raise InputError("no config.json, not a checkpoint")
                if not isinstance(config, SarmConfig):
                    hub = {"revision": kwargs["revision"]} if kwargs.get("revision") else {}
                    config = SarmConfig.from_pretrained(text, **hub)
                config = copy.deepcopy(config)
                if not config.sarm:
                    raise InputError("config: the `sarm` section is empty")
                if asked is not None:  # for backbone and SAE alike
                    config.sarm["sae_dtype"] = None
                kwargs["dtype"] = asked or preferred_dtype(place, config.dtype)
                if quantization == "int8" or config.sarm["quantization"] == "int8":
                    if quantization == "bnb-int8":
                        raise InputError('saved in 8 bits ("int8"), cannot become "bnb-int8"')
                    revision = kwargs.get("revision")
                    model = cls._in_8_bits(text, config, kwargs["dtype"], place, revision, decoder)
                    return (model, {}) if with_info else model
                loaded: Any = super().from_pretrained(
                    text,
                    *model_args,
                    config=config,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                    **kwargs,
                )
        except InputError as error:
            raise InputError(f"{text}: {error}") from error
        except Exception as error:  # safetensors, hub, json and shape errors of every kind
            raise InputError(f"{text}: cannot load the checkpoint ({first_line(error)})") from error
        model, info = loaded
        if info["mismatched_keys"]:
            name, got, expected = sorted(info["mismatched_keys"])[0]
            raise InputError(f"{text}: {name} has shape {tuple(got)}, expected {tuple(expected)}")
        for kind in ("missing_keys", "unexpected_keys"):
            names = sorted(n for n in info[kind] if not model._is_dropped(n))
            if names:
                raise InputError(
                    f"{text}: {kind.replace('_keys', '')} tensor {names[0]} ({len(names)} in all)"
                )
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{text}: {name} holds NaN or infinite values")
        if not decoder:
            model.sae.drop_decoder()
        model._restore_sae_dtype()
        model.sae.lay_out_by_latent()
        if quantization == "bnb-int8":
            bnb_linears(model.model)
        if device is not None:
            model.to(device)
        return (model, info) if with_info else model

    @classmethod
    def _in_8_bits(
        cls,
        text: str,
        config: SarmConfig,
        dtype: torch.dtype,
        device: torch.device,
        revision: str | None,
        decoder: bool,
    ) -> SarmForSequenceClassification:
        """Backbone layer by layer, then SAE and head; files in floating point or in 8 bits."""
        backbone_config = cut_config(config.backbone_config(), config.sarm["source_layer"])
        skeleton = build_decoder(backbone_config)
        source = locate(text, revision=revision).weights(backbone_config, [])
        saved = config.sarm["quantization"] == "int8"
        backbone: Int8Decoder
        if saved:
            backbone = read_quantized(skeleton, source, "model.", dtype, device)
        else:
            rows = rows_for(text, backbone_config.vocab_size, revision)
            backbone = quantize_checkpoint(skeleton, source, "model.", dtype, device, rows)
        with torch.device("meta"):
            model = cls(config)
        own = {n: like for n, like in model.state_dict().items() if not n.startswith("model.")}
        parts = [f"model.{name}" for name in (backbone if saved else skeleton).state_dict()]
        ignored = "|".join(cls._keys_to_ignore_on_load_unexpected)
        strange = sorted(
            name
            for name in set(source.names()) - {*parts, *own}
            if not model._is_dropped(name) and not re.search(ignored, name)
        )
        if strange:
            raise InputError(f"unexpected tensor {strange[0]} ({len(strange)} in all)")
        if not decoder:
            model.sae.drop_decoder()
            own = {name: like for name, like in own.items() if name in model.state_dict()}
        wanted = config.sarm["sae_dtype"]
        sae_dtype = preferred_dtype(device, getattr(torch, wanted)) if wanted else dtype
        kept = {}
        for name, like in own.items():
            kind = sae_dtype if like.ndim == 2 and name.startswith("sae.") else torch.float32
            kept[name] = read_checked(source, name, like, dtype=kind, device=device)
        model.load_state_dict(kept, strict=False, assign=True)
        model.model = backbone
        config.sarm["quantization"], config.dtype = "int8", dtype
        model.sae.lay_out_by_latent()
        return model.eval()

    def _is_dropped(self, name: str) -> bool:
        """Whether a tensor belongs to a layer beyond the cut (files of an uncut backbone)."""
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return found is not None and int(found.group(1)) >= self.config.sarm["source_layer"]

    def _restore_sae_dtype(self) -> None:
        """Give a 16-bit SAE beside an fp32 backbone its dtype back: the values are the same."""
        wanted = self.config.sarm["sae_dtype"]
        if wanted is None:
            return
        dtype = preferred_dtype(self.device, getattr(torch, wanted))
        for linear in filter(None, (self.sae.encoder, self.sae.decoder)):
            linear.weight.data = linear.weight.data.to(dtype)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers, but all files are written aside first and then moved into place."""
        if self.sae.decoder is None:
            raise InputError("a model loaded without its SAE's decoder cannot be saved")
        if getattr(self.model, "is_loaded_in_8bit", False):
            raise InputError(
                'quantization "bnb-int8" is made while loading and cannot be saved; '
                'save the original, or "int8"'
            )
        self.config.architectures = [type(self).__name__]
        if kwargs.get("push_to_hub"):  # else it would be named after the staging folder
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replace_files(save_directory) as staging:
            super().save_pretrained(staging, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone (of attention, where its weights are 8-bit); saved in the config."""
        backbone: Any = self.model
        return backbone.attention_dtype if isinstance(backbone, Int8Decoder) else backbone.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SarmOutput:
        """Rewards of a batch.

        Args:
            input_ids: (B, T) token ids, padded on either side.
            attention_mask: (B, T), nonzero at real tokens; None: every token is real.
            labels: (B,) or (B, num_labels) target rewards, for a squared-error loss.
        Returns:
            SarmOutput with logits (B, num_labels) fp32.
        """
        ids, lengths = real_tokens(input_ids, attention_mask)
        return self.from_states(last_state(self.model, ids, lengths), labels)

    def from_states(self, states: Tensor, labels: Tensor | None = None) -> SarmOutput:
        """Rewards of scored-token states (B, d_model), the backbone's output."""
        if self.config.sarm["activation"] != "none":
            vals, idx = self.sae.encode(states)
            if self.config.sarm["steering"]:  # clamps or a gate: no head weight says them
                rewards = Heads(self, self.score.weight).from_latents(vals, idx)
            else:
                rewards = ops.sparse_value(vals, idx, self.score.weight.float())
            active = {"latents": vals, "indices": idx}
        else:
            active = {}
            direction, offset = self.folded()
            rewards = self.sae.normalize(states) @ direction.t() + offset
        loss = None
        if labels is not None:
            loss = nn.functional.mse_loss(rewards, labels.float().view_as(rewards))
        return SarmOutput(loss=loss, logits=rewards, **active)

    def folded(self, head: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(P, d_model) and (P,): without TopK r = (W_enc^T w)(x - b_pre) + w b_lat, linear in x.

        Cost O(P d_model) a token instead of O(n_latents d_model). Summed in fp64, a slice of the
        encoder at a time. head: (P, n_latents) in place of the model's own.
        """
        head = (self.score.weight if head is None else head).double()
        direction = head.new_zeros(head.shape[0], self.sae.d_model)
        for part, rows in zip(
            head.split(4096, dim=1), self.sae.encoder.weight.split(4096), strict=True
        ):
            direction = direction + part @ rows.double()
        offset = head @ self.sae.latent_bias.double() - direction @ self.sae.pre_bias.double()
        return direction.float(), offset.float()


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T') right-padded ids and (B,) lengths of the tokens the mask keeps, in order."""
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}")
    rows, width = input_ids.shape
    if rows and not width:
        raise InputError(f"input_ids must hold at least one token a row, got {(rows, width)}")
    if attention_mask is None:
        return input_ids, torch.full((rows,), width, device=input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask must have shape {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    keep = attention_mask != 0
    lengths = keep.sum(1)
    if rows and int(lengths.min()) == 0:
        raise InputError(f"row {int(lengths.argmin())}: the attention mask keeps no token")
    # a stable sort of "is padding" moves real tokens to the left without reordering them
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(lengths.max()) if rows else width
    return input_ids.gather(1, order)[:, :longest], lengths


AutoConfig.register("sarm", SarmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    SarmConfig, SarmForSequenceClassification, exist_ok=True
)
