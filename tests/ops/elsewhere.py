"""The public functions for tensors of the CPU, run on another device: the tests of the ops show there what they show here.

Every call, and every gradient, is made twenty times and must give the same bits: the kernels have no atomics, so that a
difference is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xeco_convert import ops


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """The ops on `device`. float64 stays where it is: it is what the results are compared with."""

    device: str
    repeats: int = 20

    def latent_attention(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
        """Differentiable, as the function itself."""
        if tensors[0].dtype == torch.float64:
            return ops.latent_attention(*tensors, **rule)
        out, lse = _Attention.apply(self, rule, *tensors)
        return out, lse

    def latent_attention_decode(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, ...]:
        """Contiguous or paged."""
        if tensors[0].dtype == torch.float64:
            return ops.latent_attention_decode(*tensors, **rule)
        moved, moved_rule = self.moved(tensors), self.moved_rule(rule)
        return self.repeated(lambda: ops.latent_attention_decode(*moved, **moved_rule))

    def latent_attention_packed(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, ...]:
        """Over rows of codes."""
        moved, moved_rule = self.moved(tensors), self.moved_rule(rule)
        return self.repeated(lambda: ops.latent_attention_packed(*moved, **moved_rule))

    def rope_and_append(self, *tensors: Tensor, **places: Any) -> None:
        """The last two tensors are the caches, which are changed."""
        moved_places = self.moved_rule(places)
        moved: list[Tensor] = []

        def append() -> Sequence[Tensor]:
            moved[:] = self.moved(tensors)
            ops.rope_and_append(*moved, **moved_places)
            return moved[4:]

        for host, device in zip(tensors[4:], self.repeated(append), strict=True):
            host.copy_(device)

    def moved(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies with the same strides and offsets and whatever lies around them, leaves as those are."""
        copies = []
        for x in tensors:
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(self.device, copy=True)
            view = whole.as_strided(x.shape, x.stride(), x.storage_offset())
            copies.append(view.requires_grad_(x.requires_grad))
        return copies

    def moved_rule(self, rule: dict[str, Any]) -> dict[str, Any]:
        """Tensors among the options."""
        return {name: self.moved([x])[0] if isinstance(x, Tensor) else x for name, x in rule.items()}

    def repeated(self, run: Callable[[], Sequence[Tensor | None]]) -> tuple[Any, ...]:
        """What `run` gives, on the CPU: the same every time."""
        first = [None if x is None else x.detach().cpu() for x in run()]
        for number in range(1, self.repeats):
            for one, other in zip(run(), first, strict=True):
                if one is not None and other is not None:
                    same = _bits(one.detach().cpu()).equal(_bits(other))
                    assert same, f"run {number + 1} gives other bits than the first"
        return tuple(first)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, place: Elsewhere, rule: dict[str, Any], *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.place, ctx.moved, moved_rule = place, place.moved(tensors), place.moved_rule(rule)
        with torch.enable_grad():
            ctx.results = ops.latent_attention(*ctx.moved, **moved_rule)
            return place.repeated(lambda: ops.latent_attention(*ctx.moved, **moved_rule))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        given = [(x, g) for x, g in zip(ctx.results, gradients, strict=True) if g is not None]
        wanted = [x for x in ctx.moved if x.requires_grad]
        outputs, weights = [x for x, _ in given], ctx.place.moved([g for _, g in given])
        found = iter(
            ctx.place.repeated(
                lambda: torch.autograd.grad(outputs, wanted, weights, retain_graph=True, allow_unused=True)
            )
        )
        return (None, None, *(next(found) if x.requires_grad else None for x in ctx.moved))


def _bits(x: Tensor) -> Tensor:
    """NaN equals NaN."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
