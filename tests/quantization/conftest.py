"""Tiny decoders of every supported architecture, with biases where they are optional."""

import pytest
import torch
from transformers import AutoModel

KINDS = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-odd": {"hidden_size": 36, "head_dim": 12, "intermediate_size": 40},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(params=KINDS)
def decoder(request, tiny_config):
    """A random fp32 decoder without its final norm; every parameter matters."""
    torch.manual_seed(3)
    kind, changes = request.param.split("-")[0], KINDS[request.param]
    model = AutoModel.from_config(tiny_config(kind, **changes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * scale)
    model.norm = torch.nn.Identity()
    return model
