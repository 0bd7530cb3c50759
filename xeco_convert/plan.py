"""The plan of a conversion, made from config.json and headers alone: what is converted, copied, dropped, and how large.

Nothing here reads a weight. Every tensor of the source has one fate, and everything that can be refused is refused here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex, TensorHeader
from xeco_convert.checkpoint.dtypes import STORED_AS
from xeco_convert.errors import OptionError, UnsupportedModelError
from xeco_convert.families import AttentionGeometry, FamilySpec, LayerKind
from xeco_convert.families.spec import FUSED, PROJECTIONS
from xeco_convert.modeling.layer_xeco import MlaShape
from xeco_convert.options import ConvertOptions, parse_layers, parse_share
from xeco_convert.ranks.budget import Widths, default_multiple, rope_step
from xeco_convert.source import SourceModel, open_source


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: the widths it gets, or None where it keeps its attention."""

    layer: int
    shape: MlaShape | None
    kind: LayerKind

    @property
    def window(self) -> int | None:
        """The sliding window of a layer that keeps its attention because its cache does not grow beyond that."""
        return self.kind.window if self.shape is None else None


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do. `ranks_are_final` is False while a policy still has to look at the spectra: the ranks
    given are upper bounds then."""

    source: SourceModel
    options: ConvertOptions
    layers: tuple[LayerPlan, ...]
    copied: tuple[TensorHeader, ...]
    dropped: tuple[str, ...]
    ranks_are_final: bool

    @property
    def index(self) -> CheckpointIndex:
        return self.source.index

    @property
    def family(self) -> FamilySpec:
        return self.source.family

    @property
    def geometry(self) -> AttentionGeometry:
        return self.source.geometry

    @property
    def converted_layers(self) -> tuple[int, ...]:
        return tuple(plan.layer for plan in self.layers if plan.shape is not None)

    @property
    def dtype(self) -> str:
        """Dtype of all weights written, in safetensors' words: the option's, or the source's first query projection's."""
        if self.options.dtype is not None:
            return STORED_AS[self.options.dtype]
        return self.index.headers[f"{self.projection(self.family.projections[0], 0)}.weight"].dtype

    def projection(self, which: str, layer: int) -> str:
        """Name of a source projection, without .weight."""
        return self.family.attention[which].format(layer=layer)

    def module_name(self, layer: int) -> str:
        """Name of the attention module that holds the projections."""
        return self.family.module_name(layer)

    def converted_headers(self, layer: int) -> list[TensorHeader]:
        """Tensors that replace the attention of a converted layer."""
        shape = self.layers[layer].shape
        assert shape is not None
        module = self.module_name(layer)
        return [TensorHeader(name=f"{module}.{n}", dtype=self.dtype, shape=s) for n, s in shape.tensors().items()]

    def output_headers(self) -> list[TensorHeader]:
        """All tensors of the output, in the order of the source's layers: outer tensors, then layer by layer."""
        converted = [header for layer in self.converted_layers for header in self.converted_headers(layer)]
        return sorted([*self.copied, *converted], key=lambda header: _natural(header.name))

    def kv_numbers_per_token(self) -> list[int]:
        """Numbers that each layer of the output caches per token."""
        return [
            before if plan.shape is None else plan.shape.cache_width
            for plan, before in zip(self.layers, self.source_kv_numbers_per_token(), strict=True)
        ]

    def source_kv_numbers_per_token(self) -> list[int]:
        """The same of the source. A layer that keeps its sliding window counts nothing: its cache does not grow with the
        text, and no conversion changes it."""
        return [0 if plan.window is not None else self.geometry.cache_width for plan in self.layers]

    def exact_key_cost(self) -> tuple[int, int]:
        """What keys behind their norm cost beside a plain projection to the latent: parameters more (the source's k_proj,
        k_norm and v_proj, less what a projection from the input would have), and multiplications more for each token written."""
        parameters = products = 0
        for item in self.layers:
            if item.shape is not None and item.shape.k_norm is not None:
                own, plain = item.shape.tensors(), dataclasses.replace(item.shape, k_norm=None).tensors()
                sizes = [
                    {name: math.prod(size) for name, size in tensors.items() if name.endswith(".weight")}
                    for tensors in (own, plain)
                ]
                parameters += sum(sizes[0].values()) - sum(sizes[1].values())
                matrices = [{n: s for n, s in one.items() if "norm" not in n} for one in sizes]
                products += sum(matrices[0].values()) - sum(matrices[1].values())
        return parameters, products

    @property
    def kept_windows(self) -> tuple[int, ...]:
        """Layers that keep their attention because of its sliding window."""
        return tuple(plan.layer for plan in self.layers if plan.window is not None)

    def with_widths(self, widths: Sequence[Widths]) -> ConversionPlan:
        """The plan with the policy's choice, one for each converted layer."""
        chosen = dict(zip(self.converted_layers, widths, strict=True))
        layers = tuple(
            dataclasses.replace(plan, shape=_with_widths(plan.shape, chosen[plan.layer]))
            if plan.shape is not None
            else plan
            for plan in self.layers
        )
        return dataclasses.replace(self, layers=layers, ranks_are_final=True)

    def with_rope_index(self, layer: int, rope_index: tuple[int, ...] | None) -> ConversionPlan:
        """The plan with the rotary frequencies that a layer's factorisation chose."""
        layers = list(self.layers)
        shape = layers[layer].shape
        assert shape is not None
        layers[layer] = dataclasses.replace(layers[layer], shape=dataclasses.replace(shape, rope_index=rope_index))
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def kv_budget(self) -> int | None:
        """Numbers per token that the converted layers may cache together; None where no KV size was asked for."""
        options, before = self.options, self.source_kv_numbers_per_token()
        if options.kv_size is not None:
            total = int(parse_share(options.kv_size) * sum(before) + 1e-9)
        elif options.kv_bytes_per_token is not None:
            total = options.kv_bytes_per_token // DTYPE_BYTES[self.dtype]
        else:
            return None
        return total - sum(before[plan.layer] for plan in self.layers if plan.shape is None)

    @property
    def rank_multiple(self) -> int:
        """Step of the widths that a KV budget is split into."""
        return self.options.rank_multiple or default_multiple(self.geometry.cache_width)


def make_plan(index: CheckpointIndex, options: ConvertOptions) -> ConversionPlan:
    """Check source and options against each other, and lay out the output.

    Raises `UnsupportedModelError`, `CheckpointError` or `OptionError`; reads no weight.
    """
    source = open_source(index)
    index, family, geometry, kinds = source.index, source.family, source.geometry, source.kinds
    chosen = _chosen_layers(options, geometry, kinds)
    biases = _biases(source, options)
    if options.portable:
        _check_portable(source, biases, chosen)
    if options.init == "paper":
        _check_paper(family, geometry, kinds)
    converted = {
        f"{name.format(layer=layer)}.{part}"
        for layer in chosen
        for name in family.attention.values()
        for part in ("weight", "bias")
    }
    headers = (header for name, header in index.headers.items() if name not in converted)
    copied = tuple(_stored_as(header, options) for header in headers)
    plan = ConversionPlan(
        source=source,
        options=options,
        layers=tuple(
            LayerPlan(
                layer=layer,
                shape=_layer_shape(options, biases, source, kind) if layer in chosen else None,
                kind=kind,
            )
            for layer, kind in enumerate(kinds)
        ),
        copied=copied,
        dropped=source.names.ignored,
        ranks_are_final=options.energy is None and not options.has_budget,
    )
    _check_budget(plan)
    return plan


def _check_budget(plan: ConversionPlan) -> None:
    """Refuse a KV budget below one step for latent and rotary key in each layer, or below what kept layers take."""
    budget = plan.kv_budget
    least = (plan.rank_multiple + rope_step(plan.rank_multiple)) * len(plan.converted_layers)
    if budget is None or budget >= least:
        return
    before = plan.source_kv_numbers_per_token()
    kept = sum(before[item.layer] for item in plan.layers if item.shape is None)
    total = sum(before)
    smallest = least + kept
    flag = "--kv-size" if plan.options.kv_size is not None else "--kv-bytes-per-token"
    raise OptionError(
        f"{flag}: expected at least {smallest / total:.1%} ({smallest} numbers per token, "
        f"{smallest * DTYPE_BYTES[plan.dtype]} bytes) for {len(plan.converted_layers)} converted layers in steps of "
        f"{plan.rank_multiple}, found {(budget + kept) / total:.1%} ({budget + kept} numbers); allow more, or lower "
        "--rank-multiple."
    )


def _with_widths(shape: MlaShape, widths: Widths) -> MlaShape:
    """The shape with other widths; frequencies not chosen yet are shown as the first one."""
    index = None if shape.rope_index is None else (0,) * (widths.qk_rope_head_dim // 2)
    return dataclasses.replace(
        shape, kv_lora_rank=widths.kv_lora_rank, qk_rope_head_dim=widths.qk_rope_head_dim, rope_index=index
    )


def _chosen_layers(options: ConvertOptions, geometry: AttentionGeometry, kinds: Sequence[LayerKind]) -> tuple[int, ...]:
    """The layers of --layers; without it all, but for sliding windows that the family keeps."""
    everything = tuple(range(geometry.num_hidden_layers))
    if options.layers is None:
        return tuple(layer for layer in everything if kinds[layer].window is None) or everything
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


def _check_paper(family: FamilySpec, geometry: AttentionGeometry, kinds: Sequence[LayerKind]) -> None:
    """The published initialisation knows linear keys that are rotated over the whole head, with one set of frequencies."""
    reason = None
    if family.has_key_norm:
        reason = "whose keys are normalised, and so not linear in the weights that it factorises"
    elif any(kind.rotary_dim != geometry.head_dim for kind in kinds) or family.partial_rotary:
        reason = "that does not rotate whole heads in every layer"
    if reason is not None:
        raise OptionError(
            f"--init paper: not for {family.model_type}, {reason}; use --init calibrated, which is the default."
        )


def _layer_shape(options: ConvertOptions, biases: tuple[str, ...], source: SourceModel, kind: LayerKind) -> MlaShape:
    """Widths of a converted layer; the rank is an upper bound where a policy chooses it."""
    geometry = source.geometry
    dim, calibrated = geometry.head_dim, options.init == "calibrated"
    full_rank = full_rank_of(source, options)
    rotary_dim = kind.rotary_dim or dim  # a NoPE layer takes part in no check of the rotary width
    most_rope = geometry.num_key_value_heads * rotary_dim if calibrated and not options.portable else rotary_dim
    full_q_rank = min(geometry.num_attention_heads * dim, geometry.hidden_size)
    _at_most("--rank", options.rank, full_rank, "the full rank of keys and values")
    _at_most("--rope-dim", options.rope_dim, most_rope, "all rotary rows" if calibrated else "head_dim")
    _at_most("--nope-dim", options.nope_dim, dim, "head_dim")
    _at_most("--q-rank", options.q_rank, full_q_rank, "the full rank of the queries")
    rope_dim = options.rope_dim or (min(64, most_rope) if calibrated else max(2, dim // 4 * 2))
    if kind.rotary_dim == 0:
        rope_dim = 0
    rank = full_rank if options.rank is None or options.energy is not None else options.rank
    nope_dim = dim if calibrated else dim - rope_dim
    return MlaShape(
        num_attention_heads=geometry.num_attention_heads,
        hidden_size=geometry.hidden_size,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope_dim if options.nope_dim is None else options.nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=dim,
        q_lora_rank=options.q_rank,
        latent_norm=options.has_latent_norm,
        rope_index=(0,) * (rope_dim // 2) if calibrated else None,
        biases=biases,
        q_norm=norm_of(source, "q_norm"),
        k_norm=norm_of(source, "k_norm") if keeps_key_norm(source, options) else None,
        logit_softcap=source.logit_softcap,
        num_key_value_heads=geometry.num_key_value_heads if keeps_key_norm(source, options) else 0,
    )


def keeps_key_norm(source: SourceModel, options: ConvertOptions) -> bool:
    """Whether converted layers compute the source's normalised keys before they become latents."""
    return source.family.has_key_norm and options.qk_norm == "exact"


def full_rank_of(source: SourceModel, options: ConvertOptions) -> int:
    """The rank at which a latent holds all keys and values; those that are linear in the input have no more directions."""
    width, hidden = source.geometry.cache_width, source.geometry.hidden_size
    return width if keeps_key_norm(source, options) else min(width, hidden)


def norm_of(source: SourceModel, which: str) -> str | None:
    """How the source normalises queries or keys: "head", each head by itself, or "all" rows together.

    Raises `UnsupportedModelError` for another norm than an RMSNorm over one or the other.
    """
    if which not in source.family.attention:
        return None
    geometry, name = source.geometry, source.family.attention[which].format(layer=0)
    norm = source.skeleton.get_submodule(name)
    heads = geometry.num_attention_heads if which == "q_norm" else geometry.num_key_value_heads
    kinds = {heads * geometry.head_dim: "all", geometry.head_dim: "head"}
    width = norm.weight.numel()
    if width not in kinds or not type(norm).__name__.endswith("RMSNorm"):
        raise UnsupportedModelError(
            f"{name}: expected an RMSNorm over a head of {geometry.head_dim} rows, or over all {heads * geometry.head_dim}, "
            f"found {type(norm).__name__} over {width}; this version does not know such a norm."
        )
    return kinds[width]


def _at_most(flag: str, value: int | None, limit: int, what: str) -> None:
    if value is not None and value > limit:
        raise OptionError(
            f"{flag}: expected at most {limit} ({what} of this model), found {value}; choose a smaller value."
        )


def _biases(source: SourceModel, options: ConvertOptions) -> tuple[str, ...]:
    """Projections of the converted layer that have a bias, given those of the source's first layer."""
    index, attention = source.index, source.family.attention
    present = {
        which: f"{attention.get(which, attention.get(FUSED, '')).format(layer=0)}.bias" in index.headers
        for which in PROJECTIONS
    }
    # the calibrated latent carries the biases of keys and values itself; the published one adds them after expansion
    key_value: tuple[str, ...] = ("kv_a",) if options.init == "calibrated" else ("kv_a", "kv_b")
    if keeps_key_norm(source, options):
        key_value = ("k", "v")
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
