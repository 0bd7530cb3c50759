"""What an engine is: the widths that its kernels are made for, rotary types, and what it gets silently wrong.

A width that an engine does not take is reached by zeros, which change no result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.errors import OptionError, UnsupportedModelError
from xeco_convert.registry import Registry


@dataclass(frozen=True, kw_only=True)
class HeadWidths:
    """qk_nope_head_dim, qk_rope_head_dim and v_head_dim of one head."""

    nope: int
    rope: int
    v: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine. `heads` and `ranks`: the widths that it takes, smallest first; empty: any. `rope_types`: those that it
    reads as transformers does, and `rope_reason` what it does with others. `config`: fields of config.json that it wants
    otherwise. `norm_eps`: the eps of its latent norm, whatever config.json says; None: that of config.json. `padding_advice`: how
    to do without the zeros that its widths cost. `scaling_field`: where else in config.json it looks for a rotary type other
    than default, and `scaling_fields` what it reads there; empty: all. `most_layers`, for `layers_reason`; None: any."""

    name: str
    order: int = 100
    heads: tuple[HeadWidths, ...] = ()
    ranks: tuple[int, ...] = ()
    rope_types: tuple[str, ...] = ("default",)
    rope_reason: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    padding_advice: str = ""
    scaling_field: str = ""
    scaling_fields: tuple[str, ...] = ()
    most_layers: int | None = None
    layers_reason: str = ""

    def padded_heads(self, needed: HeadWidths) -> HeadWidths:
        """The smallest widths that hold `needed`. Raises `UnsupportedModelError` that names those on offer."""
        if not self.heads:
            return needed
        for offer in self.heads:
            if offer.nope >= needed.nope and offer.rope >= needed.rope and offer.v >= needed.v:
                return offer
        offers = ", ".join(f"({offer.nope}, {offer.rope}, {offer.v})" for offer in self.heads)
        raise UnsupportedModelError(
            f"--target {self.name}: its kernels take heads of (nope, rope, v) = {offers}, and this model needs "
            f"({needed.nope}, {needed.rope}, {needed.v}); convert it with a smaller --rope-dim, or choose another target."
        )

    def padded_rank(self, needed: int) -> int:
        """The smallest rank that holds `needed`. Raises `UnsupportedModelError`."""
        if not self.ranks:
            return needed
        for offer in self.ranks:
            if offer >= needed:
                return offer
        raise UnsupportedModelError(
            f"--target {self.name}: its kernels take latents of up to {self.ranks[-1]} numbers, and this model has "
            f"{needed}; export it with --rank {self.ranks[-1]}, or convert it with that or a smaller KV size."
        )

    def check_rank(self, rank: int) -> None:
        """Refuse a smaller rank that zeros would fill up again. Raises `OptionError` that names those on offer."""
        if self.ranks and rank not in self.ranks:
            offers = " or ".join(", ".join(map(str, self.ranks)).rsplit(", ", 1))
            raise OptionError(
                f"--rank: --target {self.name} takes latents of {offers} numbers, so zeros would fill {rank} up to the next; "
                "choose one of these, another target, or leave --rank out."
            )

    def check_rope(self, kind: str, *, whole: bool, unscaled: int) -> None:
        """Refuse a rotary type that the engine would read as something else. `whole`: every source frequency has its slot, in
        order, so that even scalings that look at all frequencies together come out alike. `unscaled`: how many of the fastest
        frequencies the type leaves as they are."""
        if kind not in self.rope_types:
            way = f"Convert with --portable and --rope-dim {2 * unscaled} at most, use" if unscaled else "Use"
            raise UnsupportedModelError(
                f"--target {self.name}: rotary type {kind!r} would not come out as in the source ({self.rope_reason}); "
                f"expected {', '.join(self.rope_types)}. {way} --target transformers, or serve the converted folder itself."
            )
        if kind in ("yarn", "dynamic") and not whole:
            raise UnsupportedModelError(
                f"--target {self.name}: rotary type {kind!r} scales all frequencies of a head together, so it needs every one of "
                "them: convert with --portable and --rope-dim equal to the head's rotary width."
            )

    def config_fields(self, rotary: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of config.json that it wants otherwise; `rotary`: rope_parameters of the stock model. Raises
        `UnsupportedModelError` for settings of a scaling that it would not read."""
        if not self.scaling_field or rotary.get("rope_type", "default") == "default":
            return dict(self.config)
        ignored = sorted(
            name for name, value in rotary.items() if value is not None and name not in self.scaling_fields
        )
        if ignored and self.scaling_fields:
            raise UnsupportedModelError(
                f"--target {self.name}: it does not read {', '.join(ignored)} of the rotary type {rotary['rope_type']!r}, so the "
                "model would rotate otherwise than its source. Use --target transformers, or serve the converted folder itself."
            )
        return {**self.config, self.scaling_field: dict(rotary)}

    def check_layers(self, number: int) -> None:
        """Refuse models of more layers than it loads. Raises `UnsupportedModelError`."""
        if self.most_layers is not None and number > self.most_layers:
            raise UnsupportedModelError(
                f"--target {self.name}: {self.layers_reason}: expected at most {self.most_layers} layers, found {number}; choose "
                "another target."
            )


# What the kernels of vLLM and SGLang were written for: DeepSeek's own widths, and those of its smaller models.
DEEPSEEK_HEADS = (HeadWidths(nope=64, rope=64, v=128), HeadWidths(nope=128, rope=64, v=128))
# What vLLM's prefill kernels take besides. They also take (256, 0, 256), heads without rotation: no model that is converted is
# without any, and a slot for one frequency is wider than that.
VLLM_HEADS = (*DEEPSEEK_HEADS, HeadWidths(nope=192, rope=64, v=256))
VLLM_PADDING = (
    "vLLM with xeco-convert installed beside it serves the converted folder itself, without padding (docs/serving.md)"
)
ENGINES: Registry[Engine] = Registry("xeco_convert.export.engines")
