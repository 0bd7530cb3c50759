"""What each engine takes as DeepSeek-V3: widths that its kernels are made for, rotary types, and what it gets silently wrong.

Sources: transformers 5.23 (run here); vLLM 0.33, SGLang 0.5.23 and llama.cpp of autumn 2026 as read and tried for
docs/serving.md. A width that an engine does not take is reached by zeros, which change no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xeco_convert.errors import UnsupportedModelError
from xeco_convert.families.spec import rope_parameters


@dataclass(frozen=True, kw_only=True)
class HeadWidths:
    """qk_nope_head_dim, qk_rope_head_dim and v_head_dim of one head."""

    nope: int
    rope: int
    v: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine. `heads` and `ranks`: the widths that it takes, smallest first; empty: any. `rope_types`: those that it
    reads as transformers does. `config`: fields of config.json that it wants otherwise."""

    name: str
    heads: tuple[HeadWidths, ...] = ()
    ranks: tuple[int, ...] = ()
    rope_types: tuple[str, ...] = ("default",)
    rope_reason: str = ""
    config: Mapping[str, Any]

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
            f"{needed}; convert it with --rank {self.ranks[-1]} or a smaller KV size."
        )

    def check_rope(self, config: Mapping[str, Any], *, whole: bool) -> None:
        """Refuse rotary settings that the engine would read as something else. `whole`: every source frequency has its slot,
        in order, so that even scalings that look at all frequencies together come out alike."""
        settings = rope_parameters(config)
        kind = settings.get("rope_type", "default")
        if kind not in self.rope_types:
            raise UnsupportedModelError(
                f"--target {self.name}: rotary type {kind!r} would not come out as in the source ({self.rope_reason}); "
                f"expected {', '.join(self.rope_types)}. Use --target transformers, or serve the converted folder itself."
            )
        if kind in ("yarn", "dynamic") and not whole:
            raise UnsupportedModelError(
                f"--target {self.name}: rotary type {kind!r} scales all frequencies of a head together, so it needs every one of "
                "them: convert with --portable and --rope-dim equal to the head's rotary width."
            )


_DEEPSEEK_HEADS = (HeadWidths(nope=64, rope=64, v=128), HeadWidths(nope=128, rope=64, v=128))
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="transformers",
            rope_types=("default", "linear", "llama3", "yarn", "dynamic"),
            rope_reason="the class has no such type",
            config={},
        ),
        Target(
            name="vllm",
            heads=(*_DEEPSEEK_HEADS, HeadWidths(nope=192, rope=64, v=256)),
            ranks=(256, 448, 512),
            rope_reason="vLLM's DeepSeek class replaces it by YaRN or refuses it",
            config={},
        ),
        Target(
            name="sglang",
            heads=_DEEPSEEK_HEADS,
            ranks=(256, 512),
            rope_reason="SGLang's DeepSeek class reads it as YaRN",
            config={},
        ),
        Target(
            name="llama.cpp",
            rope_reason="llama.cpp's deepseek2 graph ignores it",
            # the converter takes null for "a Lite model", by which llama.cpp then guesses from the number of layers
            config={"q_lora_rank": 0, "n_group": None, "topk_group": None},
        ),
    )
}
