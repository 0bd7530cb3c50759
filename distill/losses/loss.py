"""What a loss is: a formula on log-probabilities of single tokens, with its own options.

Modules of this package with a registered loss are imported for --help: torch is imported where they compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xeco_convert.errors import OptionError
from xeco_convert.registry import Registry
from xeco_convert.settings import flag_of, option, option_fields, options_of, require

if TYPE_CHECKING:
    from torch import Tensor

    from .chunked import Chunk, Slab
else:  # names for annotations, which nothing evaluates
    Tensor = Chunk = Slab = Any

__all__ = ["LOSSES", "Chunk", "Loss", "Slab", "TemperedLoss", "Tensor", "loss_from", "loss_options"]


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss with the values of its options, which are its dataclass fields.

    `figure`: what it is called in the progress. `needs_teacher`: whether anyone but the data says what is right.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    figure: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @property
    def temperature(self) -> float:
        """Of the softmaxes; it is part of the formula."""
        return 1.0

    def of_top_k(self) -> Loss | None:
        """The same from the teacher's most likely tokens alone; None where it needs them all."""
        return None

    @abstractmethod
    def losses(self, chunk: Chunk) -> Tensor:
        """Loss [n] of the tokens of a chunk, in its computing precision."""

    @abstractmethod
    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        """Derivative [n, v] of the losses [n] with respect to the tempered student logits of a slab."""


@dataclass(frozen=True, kw_only=True)
class TemperedLoss(Loss):
    """A loss whose softmaxes have a temperature τ. τ² keeps the size of the gradient where τ changes (Hinton et al. 2015, arXiv
    1503.02531, section 2)."""

    temperature: float = option("Temperature of both softmaxes in the loss.", 1.0, metavar="T")

    def __post_init__(self) -> None:
        require(self.temperature > 0, "--temperature", "a positive number", self.temperature)


LOSSES: Registry[type[Loss]] = Registry("xeco_distill.losses", without=("chunked", "forward_kl_top_k", "prediction"))


def loss_from(name: str, values: Mapping[str, Any]) -> Loss:
    """The loss of this name with the options given. Raises `OptionError` for options that only others have."""
    entry = LOSSES.find(name, "--loss")
    for option_name, item in loss_options().items():
        if option_name not in option_fields(entry) and values.get(option_name, item.default) != item.default:
            owners = " or ".join(other.name for other in LOSSES if option_name in option_fields(other))
            raise OptionError(f"{flag_of(option_name)}: only with --loss {owners}; leave one of them out.")
    return entry(**options_of(entry, values))


def loss_options() -> dict[str, Any]:
    """The options of all losses, by name: fields of dataclasses."""
    return {name: item for entry in LOSSES for name, item in option_fields(entry).items()}
