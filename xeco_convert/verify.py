"""Checks converted layers against the attention of the source's own transformers class.

Exactness: the source written as MLA without any approximation must give the source's output; it finds faults of layout,
sign, scale, bias and rotary frequencies for this very model. Output error: how far the converted layer is from the source
on random normalised inputs, which says something about the initialisation. Path to the logits: both models as transformers
loads them, on a few tokens, the converted layers made to put out what the source's did; the logits must be the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.calibration.sampling import available_memory_bytes
from xeco_convert.checkpoint import TensorReader
from xeco_convert.errors import VerificationError, XecoWarning
from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.factorize.exact import exact_factors, exact_shape
from xeco_convert.modeling.attention_xeco import LatentSelfAttention
from xeco_convert.modeling.layer_xeco import MlaShape
from xeco_convert.plan import ConversionPlan, num_parameters
from xeco_convert.pretrained import load_causal_lm
from xeco_convert.source import SourceModel

# Float32 through two orders of summation: 4e-7 to 3e-6 was observed over the families and rotary types of the tests.
EXACTNESS_TOLERANCE = 1e-4
_NUM_TOKENS = 48
_PATH_TOKENS = 12
# Of the logits' standard deviation. The same numbers go through the same operations, unless --dtype rounded the weights.
PATH_TOLERANCES = {"F32": 1e-4, "BF16": 0.25, "F16": 0.03}


def sampled_layers(converted: Sequence[int]) -> tuple[int, ...]:
    """First, middle and last of the converted layers."""
    return tuple(sorted({converted[0], converted[len(converted) // 2], converted[-1]}))


class LayerChecker:
    """Holds the source's model class without weights; takes one layer at a time."""

    def __init__(self, source: SourceModel) -> None:
        self._source = source
        self._config = source.runnable_config()
        with torch.device("meta"):
            from transformers import AutoModel

            self._model: Any = AutoModel.from_config(self._config)
        self._rotary = type(self._model.rotary_emb)(config=self._config)
        self._reader = TensorReader(source.index)

    def check(self, layer: int, source: SourceAttention, factors: MlaAttention, shape: MlaShape) -> tuple[float, float]:
        """Relative output errors of (the exact form, the converted factors) of one layer, in float32 on the CPU.

        Where linear keys stand for normalised ones (--qk-norm regression), `source` holds them, and both are compared with the
        source's attention on these keys: what the keys themselves lose is in the report.
        Raises `VerificationError` where the exact form is not exact.
        """
        inputs = self._inputs(source, seed=layer)
        expected = self._run(layer, self._source_module(layer, source), inputs)
        exact = self._run(layer, self._latent_module(layer, exact_shape(source), exact_factors(source)), inputs)
        converted = self._run(layer, self._latent_module(layer, shape, factors), inputs)
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
    def _run(self, layer: int, attention: nn.Module, inputs: Tensor) -> Tensor:
        positions = torch.arange(_NUM_TOKENS).unsqueeze(0)
        of_type = (self._config.layer_types[layer],) if self._source.family.rope_of_layer_type else ()
        rotation = self._rotary(inputs, positions, *of_type)
        visible = torch.ones(_NUM_TOKENS, _NUM_TOKENS, dtype=torch.bool).tril()[None, None]
        # additive, which every implementation of attention takes
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        output, _ = attention(
            hidden_states=inputs, position_embeddings=rotation, attention_mask=mask, position_ids=positions
        )
        return output  # type: ignore[no-any-return]

    def _source_module(self, layer: int, source: SourceAttention) -> nn.Module:
        """The source's own module with its stored weights; its norm of the keys left out where `source` has linear keys."""
        skeleton = self._source.attention_of(self._model.layers[layer])
        module: Any = type(skeleton)(self._config, layer).eval()
        prefix = self._source.family.module_name(layer)
        names = list(module.state_dict())
        module.load_state_dict({name: self._reader.read(f"{prefix}.{name}", dtype=torch.float32) for name in names})
        if self._source.family.has_key_norm and source.k_norm_weight is None:
            module.k_norm = nn.Identity()
            module.k_proj.weight.data.copy_(source.k_weight.float().cpu())
            if source.k_bias is not None and module.k_proj.bias is not None:
                module.k_proj.bias.data.copy_(source.k_bias.float().cpu())
        return module  # type: ignore[no-any-return]

    def _latent_module(self, layer: int, shape: MlaShape, factors: MlaAttention) -> nn.Module:
        original = self._source.attention_of(self._model.layers[layer])
        module = LatentSelfAttention(self._config, original, shape, type(self._rotary)).eval()
        module.load_state_dict({name: tensor.float().cpu() for name, tensor in factors.state_dict().items()})
        return module


@torch.no_grad()
def check_path_to_logits(plan: ConversionPlan, folder: Path) -> float | None:
    """Largest difference of logits, relative to their standard deviation, between the source and the converted checkpoint in
    `folder` with the outputs of its converted attention replaced by the source's: embeddings, norms, MLPs, kept layers and
    head, each as transformers loads them. One model at a time is in memory, in float32.

    None, with a warning, where the machine's free memory does not hold it. Raises `VerificationError` beyond rounding.
    """
    needed = 4 * num_parameters(plan.output_headers())
    if needed * 1.2 > available_memory_bytes():
        warnings.warn(
            f"--verify: the path to the logits was not checked, since the whole model needs {needed / 1e9:.0f} GB in float32, "
            "more than is free; the layers were.",
            XecoWarning,
            stacklevel=2,
        )
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, plan.source.values["vocab_size"], (1, _PATH_TOKENS), generator=generator)
    outputs: dict[int, Tensor] = {}
    expected = _logits(plan, plan.source.index.folder, ids, outputs, replace=False)
    actual = _logits(plan, folder, ids, outputs, replace=True)
    error = float((actual - expected).abs().max() / expected.std())
    tolerance = PATH_TOLERANCES["F32" if plan.options.dtype is None else plan.dtype]
    if not error <= tolerance:
        raise VerificationError(
            f"the converted checkpoint, its attention set aside, differs from the source: logits by {error:.1e} of their "
            f"standard deviation, expected at most {tolerance:.0e}; a tensor outside the attention is not what transformers "
            "loads from the source. Please report it with config.json."
        )
    return error


def _logits(plan: ConversionPlan, folder: Path, ids: Tensor, outputs: dict[int, Tensor], *, replace: bool) -> Tensor:
    """Logits [1, T, V] of a model; outputs of the attention of converted layers are kept in `outputs`, or taken from there."""
    attention = plan.source.runnable_config()._attn_implementation
    model = load_causal_lm(folder, torch.float32, attn_implementation=attention).eval()
    for layer in [item.layer for item in plan.converted]:

        def hook(_module: nn.Module, _inputs: Any, result: tuple[Tensor, Any], layer: int = layer) -> Any:
            if replace:
                return (outputs[layer], *result[1:])
            outputs[layer] = result[0]
            return None

        plan.source.attention_of(model.get_decoder().layers[layer]).register_forward_hook(hook)
    logits: Tensor = model(ids, use_cache=False).logits.float()
    return logits
