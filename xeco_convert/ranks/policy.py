"""What a rank policy is: it owns its options, what it refuses, how it is described, and the widths of the converted layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from xeco_convert.errors import OptionError
from xeco_convert.registry import Registry
from xeco_convert.settings import flag_of, option_fields, options_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Cached numbers per token of one layer, the latent's and the rotary key's, and the bits of each."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    latent_bits: int = 16
    rope_bits: int = 16

    @property
    def total(self) -> int:
        """Numbers."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def bits(self) -> tuple[int, int]:
        """Of the latent and of the rotary key."""
        return self.latent_bits, self.rope_bits


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What a policy knows of the source before any weight is read. `cache_width`: numbers that the source caches per token
    and layer; `numbers_before` and `numbers_kept`: per token, of all layers and of those that keep their attention;
    `full_rank` and `most_rope_dim`: the widest latent and rotary key of a layer; `same_widths`: all layers must get the same;
    `bits`: those of latent and rotary key that may be chosen; `layer_bytes`: what a layer of some widths caches per token;
    `can_cache`: whether rows of some widths can have their bits."""

    cache_width: int
    num_layers: int
    numbers_before: int
    numbers_kept: int
    number_bytes: int
    full_rank: int
    most_rope_dim: int
    same_widths: bool
    bits: tuple[tuple[int, int], ...]
    layer_bytes: Callable[[Widths], int]
    can_cache: Callable[[Widths], bool] = lambda widths: True


class WidthSurvey(Protocol):
    """What an initialisation can measure for a policy; each goes through the source once."""

    def spectra(self) -> list[NDArray[np.float64]]:
        """Singular values [full rank] of the latent of every converted layer, descending."""
        ...

    def costs(self, offers: Sequence[Widths], average: float) -> list[dict[Widths, float]]:
        """Expected KL at the model's output of every offer for every converted layer; `average`: bytes per token and layer
        that are to be spent."""
        ...


@dataclass(frozen=True, kw_only=True)
class RankPolicy(ABC):
    """A policy with the values of its options, which are its dataclass fields.

    `chosen_by`: the options of which one selects it. `sentences`: what to say where another of its options is given without
    them; `conflicts`: what to say of options that every conversion has and that have no meaning beside it. `needs_costs`:
    whether it asks the survey for costs, which only calibration can measure. `chooses_bits`: whether it chooses among several
    numbers of bits. `is_final`: whether the widths follow from the options alone.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    chosen_by: ClassVar[tuple[str, ...]]
    sentences: ClassVar[Mapping[str, str]] = {}
    conflicts: ClassVar[Mapping[str, str]] = {}
    needs_costs: ClassVar[bool] = False
    chooses_bits: ClassVar[bool] = False
    is_final: ClassVar[bool] = False

    @classmethod
    def accepts(cls, selecting: Set[str], values: Mapping[str, Any]) -> bool:
        """Whether it takes just these options that select policies, given the values of all."""
        return len(selecting) == 1 and selecting <= set(cls.chosen_by)

    def rank_bound(self, full_rank: int) -> int:
        """The widest latent that it may choose."""
        return full_rank

    def budget(self, facts: CacheFacts) -> int | None:
        """Bytes per token that the converted layers may cache together; None where no size of the cache was given."""
        return None

    def check_source(self, facts: CacheFacts) -> None:
        """Raise `OptionError` for what this source cannot meet."""
        return

    @abstractmethod
    def describe(self, facts: CacheFacts, widths: Widths, default: str) -> str:
        """The widths of the converted layers in words, or how they will be chosen; `default` follows a rotary width that
        nobody gave."""

    @abstractmethod
    def widths(self, survey: WidthSurvey, facts: CacheFacts, rope_dims: Sequence[int]) -> list[Widths]:
        """The widths of every converted layer; `rope_dims`: the rotary widths that the options ask for. Not called where the
        policy is final."""


RANK_POLICIES: Registry[type[RankPolicy]] = Registry("xeco_convert.ranks")


def policy_from(values: Mapping[str, Any]) -> RankPolicy:
    """The policy that these options select. Raises `OptionError` where none or several do, or where one has no meaning here."""
    selecting = [name for policy in RANK_POLICIES for name in policy.chosen_by if values.get(name) is not None]
    if not selecting:
        others = [flag_of(name) for policy in RANK_POLICIES for name in policy.chosen_by]
        others = [flag for flag in others if flag not in ("--kv-size", "--rank")]
        raise OptionError(f"no KV size was given: add --kv-size 25%, --rank 128, or another of {', '.join(others)}.")
    for policy in RANK_POLICIES:
        for name, sentence in policy.sentences.items():
            if values.get(name) not in (None, False) and not set(selecting) & set(policy.chosen_by):
                raise OptionError(sentence)
    for policy in RANK_POLICIES:
        if policy.accepts(set(selecting), values):
            for name, sentence in policy.conflicts.items():
                if values.get(name) is not None:
                    raise OptionError(sentence)
            return policy(**options_of(policy, values))
    raise OptionError(f"{' and '.join(map(flag_of, selecting))} all set the rank: give one of them.")


def policy_options() -> dict[str, Any]:
    """The options of all policies, by name: fields of dataclasses."""
    fields: dict[str, Any] = {}
    for policy in RANK_POLICIES:
        fields = option_fields(policy) | fields
    return {name: fields[name] for policy in RANK_POLICIES for name in option_fields(policy)}
