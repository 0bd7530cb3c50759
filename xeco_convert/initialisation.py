"""What an initialisation is: it owns its options, what it refuses, the widths it starts from, and how factors are made.

A module of xeco_convert.inits is imported for --help: torch and all that needs it is imported where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from xeco_convert.errors import OptionError
from xeco_convert.ranks.policy import RankPolicy, WidthSurvey
from xeco_convert.registry import Registry
from xeco_convert.settings import flag_of, option_fields, options_of
from xeco_convert.stopwatch import Timings

if TYPE_CHECKING:
    import torch

    from xeco_convert.factorize import MlaAttention, SourceAttention
    from xeco_convert.factorize.layer_weights import LayerErrors
    from xeco_convert.options import ConvertOptions
    from xeco_convert.plan import ConversionPlan
    from xeco_convert.source import SourceModel

# (what, share of the work done from 0 to 1)
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """One converted layer: the source's weights, the factors, and what is known of their error.

    `details`: further figures for the report, as JSON types.
    """

    layer: int
    source: SourceAttention
    factors: MlaAttention
    errors: LayerErrors
    details: dict[str, Any] = field(default_factory=dict)


class LayerMaker(WidthSurvey, Protocol):
    """An initialisation at work on one source: makes the factors of the converted layers, one in memory at a time. It is a
    `WidthSurvey` as well, of which it offers what its initialisation says that it measures."""

    def layers(self, plan: ConversionPlan) -> Iterator[ConvertedLayer]:
        """Every converted layer of the final plan, in the order of the layers."""
        ...

    def summary(self) -> dict[str, Any]:
        """Figures of the whole conversion for the report, as JSON types; after the last layer."""
        ...

    def timings(self) -> Timings:
        """How long its parts took; empty where it does not say."""
        ...


@dataclass(frozen=True, kw_only=True)
class Initialisation(ABC):
    """An initialisation with the values of its options, which are its dataclass fields.

    `about`: for the help of --init. `advice`: a sentence or two of the model card. `measures_costs`: whether it can tell what
    widths would cost at the model's output. `key_value_biases`: projections of a converted layer that carry the biases of the
    source's keys and values.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    about: ClassVar[str]
    advice: ClassVar[str]
    measures_costs: ClassVar[bool] = False
    key_value_biases: ClassVar[tuple[str, ...]] = ("kv_a",)

    @classmethod
    def refusal(cls, name: str, owners: str) -> str:
        """What to say of an option that only the initialisations `owners` have."""
        return f"{flag_of(name)}: only with --init {owners}; leave one of them out."

    def when_interrupted(self) -> str:
        """The rest of a sentence that says that nothing was written: what is left of the run, and how it goes on."""
        return "."

    @abstractmethod
    def check_source(self, source: SourceModel) -> None:
        """Raise `OptionError` for a model that this initialisation cannot do."""

    @abstractmethod
    def head_widths(self, source: SourceModel, options: ConvertOptions, rotary_dim: int) -> tuple[int, int]:
        """(qk_nope_head_dim, qk_rope_head_dim) of a layer that rotates `rotary_dim` rows of each head (0: none). Raises
        `OptionError` for widths that the options ask for and the model has not."""

    @abstractmethod
    def begin(
        self, plan: ConversionPlan, device: torch.device, on_progress: Progress, measured_by: LayerMaker | None = None
    ) -> LayerMaker:
        """Begin to work on the source of a plan, whose widths may not be final yet. `measured_by`: an earlier run on the same
        source and options but for the widths, whose measurements may serve again."""


INITIALISATIONS: Registry[type[Initialisation]] = Registry("xeco_convert.inits")


def initialisation_from(name: str, values: Mapping[str, Any], policy: RankPolicy) -> Initialisation:
    """The initialisation of this name with the options given. Raises `OptionError` for options that it does not have."""
    entry = INITIALISATIONS.find(name, "--init")
    own = option_fields(entry)
    if policy.needs_costs and not entry.measures_costs:
        selecting = next(option for option in policy.chosen_by if values.get(option) is not None)
        able = [other.name for other in INITIALISATIONS if other.measures_costs]
        raise OptionError(entry.refusal(selecting, " or ".join(able)))
    for option, item in initialisation_options().items():
        if option not in own and option in values and values[option] != item.default:
            owners = [other.name for other in INITIALISATIONS if option in option_fields(other)]
            raise OptionError(entry.refusal(option, " or ".join(owners)))
    return entry(**options_of(entry, values))


def initialisation_options() -> dict[str, Any]:
    """The options of all initialisations, by name: fields of dataclasses."""
    return {name: item for entry in INITIALISATIONS for name, item in option_fields(entry).items()}
