"""Masks of transformers that are nothing but a range of tokens for each sequence, in causal order, perhaps with a window.

Left and right padding, beams, sliding windows and static caches all arrive as one mask tensor [B, 1, Q, T]. The kernels
need no mask for them: they take starts, ends, query_positions and a window. A mask is recognised once in a forward pass of
a model, not once in each layer, and exactly: the ranges that were found must give the mask again, or it is none.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """What latent_attention takes in place of a mask: int64 [B] each, and a number of tokens (0: no window)."""

    starts: Tensor
    ends: Tensor
    query_positions: Tensor
    window: int


# id of a mask -> (the mask, its version when it was looked at, what was found); an entry goes when its mask does
_seen: dict[int, tuple[weakref.ref[Tensor], int, Ranges | None]] = {}


def ranges_of(mask: Tensor) -> Ranges | None:
    """The ranges that give exactly this mask, or None where there are none.

    mask [B, 1, Q, T]: boolean (True is seen), or added to the scores, with 0 for what is seen and −∞ or the dtype's
    smallest number for what is not. A boolean or additive mask of another kind (packed sequences, trees, ALiBi, one for
    each head) has no ranges. Reads the mask's data, so not while torch.compile traces.
    """
    if mask.is_inference():  # carries no version, so that a change could not be noticed
        return _find(mask)
    remembered = _seen.get(id(mask))
    if remembered is not None and remembered[0]() is mask and remembered[1] == mask._version:
        return remembered[2]
    ranges, key = _find(mask), id(mask)
    _seen[key] = (weakref.ref(mask, lambda _: _seen.pop(key, None)), mask._version, ranges)
    return ranges


@torch.no_grad()  # type: ignore[untyped-decorator]
def _find(mask: Tensor) -> Ranges | None:
    if mask.dim() != 4 or mask.shape[1] != 1 or 0 in mask.shape:
        return None
    visible_BQT = _visible(mask[:, 0])
    if visible_BQT is None:
        return None
    ranges = _guess(visible_BQT)
    return ranges if torch.equal(_mask_of(ranges, visible_BQT), visible_BQT) else None


def _visible(mask_BQT: Tensor) -> Tensor | None:
    if mask_BQT.dtype == torch.bool:
        return mask_BQT
    if not mask_BQT.is_floating_point():
        return None
    visible = mask_BQT == 0
    # what is not seen must not be seen at all: a bias of a few units is no mask
    hidden = mask_BQT <= torch.finfo(mask_BQT.dtype).min
    return visible if bool((visible | hidden).all()) else None


def _guess(visible_BQT: Tensor) -> Ranges:
    """Ranges that give the mask if any do: read off the first and last query that see something, of each sequence."""
    num_queries, num_tokens = visible_BQT.shape[1:]
    counts_BQ = visible_BQT.sum(dim=-1)
    first_BQ = visible_BQT.view(torch.uint8).argmax(dim=-1)
    last_BQ = first_BQ + counts_BQ - 1
    sees_BQ = counts_BQ > 0
    sees_something = sees_BQ.any(dim=1)
    first_query = sees_BQ.int().argmax(dim=1)
    last_query = num_queries - 1 - sees_BQ.flip(1).int().argmax(dim=1)
    starts = _at(first_BQ, first_query) * sees_something
    ends = ((last_BQ + 1) * sees_BQ).amax(dim=1)
    # Position of query 0: the first query that sees something stands at the last token it sees, or behind the end, in
    # which case every query sees the same tokens and any position behind it will do.
    positions = torch.where(sees_something, _at(last_BQ, first_query) - first_query, num_tokens)
    # The window is what the last query leaves out at the start of its range.
    last_first = _at(first_BQ, last_query)
    windows = torch.where(
        sees_something & (last_first > starts), positions + last_query - last_first + 1, num_tokens + num_queries
    )
    window = int(windows.amin())
    return Ranges(starts, ends, positions, window if window < num_tokens + num_queries else 0)


def _at(values_BQ: Tensor, query_B: Tensor) -> Tensor:
    return values_BQ.gather(1, query_B.unsqueeze(1)).squeeze(1)


def _mask_of(ranges: Ranges, like_BQT: Tensor) -> Tensor:
    num_queries, num_tokens = like_BQT.shape[1:]
    token_T = torch.arange(num_tokens, device=like_BQT.device)
    position_BQ1 = (ranges.query_positions[:, None] + torch.arange(num_queries, device=like_BQT.device)).unsqueeze(-1)
    seen = (
        (token_T >= ranges.starts[:, None, None]) & (token_T < ranges.ends[:, None, None]) & (token_T <= position_BQ1)
    )
    return seen & (token_T > position_BQ1 - ranges.window) if ranges.window > 0 else seen
