"""The source's hidden states on the calibration windows, moved through one decoder layer at a time.

Letters: W windows, T tokens, X hidden_size. Memory: one layer's weights, three float32 tensors [W, T, X] (the hidden states
before and after the layer, its attention's output) and what one batch of windows takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.checkpoint import TensorReader
from xeco_convert.errors import CheckpointError, reason_of
from xeco_convert.factorize.attention import AttentionContext, mla_output
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.families import FamilySpec
from xeco_convert.memory import FreedMemory
from xeco_convert.quality import OutputHead
from xeco_convert.source import SourceModel

BATCH_WINDOWS = 4
_LEAST_SQUARE = 1e-30


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One source layer on the calibration windows, while its weights are in memory.

    `inputs` [W, T, X] float32: the residual stream before the layer, `attention_output` what its attention puts out there
    (o_proj included), `outputs` the residual stream after it. `layer`: the source's decoder layer in float32.
    `position_embeddings` and `layer_mask` are what it is called with; `mask` [1, 1, T, T] (boolean) says what its tokens see,
    `cos` and `sin` [1, T, d] are the tables for whole heads, 1 and 0 for the pairs that this layer does not rotate. `family` says
    how the layer is built; `residual_scale` is what its parts are multiplied by before they are added (Granite).
    """

    number: int
    layer: nn.Module
    inputs: Tensor
    attention_output: Tensor
    outputs: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor
    layer_mask: Tensor | None
    position_embeddings: tuple[Tensor, Tensor]
    family: FamilySpec
    norm_eps: float
    logit_softcap: float | None
    residual_scale: float

    def context(self) -> AttentionContext:
        """What the attention is called with beside its input."""
        return AttentionContext(
            cos=self.cos,
            sin=self.sin,
            mask=self.mask,
            softmax_scale=self.softmax_scale,
            norm_eps=self.norm_eps,
            logit_softcap=self.logit_softcap,
        )

    def batches(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of a few windows each."""
        for start in range(0, hidden.shape[0], BATCH_WINDOWS):
            yield slice(start, min(start + BATCH_WINDOWS, hidden.shape[0]))

    def run(self, inputs: Tensor) -> Tensor:
        """Output of the whole decoder layer on some windows [w, t, X], or on their first tokens alone."""
        length = inputs.shape[1]
        positions = torch.arange(length, device=inputs.device).unsqueeze(0)
        cos, sin = self.position_embeddings
        try:
            output = self.layer(
                inputs,
                attention_mask=None if self.layer_mask is None else self.layer_mask[..., :length, :length],
                position_ids=positions,
                position_embeddings=(cos[:, :length], sin[:, :length]),
                use_cache=False,
            )
        except (
            TypeError,
            ValueError,
            AttributeError,
            ZeroDivisionError,
        ) as error:  # settings that only its forward reads
            raise CheckpointError(
                f"config.json: transformers cannot compute layer {self.number} with these settings ({reason_of(error)}); take "
                "config.json from the model's own folder."
            ) from None
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def _fill(self) -> None:
        """Run the layer: `attention_output` and `outputs`."""
        seen: list[Tensor] = []
        hook = self.attention.register_forward_hook(lambda module, given, output: seen.append(output[0]))
        try:
            for part in self.batches(self.inputs):
                self.outputs[part] = self.run(self.inputs[part])
                self.attention_output[part] = seen.pop()
        finally:
            hook.remove()

    def run_with_attention(self, inputs: Tensor, attention_output: Tensor) -> Tensor:
        """Output of the decoder layer on windows [w, T, X], had its attention given `attention_output` [w, T, X]."""
        original = self.attention
        setattr(self.layer, self.family.module, _Given(attention_output))
        try:
            return self.run(inputs)
        finally:
            setattr(self.layer, self.family.module, original)

    @torch.no_grad()
    def advance(
        self,
        hidden: Tensor,
        factors: MlaAttention | None,
        num_heads: int,
        context: AttentionContext | None = None,
        known: Tensor | None = None,
    ) -> None:
        """Move a converted model's hidden states [W, T, X] through its own layer, in place. `factors`: its attention; None where
        it kept the source's. `context`: where that has rotary frequencies of its own, or an epsilon for its latent norm. `known`:
        what its attention puts out on the first windows, where that was computed already."""
        for part in self.batches(hidden):
            inputs = hidden[part]
            if factors is None:
                hidden[part] = self.run(inputs)
                continue
            if known is not None and part.stop <= known.shape[0]:
                attention = known[part]
            else:
                attention = mla_output(factors, num_heads, self.normed(inputs), context or self.context())
            hidden[part] = self.run_with_attention(inputs, attention)

    def attention_target(self, part: slice | Tensor, inputs: Tensor) -> Tensor:
        """What the attention should put out at `inputs` [w, T, X], in place of these windows' own, so that the residual stream
        becomes what the source makes of it. Where a norm stands between, the source's own output."""
        output = self.attention_output[part]
        if self.family.post_attention_norm:
            return output
        return output + (self.inputs[part] - inputs) / self.residual_scale

    def token_weights(self, part: slice | Tensor) -> Tensor:
        """How much squared errors of the attention's output count [w, T]: by the inverse mean square of what the norm that
        follows sees in the source, the residual stream or, where that norm stands before it, the output itself. Tokens with
        massive activations, a handful of a text, would decide alone otherwise (arXiv 2402.17762)."""
        output = self.attention_output[part]
        if self.family.post_attention_norm:
            return _inverse_mean_square(output)
        return _inverse_mean_square(self.inputs[part] + self.residual_scale * output)

    def output_weights(self, part: slice | Tensor) -> Tensor:
        """The same behind the whole layer."""
        return _inverse_mean_square(self.outputs[part])

    @property
    def attention(self) -> nn.Module:
        """The source's attention module."""
        return self.layer.get_submodule(self.family.module)

    @property
    def softmax_scale(self) -> float:
        return float(self.attention.scaling)  # type: ignore[arg-type]

    def normed(self, inputs: Tensor) -> Tensor:
        """What the attention gets: the residual stream after the input norm, where there is one."""
        if not self.family.input_norm:
            return inputs
        return self.layer.input_layernorm(inputs)  # type: ignore[operator,no-any-return]


def _inverse_mean_square(hidden: Tensor) -> Tensor:
    return hidden.square().mean(dim=-1).clamp_min(_LEAST_SQUARE).reciprocal()


class _Given(nn.Module):
    """Stands in for an attention module, with an output that is known already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_arguments: Any, **_named: Any) -> tuple[Tensor, None]:
        return self._output, None


class SourceStream:
    """Runs the source over the calibration windows layer by layer; may be gone through more than once."""

    def __init__(self, source: SourceModel, windows: CalibrationWindows, device: torch.device) -> None:
        self._source = source
        self._windows = windows
        self._device = device
        self._reader = TensorReader(source.index)
        self._config = source.runnable_config()
        with torch.device("meta"):
            from transformers import AutoModel

            self._skeleton: Any = AutoModel.from_config(self._config)
        self._tables = _RotaryTables(
            source, self._config, type(self._skeleton.rotary_emb), windows.ids.shape[1], device
        )

    def layers(self, num_windows: int | None = None) -> Iterator[LayerView]:
        """Each layer with the hidden states before it, of all windows or of the first alone. The view's tensors are valid until
        the next one is asked for."""
        hidden, source, family = self._embedded()[:num_windows], self._source, self._source.family
        freed = FreedMemory()
        for number in range(source.geometry.num_hidden_layers):
            cos, sin = self._tables.whole_heads(number)
            view = LayerView(
                number=number,
                layer=self._loaded(self._skeleton.layers[number], family.layers.format(layer=number)),
                inputs=hidden,
                attention_output=torch.empty_like(hidden),
                outputs=torch.empty_like(hidden),
                counts=self._windows.counts[:num_windows].to(self._device),
                cos=cos,
                sin=sin,
                mask=self._mask(number),
                layer_mask=self._layer_mask(number),
                position_embeddings=self._tables.of_layer(number),
                family=family,
                norm_eps=source.norm_eps,
                logit_softcap=source.logit_softcap,
                residual_scale=source.residual_scale,
            )
            view._fill()
            _check_finite(view.outputs, f"the output of layer {number}")
            yield view
            hidden = view.outputs
            view.layer.to("meta")
            freed.look()

    def output_head(self) -> OutputHead:
        """What follows the last layer: final norm, vocabulary projection, and scale or cap of the logits."""
        source, family = self._source, self._source.family
        norm = self._skeleton.get_submodule(family.final_norm.removesuffix(".").rpartition(".")[2])
        return OutputHead(
            norm=self._loaded(norm, family.final_norm),
            weight=self._read(source.parameter_or_tied(family.output_head)),
            divisor=family.logits_scale(source.values),
            softcap=family.logits_cap(source.values),
        )

    def _embedded(self) -> Tensor:
        """Hidden states before the first layer [W, T, X]: only the rows of the tokens that occur are kept."""
        used_ids, positions = self._windows.ids.unique(return_inverse=True)
        rows = torch.zeros(used_ids.numel(), self._source.geometry.hidden_size)
        start = 0
        for chunk in self._reader.read_chunks(self._source.stored_name(self._source.family.embedding)):
            inside = (used_ids >= start) & (used_ids < start + chunk.shape[0])
            rows[inside] = chunk[used_ids[inside] - start].float()
            start += chunk.shape[0]
        hidden = self._source.embedding_scale * rows[positions].to(self._device)
        _check_finite(hidden, "the embedding of the calibration text")
        return hidden

    def _loaded(self, skeleton: nn.Module, prefix: str) -> nn.Module:
        """A layer of the skeleton with its weights, float32."""
        module = skeleton.to_empty(device=self._device)
        module.load_state_dict({name: self._read(f"{prefix}{name}") for name in module.state_dict()})
        return module.eval().requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        """A parameter of the transformers class, float32."""
        return self._source.read_parameter(
            name, lambda stored: self._reader.read(stored, dtype=torch.float32, device=self._device)
        )

    def _mask(self, layer: int) -> Tensor:
        length = self._windows.ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
        window = self._source.kinds[layer].window
        if window is not None:
            visible = visible.triu(diagonal=1 - window)
        return visible[None, None]

    def _layer_mask(self, layer: int) -> Tensor | None:
        """The mask as transformers' attention takes it: its eager one adds it, the fused one is causal without any and computes
        half as much then."""
        if self._config._attn_implementation == "eager":
            mask = self._mask(layer)
            return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        return None if self._source.kinds[layer].window is None else self._mask(layer)


def _check_finite(hidden: Tensor, what: str) -> None:
    """Raise `CheckpointError` where the source itself computes nonsense: no statistics can be taken from that."""
    if not bool(hidden.isfinite().all()):
        raise CheckpointError(
            f"{what} is not finite in float32: the source's weights or the numbers in its config.json are damaged; download the "
            "checkpoint again."
        )


class _RotaryTables:
    """cos and sin [1, T, rotary_dim] of the source for every type of layer, and widened to whole heads."""

    def __init__(
        self, source: SourceModel, config: Any, rotary_class: type[nn.Module], length: int, device: torch.device
    ) -> None:
        self._source = source
        self._types: list[str] | None = config.layer_types if source.family.rope_of_layer_type else None
        rotary = rotary_class(config=config).to(device)
        positions = torch.arange(length, device=device).unsqueeze(0)
        like = torch.zeros(1, 1, 1, device=device)
        kinds: list[str | None] = [None] if self._types is None else list(dict.fromkeys(self._types))
        self._tables = {kind: rotary(like, positions, *([] if kind is None else [kind])) for kind in kinds}

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """What transformers calls the layer with."""
        cos, sin = self._tables[None if self._types is None else self._types[layer]]
        return cos, sin

    def whole_heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, d], 1 and 0 for the pairs that the layer does not rotate."""
        cos, sin = self.of_layer(layer)
        dim, rotated = self._source.geometry.head_dim, self._source.kinds[layer].rotary_dim
        if rotated == dim:
            return cos, sin
        static = cos.new_ones(*cos.shape[:2], (dim - rotated) // 2)
        cos, sin = cos[..., : rotated // 2], sin[..., : rotated // 2]
        return torch.cat([cos, static] * 2, dim=-1), torch.cat([sin, 0 * static] * 2, dim=-1)
