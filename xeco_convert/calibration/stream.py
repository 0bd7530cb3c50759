"""The source's hidden states on the calibration windows, moved through one decoder layer at a time.

Letters: W windows, T tokens, X hidden_size. Memory: one layer's weights, the hidden states (float32 [W, T, X]) and what one
batch of windows takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.checkpoint import TensorReader
from xeco_convert.factorize.forward import AttentionContext
from xeco_convert.plan import ConversionPlan

BATCH_WINDOWS = 4


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One source layer on the calibration windows, while its weights are in memory.

    `inputs` [W, T, X] float32: the residual stream before the layer. `layer`: the source's decoder layer in float32.
    `cos` and `sin` [1, T, d] and `mask` [1, 1, T, T] (boolean) are what it is called with.
    """

    number: int
    layer: nn.Module
    inputs: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor

    def context(self) -> AttentionContext:
        """What the attention is called with beside its input."""
        return AttentionContext(
            cos=self.cos, sin=self.sin, mask=self.mask, softmax_scale=self.softmax_scale, norm_eps=self.norm_eps
        )

    def batches(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of a few windows each."""
        for start in range(0, hidden.shape[0], BATCH_WINDOWS):
            yield slice(start, min(start + BATCH_WINDOWS, hidden.shape[0]))

    def run(self, inputs: Tensor) -> Tensor:
        """Output of the whole decoder layer on some windows [w, T, X]."""
        positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
        output = self.layer(
            inputs,
            attention_mask=self.mask,
            position_ids=positions,
            position_embeddings=(self.cos, self.sin),
            past_key_values=None,
            use_cache=False,
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run_with_attention(self, inputs: Tensor, attention_output: Tensor) -> Tensor:
        """Output of the decoder layer on windows [w, T, X], had its attention given `attention_output` [w, T, X]."""
        original = self.layer.self_attn
        self.layer.self_attn = _Given(attention_output)
        try:
            return self.run(inputs)
        finally:
            self.layer.self_attn = original

    @property
    def norm_eps(self) -> float:
        """Of the configuration (rms_norm_eps), which the latent's norm takes too."""
        return float(self.layer.input_layernorm.variance_epsilon)  # type: ignore[union-attr,arg-type]

    @property
    def softmax_scale(self) -> float:
        return float(self.layer.self_attn.scaling)  # type: ignore[union-attr,arg-type]

    def normed(self, inputs: Tensor) -> Tensor:
        """What the attention gets: the residual stream after the input norm."""
        return self.layer.input_layernorm(inputs)  # type: ignore[operator,no-any-return]


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """Final norm and vocabulary projection [vocabulary, X] of the source, float32."""

    norm: nn.Module
    weight: Tensor

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of hidden states [n, X]."""
        result: Tensor = self.norm(hidden) @ self.weight.T
        return result


class _Given(nn.Module):
    """Stands in for an attention module, with an output that is known already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_arguments: Any, **_named: Any) -> tuple[Tensor, None]:
        return self._output, None


class SourceStream:
    """Runs the source over the calibration windows layer by layer; may be gone through more than once."""

    def __init__(self, plan: ConversionPlan, windows: CalibrationWindows, device: torch.device) -> None:
        self._plan = plan
        self._windows = windows
        self._device = device
        self._reader = TensorReader(plan.index)
        self._config = source_config(plan)
        with torch.device("meta"):
            from transformers import AutoModel

            self._skeleton: Any = AutoModel.from_config(self._config)
        length = windows.ids.shape[1]
        rotary = type(self._skeleton.rotary_emb)(config=self._config).to(device)
        positions = torch.arange(length, device=device).unsqueeze(0)
        self._cos, self._sin = rotary(torch.zeros(1, 1, 1, device=device), positions)

    def layers(self) -> Iterator[LayerView]:
        """Each layer with the hidden states before it. The view's tensors are valid until the next one is asked for."""
        hidden = self._embedded()
        for number in range(self._plan.geometry.num_hidden_layers):
            view = LayerView(
                number=number,
                layer=self._loaded(self._skeleton.layers[number], f"model.layers.{number}."),
                inputs=hidden,
                counts=self._windows.counts.to(self._device),
                cos=self._cos,
                sin=self._sin,
                mask=self._mask(number),
            )
            yield view
            with torch.no_grad():  # in place: the states before the layer are not needed again
                for part in view.batches(hidden):
                    hidden[part] = view.run(hidden[part])
            view.layer.to("meta")

    def output_head(self) -> OutputHead:
        """What follows the last layer: final norm and vocabulary projection."""
        norm = self._loaded(self._skeleton.norm, "model.norm.")
        tied = "lm_head.weight" not in self._plan.index.headers or "lm_head.weight" in self._plan.dropped
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        weight = self._reader.read(name, dtype=torch.float32, device=self._device)
        return OutputHead(norm=norm, weight=weight)

    def _embedded(self) -> Tensor:
        """Hidden states before the first layer [W, T, X]: only the rows of the tokens that occur are kept."""
        wanted, places = self._windows.ids.unique(return_inverse=True)
        rows = torch.zeros(wanted.numel(), self._plan.geometry.hidden_size)
        start = 0
        for chunk in self._reader.read_chunks("model.embed_tokens.weight"):
            inside = (wanted >= start) & (wanted < start + chunk.shape[0])
            rows[inside] = chunk[wanted[inside] - start].float()
            start += chunk.shape[0]
        return rows[places].to(self._device)

    def _loaded(self, skeleton: nn.Module, prefix: str) -> nn.Module:
        """A layer of the skeleton with its weights, float32."""
        module = skeleton.to_empty(device=self._device)
        state = {
            name: self._reader.read(f"{prefix}{name}", dtype=torch.float32, device=self._device)
            for name in module.state_dict()
        }
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)

    def _mask(self, layer: int) -> Tensor:
        length = self._windows.ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
        window = sliding_window(self._config, layer)
        if window is not None:
            visible = visible.triu(diagonal=1 - window)
        return visible[None, None]


def sliding_window(config: Any, layer: int) -> int | None:
    """Tokens that a query of this layer sees, itself included; None where it sees all."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return window


def source_config(plan: ConversionPlan) -> Any:
    """The source's configuration as transformers reads it, for float32."""
    from transformers import AutoConfig

    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(plan.index.config)), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    config.dtype = torch.float32
    return config
