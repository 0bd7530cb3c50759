"""Checks converted layers against the attention of the source's own transformers class.

Exactness: the source written as MLA without any approximation must give the source's output; it finds faults of layout,
sign, scale, bias and rotary frequencies for this very model. Output error: how far the converted layer is from the source
on random normalised inputs, which says something about the initialisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.calibration.stream import source_config
from xeco_convert.errors import VerificationError
from xeco_convert.factorize import MlaAttention, MlaShape, SourceAttention
from xeco_convert.factorize.attention import exact_factors, exact_shape
from xeco_convert.modeling import MlaLayer
from xeco_convert.modeling.modeling_xeco import LatentSelfAttention
from xeco_convert.plan import ConversionPlan

# Float32 through two orders of summation: 4e-7 to 3e-6 was observed over the families and rotary types of the tests.
EXACTNESS_TOLERANCE = 1e-4
_NUM_TOKENS = 48


def sampled_layers(converted: tuple[int, ...]) -> tuple[int, ...]:
    """First, middle and last of the converted layers."""
    if not converted:
        return ()
    return tuple(sorted({converted[0], converted[len(converted) // 2], converted[-1]}))


class LayerChecker:
    """Holds the source's model class without weights; takes one layer at a time."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._plan = plan
        self._config = source_config(plan)
        with torch.device("meta"):
            from transformers import AutoModel

            self._model: Any = AutoModel.from_config(self._config)
        self._rotary = type(self._model.rotary_emb)(config=self._config)

    def check(self, layer: int, source: SourceAttention, factors: MlaAttention, shape: MlaShape) -> tuple[float, float]:
        """Relative output errors of (the exact form, the converted factors) of one layer, in float32 on the CPU.

        Raises `VerificationError` where the exact form is not exact.
        """
        inputs = self._inputs(source, seed=layer)
        expected = self._run(self._source_module(layer, source), inputs)
        exact = self._run(self._latent_module(layer, exact_shape(source), exact_factors(source)), inputs)
        converted = self._run(self._latent_module(layer, shape, factors), inputs)
        exactness = float((exact - expected).norm() / expected.norm())
        if not exactness <= EXACTNESS_TOLERANCE:
            raise VerificationError(
                f"layer {layer}: the source's attention written as MLA differs from it by {exactness:.1e}, expected at most "
                f"{EXACTNESS_TOLERANCE:.0e}; this version does not understand the model. Please report it with config.json."
            )
        return exactness, float((converted - expected).norm() / expected.norm())

    def _inputs(self, source: SourceAttention, seed: int) -> Tensor:
        """Normal inputs of unit variance times the input norm's weight [1, tokens, hidden]."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(1, _NUM_TOKENS, source.q_weight.shape[1], generator=generator)
        return normal * source.input_norm_weight.float().cpu()

    @torch.no_grad()
    def _run(self, attention: nn.Module, inputs: Tensor) -> Tensor:
        positions = torch.arange(_NUM_TOKENS).unsqueeze(0)
        rotation = self._rotary(inputs, positions)
        mask = torch.ones(_NUM_TOKENS, _NUM_TOKENS, dtype=torch.bool).tril()[None, None]
        output, _ = attention(
            hidden_states=inputs,
            position_embeddings=rotation,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        return output  # type: ignore[no-any-return]

    def _source_module(self, layer: int, source: SourceAttention) -> nn.Module:
        module: nn.Module = type(self._model.layers[layer].self_attn)(self._config, layer).eval()
        tensors = {
            f"{which}_proj.{part}": getattr(source, f"{which}_{part}")
            for which in "qkvo"
            for part in ("weight", "bias")
        }
        module.load_state_dict({name: t.float().cpu() for name, t in tensors.items() if t is not None})
        return module

    def _latent_module(self, layer: int, shape: MlaShape, factors: MlaAttention) -> nn.Module:
        widths = MlaLayer(**shape.layer_fields())
        original = self._model.layers[layer].self_attn
        module = LatentSelfAttention(self._config, original, widths, type(self._rotary)).eval()
        module.load_state_dict({name: tensor.float().cpu() for name, tensor in factors.state_dict().items()})
        return module
