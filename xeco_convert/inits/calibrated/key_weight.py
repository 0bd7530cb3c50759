"""How much keys count beside values in the closed form of a layer, by what its attention then puts out.

The closed form adds the errors of keys to those of values as if the score errors of a query's tokens were independent
(docs/conversion.md, step 3). How far from true that is differs between layers: on SmolLM2-135M most are best with a quarter to a
half.
"""

from __future__ import annotations

import torch

from xeco_convert.calibration.stream import LayerView
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.layer_weights import SourceAttention
from xeco_convert.inits.calibrated.measurements import Measurements
from xeco_convert.ranks import Widths

KEY_WEIGHTS = (1.0, 0.5, 0.25)


@torch.no_grad()
def weighed_layer(
    measurements: Measurements, view: LayerView, source: SourceAttention, widths: Widths
) -> CalibratedLayer:
    """The closed form whose attention at these widths puts out what is nearest to the source's output, by the weights of
    `LayerView.token_weights`."""
    first, count = measurements.held_out_from, measurements.num_measuring
    if view.inputs.shape[0] < measurements.num_calibrated:  # a survey's windows
        first = view.inputs.shape[0] - count
    part = slice(first, first + count)
    inputs, target = view.normed(view.inputs[part]), view.attention_output[part]
    shares = torch.where(view.counts[part], view.token_weights(part), 0.0)

    def error(layer: CalibratedLayer) -> float:
        factors = layer.factors(widths.kv_lora_rank, widths.qk_rope_head_dim).to(torch.float32)
        output = mla_output(factors, source.num_attention_heads, inputs, view.context())
        return float(((output - target).square().mean(dim=-1) * shares).sum())

    layer = measurements.calibrated_layer(view, source)
    return min((layer.with_key_weight(weight) for weight in KEY_WEIGHTS), key=error)
