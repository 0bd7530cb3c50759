"""Checks of what the ops are given: one sentence each, naming the op, the argument, what was expected and what it got.

The checks of shapes, dtypes and devices read no data, so they also serve while torch.compile traces; the checks of values
do, and belong to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xeco_convert.ops.choice import MAX_RANK, MAX_ROPE

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run_checked(op: Any, check: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """op(*arguments), whose kernels check for themselves; what they refuse is refused as `ValueError`, as `check` does it.

    To check here beforehand would take as long as a decode step over a short cache.
    """
    if torch.compiler.is_compiling():
        check(*arguments)
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError:
        check(*arguments)
        raise


def check_attention_inputs(
    op: str, q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *, paged: bool = False
) -> None:
    """q_latent [B, Q, H, R], q_rope [B, Q, H, P], c_kv [B, T, R], k_rope [B, T, P] (or pages of both), one dtype and device."""
    check_tensor(op, "q_latent", q_latent, "[B, Q, H, R]", (None,) * 4)
    batch, num_queries, num_heads, rank = q_latent.shape
    check_tensor(op, "q_rope", q_rope, "[B, Q, H, P]", (batch, num_queries, num_heads, None), q_latent)
    rope = q_rope.shape[3]
    rows = ("[num_pages, page_size, R]", "[num_pages, page_size, P]") if paged else ("[B, T, R]", "[B, T, P]")
    check_tensor(op, "c_kv", c_kv, rows[0], (None if paged else batch, None, rank), q_latent)
    check_tensor(op, "k_rope", k_rope, rows[1], (c_kv.shape[0], c_kv.shape[1], rope), q_latent)
    check_float(op, "q_latent", q_latent)
    check_widths(op, rank, rope)
    if paged and c_kv.shape[1] == 0:
        raise ValueError(f"{op}: c_kv: expected pages of at least one token, got {list(c_kv.shape)}")


def check_widths(op: str, rank: int, rope: int) -> None:
    """Widths that the kernels take."""
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{op}: q_latent: expected a width (kv_lora_rank) from 1 to {MAX_RANK}, got {rank}")
    if not 1 <= rope <= MAX_ROPE:
        raise ValueError(f"{op}: q_rope: expected a width (qk_rope_head_dim) from 1 to {MAX_ROPE}, got {rope}")


def check_rule(op: str, *, causal: bool, window: int, softcap: float) -> None:
    """Which scores count and how they are capped; 0 stands for no window and no cap."""
    if window < 0:
        raise ValueError(f"{op}: window: expected 0 (none) or a number of tokens, got {window}")
    if window > 0 and not causal:
        raise ValueError(f"{op}: window: needs causal attention, got causal=False and window={window}")
    if softcap < 0:
        raise ValueError(f"{op}: softcap: expected 0 (none) or a positive number, got {softcap}")


def check_tensor(
    op: str, name: str, tensor: Tensor, letters: str, shape: tuple[int | None, ...], like: Tensor | None = None
) -> None:
    """Shape as given (None: any size), last dimension dense, and the dtype and device of `like`."""
    fits = tensor.dim() == len(shape)
    fits = fits and all(size is None or size == actual for size, actual in zip(shape, tensor.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name}: expected {letters} = [{sizes}], got {list(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name}: expected a dense last dimension (stride 1), got stride {tensor.stride(-1)}; "
            "call .contiguous() first"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{op}: {name}: expected {like.dtype} as the first tensor has, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device} as the first one is, got {tensor.device}")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """One of the dtypes that attention is computed in."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_integers(
    op: str, name: str, tensor: Tensor | None, letters: str, shape: tuple[int | None, ...], like: Tensor
) -> None:
    """One int64 per sequence, or an int32 table of pages; on the device of `like`."""
    if tensor is None:
        return
    dtype = torch.int64 if len(shape) == 1 else torch.int32
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")
    check_tensor(op, name, tensor, letters, shape)
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device} as the first one is, got {tensor.device}")


def check_values(op: str, name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Every value from low to high. Reads the data."""
    for sequence, value in enumerate([] if tensor is None else tensor.tolist()):
        if not low <= value <= high:
            raise ValueError(f"{op}: {name}: expected values from {low} to {high}, got {value} for sequence {sequence}")


def check_pages(
    op: str, block_table: Tensor, first: list[int], last: list[int], page_size: int, num_pages: int
) -> None:
    """Every page that holds one of the tokens [first, last) of its sequence exists. Reads the data."""
    for sequence, pages in enumerate(block_table.tolist()):
        if last[sequence] <= first[sequence]:
            continue
        for index in range(first[sequence] // page_size, (last[sequence] - 1) // page_size + 1):
            if not 0 <= pages[index] < num_pages:
                raise ValueError(
                    f"{op}: block_table: expected pages from 0 to {num_pages - 1}, got {pages[index]} at [{sequence}, {index}]"
                )
