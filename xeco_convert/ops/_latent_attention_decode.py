"""The op xeco::latent_attention_decode: few queries at the end of a long cache, which may lie in pages.

Schema, reference written from the formula and fake; the kernels are in csrc/latent_attention/. There is no gradient.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from xeco_convert.ops._latent_attention import Rule, fake_attention, latent_attention_reference
from xeco_convert.ops.checks import (
    check_attention_inputs,
    check_integers,
    check_pages,
    check_rule,
    check_values,
    run_checked,
)
from xeco_convert.ops.extension import first_loaded_for, runs_in_reference

_OP = "latent_attention_decode"
_MAX_SPLITS = 1024
_LIBRARY = torch.library.Library("xeco", "FRAGMENT")
_LIBRARY.define(
    "latent_attention_decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor? block_table, "
    "Tensor? starts, Tensor? lengths, float softmax_scale, int window, float softcap, int num_splits) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


class _Settings(NamedTuple):
    """The schema's arguments behind the tensors, in its order; 0: no window, no cap, automatic splits."""

    block_table: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    softmax_scale: float
    window: int
    softcap: float
    num_splits: int


def latent_attention_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`latent_attention` of the last Q tokens of each sequence over a cache that holds them all, causal, without gradients.

    q_latent [B, Q, H, R], q_rope [B, Q, H, P]; the cache is c_kv [B, T, R] and k_rope [B, T, P], or pages: c_kv
    [num_pages, page_size, R], k_rope [num_pages, page_size, P] and block_table int32 [B, max_pages], whose entry i of row b
    is the page that holds tokens i · page_size and on of sequence b. Dtypes, strides and widths as in `latent_attention`.

    lengths int64 [B]: tokens in the cache, the new ones included; None stands for T, and pages need it. The last query
    stands at lengths[b] − 1. starts int64 [B]: the first token that counts (left padding); None stands for 0. What lies
    before starts[b], at or behind lengths[b], and in pages that no entry of these names, is never read. num_splits: parts
    that the cache is cut into, so that several threads share one sequence; None chooses. window, softcap, results and
    errors as in `latent_attention`; raises `ValueError` as well where a gradient would be needed.

    Source: FlashDecoding's split over keys; block tables as in PagedAttention (arXiv 2309.06180).
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_latent, q_rope, c_kv, k_rope)):
        raise ValueError(
            f"{_OP}: has no gradient: expected torch.no_grad() or detached inputs; use latent_attention to train"
        )
    scale, cap = float(softmax_scale), float(softcap or 0.0)
    settings = _Settings(block_table, starts, lengths, scale, window or 0, cap, num_splits or 0)
    arguments = (q_latent, q_rope, c_kv, k_rope, *settings)
    if runs_in_reference(q_latent):
        _check(*arguments)
        _check_data(*arguments)
        return latent_attention_decode_reference(*arguments)
    return cast(tuple[Tensor, Tensor], run_checked(torch.ops.xeco.latent_attention_decode, _check, arguments))


def latent_attention_decode_reference(
    q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """The op written from the formula: pages laid side by side, then the reference of `latent_attention`."""
    call = _Settings(*settings)
    if call.block_table is not None:
        c_kv, k_rope = (_lay_out(pages, call.block_table, call.lengths) for pages in (c_kv, k_rope))
    positions = None if call.lengths is None else call.lengths - q_latent.shape[1]
    rule = Rule(call.starts, call.lengths, positions, call.softmax_scale, True, call.window, call.softcap)
    return latent_attention_reference(q_latent, q_rope, c_kv, k_rope, *rule)


def _lay_out(pages: Tensor, block_table: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows [B, max_pages · page_size, width] of each sequence; entries that hold no token of it may be any number."""
    assert lengths is not None
    first_token = torch.arange(block_table.shape[1], device=pages.device) * pages.shape[1]
    table = block_table.long().masked_fill(first_token >= lengths[:, None], 0)
    if pages.shape[0] == 0:
        return pages.new_zeros(table.shape[0], table.shape[1] * pages.shape[1], pages.shape[2])
    return pages[table.clamp(0, pages.shape[0] - 1)].flatten(1, 2)


def _check(q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any) -> None:
    call = _Settings(*settings)
    check_attention_inputs(_OP, q_latent, q_rope, c_kv, k_rope, paged=call.block_table is not None)
    check_rule(_OP, causal=True, window=call.window, softcap=call.softcap)
    batch = q_latent.shape[0]
    check_integers(_OP, "block_table", call.block_table, "[B, max_pages]", (batch, None), q_latent)
    check_integers(_OP, "starts", call.starts, "[B]", (batch,), q_latent)
    check_integers(_OP, "lengths", call.lengths, "[B]", (batch,), q_latent)
    if call.block_table is not None and call.lengths is None:
        raise ValueError(f"{_OP}: lengths: needed with a block_table, got None")
    if not 0 <= call.num_splits <= _MAX_SPLITS:
        raise ValueError(f"{_OP}: num_splits: expected 0 (automatic) to {_MAX_SPLITS}, got {call.num_splits}")


def _check_data(*arguments: Any) -> None:
    """Lengths within the cache or table, pages that exist."""
    _, _, c_kv, _, block_table, starts, lengths = arguments[:7]
    capacity = c_kv.shape[1] if block_table is None else block_table.shape[1] * c_kv.shape[1]
    check_values(_OP, "starts", starts, 0, capacity)
    check_values(_OP, "lengths", lengths, 0, capacity)
    if block_table is not None:
        first = [0] * block_table.shape[0] if starts is None else starts.tolist()
        check_pages(_OP, block_table, first, lengths.tolist(), c_kv.shape[1], c_kv.shape[0])


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op where no compiled kernel serves; on the CPU the extension is loaded by the first call."""
    if first_loaded_for(arguments[0]):
        return cast(tuple[Tensor, Tensor], torch.ops.xeco.latent_attention_decode(*arguments))
    _check(*arguments)
    _check_data(*arguments)
    return latent_attention_decode_reference(*arguments)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(*arguments)
    return fake_attention(arguments[0])


def _backward(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError(f"{_OP} has no gradient; use latent_attention to train")


_LIBRARY.impl("latent_attention_decode", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("xeco::latent_attention_decode", _fake, lib=_LIBRARY)
torch.library.register_autograd("xeco::latent_attention_decode", _backward, lib=_LIBRARY)
