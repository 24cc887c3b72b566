"""Configuration of a SARM: the backbone's own fields, cut depth included, plus a `sarm` section."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, PreTrainedConfig

from sarm.errors import InputError
from sarm.sae import ACTIVATIONS, NORMALIZATIONS

SAE_DTYPES = (None, "float32", "bfloat16", "float16")
STORED_QUANTIZATIONS = (None, "int8")


class SarmConfig(PreTrainedConfig):
    """Configuration of `SarmForSequenceClassification`.

    The backbone's fields (hidden_size, num_hidden_layers, rope_parameters, ...) stand at the top
    level, as in its own config.json; the `sarm` section adds:

    - backbone_type: the backbone's model type ("llama", "mistral", "qwen2", "qwen3", "gemma2");
    - source_layer: number of decoder layers kept;
    - n_latents, k: width of the SAE and active latents per token ("jumprelu": columns to begin
      with; they grow when a row has more);
    - activation: "topk" (signed), "topk_relu", "jumprelu" (above a threshold), or "none" for a
      SARM whose reward is linear in all latents;
    - normalization: "token" (per-token mean and unbiased std, eps 1e-6), "layer_norm" (the same,
      eps 1e-5), "constant_norm" (norm sqrt(d_model)) or "none";
    - skip: whether the SAE has a skip connection (it plays no part in a reward);
    - sae_dtype: "float32" etc. where the SAE's weights are not in the backbone's dtype, else None;
    - quantization: "int8" where the files hold the backbone in 8 bits (`sarm.quantization`), else
      None;
    - steering: clamps and gate of a steered model (`sarm.steering.files`), else None.

    The published `sarm_param` section (arXiv 2508.08746) is read as well.
    """

    model_type = "sarm"

    def __init__(self, sarm: dict | None = None, **kwargs) -> None:
        if not kwargs.get("id2label"):
            kwargs.setdefault("num_labels", 1)
        kwargs.setdefault("problem_type", "regression")
        super().__init__(**kwargs)
        if sarm is not None and not isinstance(sarm, dict):
            raise InputError(f"config: sarm must be an object, got {type(sarm).__name__}")
        self.sarm = dict(sarm or {})
        if self.sarm:
            self._check()

    def _check(self) -> None:
        section = self.sarm
        section.setdefault("activation", "topk")
        section.setdefault("normalization", "token")
        section.setdefault("sae_dtype", None)
        section.setdefault("quantization", None)
        section.setdefault("skip", False)
        section.setdefault("steering", None)
        for name in ("backbone_type", "source_layer", "n_latents", "k"):
            if name not in section:
                raise InputError(f"config: sarm.{name} is missing")
        for name in ("source_layer", "n_latents", "k"):
            value = section[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"config: sarm.{name} must be a positive integer, got {value!r}")
        n_latents, k = section["n_latents"], section["k"]
        if not 1 <= k <= n_latents:
            raise InputError(f"config: sarm.k must be in [1, n_latents={n_latents}], got {k}")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("normalization", NORMALIZATIONS),
            ("sae_dtype", SAE_DTYPES),
            ("quantization", STORED_QUANTIZATIONS),
            ("skip", (False, True)),
        ):
            if section[name] not in allowed:
                raise InputError(
                    f"config: sarm.{name} must be one of {allowed}, got {section[name]!r}"
                )
        if section["steering"] is not None:
            self._check_steering()

    def _check_steering(self) -> None:
        from sarm.steering.files import profile_from_fields

        where = "config: sarm.steering"
        if self.sarm["activation"] == "none":
            raise InputError(f'{where}: needs active latents, the activation is "none"')
        profile = profile_from_fields(self.sarm["steering"], where)
        profile.check_features(self.sarm["n_latents"], where)

    @classmethod
    def from_backbone(cls, backbone: PreTrainedConfig, **section) -> SarmConfig:
        """Configuration for a cut backbone and the fields of the `sarm` section."""
        fields = backbone.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
            fields.pop(name, None)
        for name in ("id2label", "label2id", "num_labels", "problem_type"):
            fields.pop(name, None)
        section.setdefault("source_layer", backbone.num_hidden_layers)
        section["backbone_type"] = backbone.model_type
        return cls(sarm=section, **fields)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; a published `sarm_param` section becomes a `sarm` section."""
        if "sarm" not in config_dict and "sarm_param" not in config_dict:
            kind = config_dict.get("model_type")
            raise InputError(
                f"config: no `sarm` section (model_type {kind!r}): not a SARM checkpoint"
            )
        if "sarm" not in config_dict:
            config_dict = _from_published(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict:
        """As in transformers, with the labels: two rewards are its default, and would be lost."""
        return super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}

    def backbone_config(self) -> PreTrainedConfig:
        """The cut backbone's configuration in its own class."""
        fields = self.to_dict()
        for name in ("sarm", "model_type", "architectures", "transformers_version"):
            fields.pop(name, None)
        for name in ("id2label", "label2id", "problem_type"):
            fields.pop(name, None)
        return _backbone_class(self.sarm["backbone_type"])(**fields)


def _backbone_class(backbone_type: str) -> type[PreTrainedConfig]:
    try:
        return CONFIG_MAPPING[backbone_type]
    except KeyError:
        raise InputError(f"config: unknown backbone type {backbone_type!r}") from None


def _from_published(config_dict: dict) -> dict:
    """The published layout: model_type "llama", depth maybe uncut, settings in `sarm_param`."""
    fields = dict(config_dict)
    published = fields.pop("sarm_param")
    try:
        layer = int(published["sae_source_layer"])
        n_latents, k = int(published["sae_latent_size"]), int(published["sae_k"])
    except KeyError as error:
        raise InputError(f"config: sarm_param.{error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"config: sarm_param is not usable ({error})") from error
    use_topk = published.get("sarm_use_activation", True)
    backbone_type = fields.pop("model_type", "llama")
    fields.pop("architectures", None)
    fields.pop("auto_map", None)  # never remote code
    # the backbone's own class brings old spellings (rope_theta, rope_scaling) up to date
    fields = _backbone_class(backbone_type)(**fields).to_dict()
    for name in ("model_type", "transformers_version", "id2label", "label2id", "problem_type"):
        fields.pop(name, None)
    fields["num_hidden_layers"] = layer
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:layer]
    fields["use_cache"] = False
    fields["sarm"] = {
        "backbone_type": backbone_type,
        "source_layer": layer,
        "n_latents": n_latents,
        "k": k,
        "activation": "topk" if use_topk else "none",
        "normalization": "token",
    }
    return fields
