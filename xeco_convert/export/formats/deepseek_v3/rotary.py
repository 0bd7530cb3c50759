"""Rotary frequencies of a converted model in a stock one, which has one pair for each frequency of a geometric grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xeco_convert.errors import UnsupportedModelError
from xeco_convert.families import FamilySpec
from xeco_convert.families.spec import rope_parameters, unscaled_frequencies
from xeco_convert.modeling import MlaLayer


@dataclass(frozen=True, kw_only=True)
class RotarySlots:
    """Slot j of a stock model, of frequency theta^(-2j/P), holds the source's frequency stride·j. `whole`: the slots are all
    frequencies of the source. `settings`: rope_parameters of the stock model."""

    stride: int
    slots: int
    whole: bool
    settings: Mapping[str, Any]

    def slot(self, frequency: int) -> int:
        """The slot of a source frequency."""
        return frequency // self.stride


@dataclass(frozen=True, kw_only=True)
class UsedFrequencies:
    """The frequencies that a converted model rotates at: numbers of the grid theta^(-2i/width). `settings`: rope_parameters
    of the source."""

    numbers: frozenset[int]
    width: int
    settings: Mapping[str, Any]

    @property
    def stride(self) -> int:
        return math.gcd(*self.numbers) or 1

    @property
    def needed_slots(self) -> int:
        """Slots of the narrowest stock grid that has all of them."""
        return max(self.numbers, default=0) // self.stride + 1

    @property
    def unscaled(self) -> int:
        """How many of the fastest frequencies of the grid the rotary type leaves as they are."""
        return unscaled_frequencies(self.settings, self.width)

    @property
    def kind(self) -> str:
        """The rotary type that the stock model needs: the source's, or "default" where that scales none of those in use."""
        if max(self.numbers, default=0) < self.unscaled:
            return "default"
        return str(self.settings.get("rope_type", "default"))

    def in_slots(self, slots: int) -> RotarySlots:
        """A stock grid of so many slots: theta'^(-2j/P') has to be theta^(-2·stride·j/width)."""
        theta = float(self.settings["rope_theta"])
        whole = self.stride == 1 and 2 * slots == self.width
        stock = theta if whole else theta ** (self.stride * 2 * slots / self.width)
        settings = {
            name: value for name, value in self.settings.items() if name not in ("partial_rotary_factor", "type")
        }
        if self.kind != settings.get("rope_type", "default"):
            settings = {"rope_type": self.kind}
        return RotarySlots(stride=self.stride, slots=slots, whole=whole, settings={**settings, "rope_theta": stock})


def used_frequencies(config: Mapping[str, Any], family: FamilySpec, layers: Sequence[MlaLayer]) -> UsedFrequencies:
    """Those of all layers. Raises `UnsupportedModelError` where a stock rotary key could not hold them."""
    used: set[int] = set()
    for number, layer in enumerate(layers):
        index = layer.rope_index if layer.rope_index is not None else tuple(range(layer.qk_rope_head_dim // 2))
        repeated = sorted({frequency for frequency in index if index.count(frequency) > 1})
        if repeated:
            raise UnsupportedModelError(
                f"config.json: layer {number} rotates several pairs at one frequency ({repeated[0]}), and a stock rotary key has "
                "one pair for each; convert with --portable."
            )
        used.update(index)
    # frequencies that are not the source's own are over the rotary width of the converted layer
    fresh = next((layer.qk_rope_head_dim for layer in layers if layer.rope_index is None), None)
    widest = max((layer.qk_rope_head_dim for layer in layers), default=0)
    if fresh is not None and any(layer.rope_index is not None or layer.qk_rope_head_dim != widest for layer in layers):
        raise UnsupportedModelError(
            "config.json: rotary widths or frequencies differ between layers; convert with --portable."
        )
    width = fresh or family.rotary_width(config)
    return UsedFrequencies(numbers=frozenset(used), width=width, settings=rope_parameters(config))
