"""Rotary embedding of one converted layer in vLLM: frequencies of transformers' own class, any of them in any order.

vLLM's rotary classes know tables over a whole head. A converted layer uses columns of its source's, so cos and sin are computed
from the frequencies themselves: [T, P] numbers, no table to keep, no greatest position.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.errors import UnsupportedModelError
from xeco_convert.modeling.configuration_xeco import source_class
from xeco_convert.modeling.layer_xeco import MlaLayer


class LatentRotary(nn.Module):
    """Half-split rotation by the frequencies [P/2] of a layer, computed in float32 and rounded once."""

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T], queries [T, H, P], keys [T, 1, P] -> both rotated, in their dtypes."""
        angles = positions.float().unsqueeze(-1) * self.frequencies
        cos, sin = (part.unsqueeze(1) * self.scaling for part in (angles.cos(), angles.sin()))
        return _rotated(queries, cos, sin), _rotated(keys, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def layer_rotary(config: Any, prefix: str, number: int, layer: MlaLayer, max_model_len: int) -> LatentRotary | None:
    """The rotation of layer `number`, None for one without; `prefix`: how the source's classes begin.

    Long-context types that choose frequencies by length take those of `max_model_len`, as vLLM does. Raises
    `UnsupportedModelError` for frequencies that change with every length.
    """
    if not layer.qk_rope_head_dim:
        return None
    kind = config.layer_types[number] if _is_nested(config.rope_parameters) else None
    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    if parameters.get("rope_type") == "dynamic" and max_model_len > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"config.json: dynamic rotary frequencies change with the length beyond {config.max_position_embeddings} tokens, and "
            f"cached keys cannot follow; start vLLM with --max-model-len {config.max_position_embeddings}."
        )
    own = config
    if layer.rope_index is None:  # fresh frequencies of the source's rotary type over the layer's own width
        own = copy.deepcopy(config)
        own.head_dim = layer.qk_rope_head_dim
    frequencies, scaling = _frequencies(own, prefix, kind, max_model_len)
    if layer.rope_index is not None:
        frequencies = frequencies[torch.tensor(layer.rope_index, dtype=torch.int64, device="cpu")]
    # vLLM builds models where they run, and moves nothing afterwards
    return LatentRotary(frequencies.to(torch.get_default_device()), scaling)


def _is_nested(parameters: Any) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _frequencies(config: Any, prefix: str, kind: str | None, max_model_len: int) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] and the factor of cos and sin, from transformers' class of the family."""
    module = sys.modules[source_class(prefix, "ForCausalLM").__module__]
    named = {} if kind is None else {"layer_type": kind}
    with torch.device("cpu"):
        rotary = getattr(module, f"{prefix}RotaryEmbedding")(config=config)
        # one call with the last position: types that choose by length choose now
        rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([[max_model_len - 1]]), **named)
    before = "" if kind is None else f"{kind}_"
    return getattr(rotary, f"{before}inv_freq").float(), float(getattr(rotary, f"{before}attention_scaling"))
