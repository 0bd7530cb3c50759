"""The plan of a conversion, made from config.json and headers alone: what is converted, copied, dropped, and how large.

Nothing here reads a weight. Every tensor of the source has one fate, and everything that can be refused is refused here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex, TensorHeader
from xeco_convert.checkpoint.dtypes import STORED_AS
from xeco_convert.errors import OptionError
from xeco_convert.families import LayerKind
from xeco_convert.families.spec import FUSED, PROJECTIONS
from xeco_convert.modeling.layer_xeco import MlaShape
from xeco_convert.options import ConvertOptions, parse_layers
from xeco_convert.ranks import CacheFacts, Widths, WidthSurvey
from xeco_convert.settings import require_at_most
from xeco_convert.source import SourceModel, open_source


@dataclass(frozen=True, kw_only=True)
class KeptLayer:
    """A layer that keeps its attention."""

    layer: int
    kind: LayerKind

    @property
    def window(self) -> int | None:
        """Its sliding window, where that is why it is kept: its cache does not grow beyond it."""
        return self.kind.window if self.kind.keeps_window else None


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer to convert, and the widths that it gets: upper bounds where the plan's are not final. Which frequencies its
    rotary pairs use is no part of a plan; that comes out of the conversion."""

    layer: int
    kind: LayerKind
    shape: MlaShape


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do. `widths_are_final` is False while the rank policy still has to look at the source."""

    source: SourceModel
    options: ConvertOptions
    converted: tuple[PlannedLayer, ...]
    kept: tuple[KeptLayer, ...]
    copied: tuple[TensorHeader, ...]
    dropped: tuple[str, ...]
    widths_are_final: bool

    @property
    def layers(self) -> tuple[PlannedLayer | KeptLayer, ...]:
        """All layers of the model, in their order."""
        both: list[PlannedLayer | KeptLayer] = [*self.converted, *self.kept]
        return tuple(sorted(both, key=lambda item: item.layer))

    @property
    def dtype(self) -> str:
        """Dtype of all weights written, in safetensors' words: the option's, or the source's first query projection's."""
        if self.options.dtype is not None:
            return STORED_AS[self.options.dtype]
        source = self.source
        return source.index.headers[f"{source.projection(source.family.projections[0], 0)}.weight"].dtype

    def converted_headers(self, item: PlannedLayer) -> list[TensorHeader]:
        """Tensors that replace the attention of a converted layer."""
        module = self.source.family.module_name(item.layer)
        sizes = item.shape.tensors().items()
        return [TensorHeader(name=f"{module}.{name}", dtype=self.dtype, shape=size) for name, size in sizes]

    def output_headers(self) -> list[TensorHeader]:
        """All tensors of the output, in the order of the source's layers: outer tensors, then layer by layer."""
        converted = [header for item in self.converted for header in self.converted_headers(item)]
        return sorted([*self.copied, *converted], key=lambda header: _natural(header.name))

    def kv_numbers_per_token(self) -> list[int]:
        """Numbers that each layer of the output caches per token."""
        shapes = {item.layer: item.shape for item in self.converted}
        before = self.source_kv_numbers_per_token()
        return [shapes[layer].cache_width if layer in shapes else number for layer, number in enumerate(before)]

    def kv_bytes_per_token(self) -> list[int]:
        """Bytes that each layer of the output caches per token, scales of codes included."""
        shapes, number_bytes = {item.layer: item.shape for item in self.converted}, DTYPE_BYTES[self.dtype]
        return [
            shapes[layer].cache_bytes(number_bytes) if layer in shapes else number * number_bytes
            for layer, number in enumerate(self.source_kv_numbers_per_token())
        ]

    def source_kv_numbers_per_token(self) -> list[int]:
        """The same of the source. A layer that keeps its sliding window counts nothing: its cache does not grow with the
        text, and no conversion changes it."""
        windows = {item.layer for item in self.kept if item.window is not None}
        geometry = self.source.geometry
        return [0 if layer in windows else geometry.cache_width for layer in range(geometry.num_hidden_layers)]

    def exact_key_cost(self) -> tuple[int, int]:
        """What keys behind their norm cost beside a plain projection to the latent: parameters more (the source's k_proj,
        k_norm and v_proj, less what a projection from the input would have), and multiplications more for each token written."""
        parameters = products = 0
        for shape in (item.shape for item in self.converted if item.shape.k_norm is not None):
            exact, plain = shape.tensors(), dataclasses.replace(shape, k_norm=None).tensors()
            parameters += _num_weights(exact) - _num_weights(plain)
            products += _num_weights(exact, matrices_only=True) - _num_weights(plain, matrices_only=True)
        return parameters, products

    @property
    def kept_windows(self) -> tuple[KeptLayer, ...]:
        """Layers that keep their attention because of its sliding window."""
        return tuple(item for item in self.kept if item.window is not None)

    def with_widths_of(self, survey: WidthSurvey) -> ConversionPlan:
        """The plan with the widths that the rank policy chooses by what `survey` measures; itself where they are final."""
        if self.widths_are_final:
            return self
        rope_dims = [item.shape.qk_rope_head_dim for item in self.converted]
        facts = self.cache_facts
        chosen = self.options.policy.widths(survey, facts, rope_dims)
        if len(facts.bits) == 1:  # policies that choose ranks alone leave the bits to the options
            latent, rope = facts.bits[0]
            chosen = [dataclasses.replace(widths, latent_bits=latent, rope_bits=rope) for widths in chosen]
        converted = tuple(
            dataclasses.replace(item, shape=_with_widths(item.shape, widths))
            for item, widths in zip(self.converted, chosen, strict=True)
        )
        plan = dataclasses.replace(self, converted=converted, widths_are_final=True)
        _check_codes(plan)
        return plan

    @property
    def kv_budget(self) -> int | None:
        """Bytes per token that the converted layers may cache together; None where no KV size was asked for."""
        return self.options.policy.budget(self.cache_facts)

    @property
    def rotary_dim(self) -> int:
        """Rows of a head that converted layers rotate in the source; 0 where none does."""
        return max(item.kind.rotary_dim for item in self.converted)

    @property
    def portable_rotary_dim(self) -> int:
        """The widest rotary key that every engine rotates as the source does."""
        return min(self.rotary_dim, self.source.family.portable_rotary_dim(self.source.values))

    @property
    def cache_facts(self) -> CacheFacts:
        """What the rank policy knows of the source."""
        geometry, before = self.source.geometry, self.source_kv_numbers_per_token()
        same_widths = self.options.portable
        every_component = geometry.num_key_value_heads * self.rotary_dim
        return CacheFacts(
            cache_width=geometry.cache_width,
            num_layers=len(self.converted),
            numbers_before=sum(before),
            numbers_kept=sum(before[item.layer] for item in self.kept),
            number_bytes=DTYPE_BYTES[self.dtype],
            full_rank=full_rank_of(self.source, self.options),
            most_rope_dim=self.portable_rotary_dim if same_widths else every_component,
            same_widths=same_widths,
            bits=self.options.cache_bits_on_offer,
            layer_bytes=self._layer_bytes,
            can_cache=lambda widths: _with_widths(self.converted[0].shape, widths).bits_obstacle is None,
        )

    def _layer_bytes(self, widths: Widths) -> int:
        """What a converted layer of these widths caches per token."""
        return _with_widths(self.converted[0].shape, widths).cache_bytes(DTYPE_BYTES[self.dtype])


def make_plan(index: CheckpointIndex, options: ConvertOptions) -> ConversionPlan:
    """Check source and options against each other, and lay out the output.

    Raises `UnsupportedModelError`, `CheckpointError` or `OptionError`; reads no weight.
    """
    source = open_source(index)
    chosen = _chosen_layers(options, source)
    biases = _biases(source, options)
    if options.portable:
        _check_portable(source, biases, chosen)
    options.initialisation.check_source(source)
    replaced = {
        f"{source.projection(which, layer)}.{part}"
        for layer in chosen
        for which in source.family.attention
        for part in ("weight", "bias")
    }
    headers = (header for name, header in source.index.headers.items() if name not in replaced)
    plan = ConversionPlan(
        source=source,
        options=options,
        converted=tuple(
            PlannedLayer(
                layer=layer, kind=source.kinds[layer], shape=_layer_shape(options, biases, source, source.kinds[layer])
            )
            for layer in chosen
        ),
        kept=tuple(KeptLayer(layer=layer, kind=kind) for layer, kind in enumerate(source.kinds) if layer not in chosen),
        copied=tuple(_stored_as(header, options) for header in headers),
        dropped=source.names.ignored,
        widths_are_final=options.policy.is_final,
    )
    options.policy.check_source(plan.cache_facts)
    _check_codes(plan)
    return plan


def _check_codes(plan: ConversionPlan) -> None:
    """Refuse widths that codes cannot have: rows are whole bytes, and so are bit planes."""
    shapes = [item.shape for item in plan.converted]
    if not plan.widths_are_final:
        # a policy that chooses no bits leaves the rotary width as it is, one that does has whole bytes on offer
        shapes = (
            [] if plan.options.policy.chooses_bits else [dataclasses.replace(each, latent_bits=16) for each in shapes]
        )
    obstacle = next((each.bits_obstacle for each in shapes if each.bits_obstacle is not None), None)
    if obstacle is not None:
        raise OptionError(f"--cache-bits: {obstacle}; choose another --rank or --rope-dim.")


def _with_widths(shape: MlaShape, widths: Widths) -> MlaShape:
    return dataclasses.replace(
        shape,
        kv_lora_rank=widths.kv_lora_rank,
        qk_rope_head_dim=widths.qk_rope_head_dim,
        latent_bits=widths.latent_bits,
        rope_bits=widths.rope_bits,
    )


def _num_weights(tensors: Mapping[str, tuple[int, ...]], *, matrices_only: bool = False) -> int:
    """Numbers in the weights of these tensors, without biases."""
    least = 2 if matrices_only else 1
    return sum(math.prod(size) for name, size in tensors.items() if name.endswith(".weight") and len(size) >= least)


def _chosen_layers(options: ConvertOptions, source: SourceModel) -> tuple[int, ...]:
    """The layers of --layers; without it all, but for sliding windows that the family keeps."""
    everything = tuple(range(source.geometry.num_hidden_layers))
    if options.layers is None:
        return tuple(layer for layer in everything if not source.kinds[layer].keeps_window) or everything
    chosen = parse_layers(options.layers)
    if chosen[-1] > everything[-1]:
        raise OptionError(f"--layers: expected layers from 0 to {everything[-1]}, found {chosen[-1]}; change the list.")
    return chosen


def _check_portable(source: SourceModel, biases: tuple[str, ...], chosen: Sequence[int]) -> None:
    """Refuse what a stock DeepSeek model could not hold, before anything is computed."""
    family = source.family
    reason = family.not_portable_because(source.values, biases)
    if reason is None and len(chosen) < source.geometry.num_hidden_layers:
        reason = "some of its layers are to keep their attention, and a stock model has none but MLA"
    if reason is not None:
        raise OptionError(f"--portable: a {family.model_type} model cannot become DeepSeek-V3: {reason}; leave it out.")


def _layer_shape(options: ConvertOptions, biases: tuple[str, ...], source: SourceModel, kind: LayerKind) -> MlaShape:
    """Widths of a converted layer; the rank is an upper bound where a policy chooses it."""
    geometry = source.geometry
    full_rank = full_rank_of(source, options)
    rank = options.policy.rank_bound(full_rank)
    require_at_most("--rank", rank, full_rank, "the full rank of keys and values")
    nope_dim, rope_dim = options.initialisation.head_widths(source, options, kind.rotary_dim)
    full_q_rank = min(geometry.num_attention_heads * geometry.head_dim, geometry.hidden_size)
    require_at_most("--q-rank", options.q_rank, full_q_rank, "the full rank of the queries")
    keeps_keys = keeps_key_norm(source, options)
    latent_bits, rope_bits = options.cache_bits_on_offer[0]
    return MlaShape(
        num_attention_heads=geometry.num_attention_heads,
        hidden_size=geometry.hidden_size,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=geometry.head_dim,
        q_lora_rank=options.q_rank,
        latent_norm=options.has_latent_norm,
        biases=biases,
        q_norm=source.norm_of("q_norm"),
        k_norm=source.norm_of("k_norm") if keeps_keys else None,
        logit_softcap=source.logit_softcap,
        latent_bits=latent_bits,
        rope_bits=rope_bits,
        num_key_value_heads=geometry.num_key_value_heads if keeps_keys else 0,
    )


def keeps_key_norm(source: SourceModel, options: ConvertOptions) -> bool:
    """Whether converted layers compute the source's normalised keys before they become latents."""
    return source.family.has_key_norm and options.qk_norm == "exact"


def full_rank_of(source: SourceModel, options: ConvertOptions) -> int:
    """The rank at which a latent holds all keys and values; those that are linear in the input have no more directions."""
    width, hidden = source.geometry.cache_width, source.geometry.hidden_size
    return width if keeps_key_norm(source, options) else min(width, hidden)


def _biases(source: SourceModel, options: ConvertOptions) -> tuple[str, ...]:
    """Projections of the converted layer that have a bias, given those of the source's first layer."""
    stored_as = {which: which if which in source.family.attention else FUSED for which in PROJECTIONS}
    present = {which: f"{source.projection(name, 0)}.bias" in source.index.headers for which, name in stored_as.items()}
    key_value = ("k", "v") if keeps_key_norm(source, options) else options.initialisation.key_value_biases
    query, out = (("q",) if present["q_proj"] else ()), (("o",) if present["o_proj"] else ())
    return query + (key_value if present["k_proj"] else ()) + out


def _stored_as(header: TensorHeader, options: ConvertOptions) -> TensorHeader:
    if options.dtype is None:
        return header
    return dataclasses.replace(header, dtype=STORED_AS[options.dtype])


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key by which layer 10 follows layer 9."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def num_parameters(headers: Sequence[TensorHeader]) -> int:
    """Numbers stored in these tensors."""
    return sum(math.prod(header.shape) for header in headers)
