"""What the ops refuse, in one sentence that names the argument, what was expected and what was found: through the public
functions, through torch.ops directly, and on the plain kernels. Never a crash."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operands import COMMON, inputs, schema_order
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_decode, rope_and_append
from xeco_convert.ops._latent_attention import _backward_kernel, _forward_kernel
from xeco_convert.ops._latent_attention_decode import _kernel as decode_kernel
from xeco_convert.ops._rope_and_append import _kernel as append_kernel

REFUSED = (ValueError, RuntimeError)
NAMES = ["q_latent", "q_rope", "c_kv", "k_rope"]


def every_second(tensor: Tensor) -> Tensor:
    """The same numbers with a last dimension of stride 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# name -> (what is changed, what it becomes, part of the sentence); for the tensors a function of the good one
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "queries of three dimensions": ("q_latent", lambda x: x[0], r"q_latent: expected .*got \[7, 3, 24\]"),
    "queries of no dimension": ("q_latent", lambda x: x.sum(), r"q_latent: expected .*got \[\]"),
    "another number of heads": (
        "q_rope",
        lambda x: x[:, :, :2],
        r"q_rope: expected .*\[2, 7, 3, any\], got \[2, 7, 2, 8\]",
    ),
    "another number of queries": ("q_rope", lambda x: x[:, :3], r"q_rope: expected .*got \[2, 3, 3, 8\]"),
    "another batch": ("c_kv", lambda x: x[:1], r"c_kv: expected .*got \[1, 129, 24\]"),
    "another rank": ("c_kv", lambda x: x[..., :16], r"c_kv: expected .*24\], got \[2, 129, 16\]"),
    "a cache of four dimensions": ("c_kv", lambda x: x.unsqueeze(1), r"c_kv: expected .*got \[2, 1, 129, 24\]"),
    "another number of tokens": (
        "k_rope",
        lambda x: x[:, :128],
        r"k_rope: expected .*\[2, 129, 8\], got \[2, 128, 8\]",
    ),
    "another rotary width": ("k_rope", lambda x: x[..., :4], r"k_rope: expected .*got \[2, 129, 4\]"),
    "another dtype": ("k_rope", lambda x: x.bfloat16(), r"k_rope: expected .*"),
    "another dtype of queries": ("q_rope", lambda x: x.half(), r"q_rope: expected .*"),
    "integers": ("q_latent", lambda x: x.long(), r"(q_latent|q_rope): .*"),
    "another device": ("c_kv", lambda x: x.to("meta"), r"(c_kv: expected .*)|(latent_attention.*meta)|(same device)"),
    "a last dimension with holes": (
        "c_kv",
        every_second,
        r"c_kv: expected a dense last dimension \(stride 1\), got stride 2",
    ),
    "queries with holes": (
        "q_rope",
        every_second,
        r"q_rope: expected a dense last dimension \(stride 1\), got stride 2",
    ),
}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    "negative window": ({"window": -3}, "window: expected 0 .none. or a number of tokens, got -3"),
    "window without order": ({"window": 3, "causal": False}, "window: needs causal attention"),
    "negative soft-cap": ({"softcap": -0.5}, "softcap: expected 0 .none. or a positive number, got -0.5"),
    "starts of another batch": ({"starts": torch.zeros(3, dtype=torch.long)}, r"starts: expected .*got \[3\]"),
    "starts in int32": ({"starts": torch.zeros(2, dtype=torch.int32)}, "starts: expected .*int64"),
    "negative starts": (
        {"starts": torch.tensor([0, -1])},
        "starts: expected values from 0 to 129, got -1 for sequence 1",
    ),
    "ends behind the cache": (
        {"ends": torch.tensor([130, 1])},
        "ends: expected values from 0 to 129, got 130 for sequence 0",
    ),
    "negative ends": (
        {"ends": torch.tensor([3, -(2**62)])},
        "ends: expected values from 0 to 129, got -4611686018427387904",
    ),
    "positions out of this world": (
        {"query_positions": torch.tensor([2**62, 0])},
        "query_positions: expected values from",
    ),
    "positions as a number": ({"query_positions": torch.tensor(4)}, r"query_positions: expected .*got \[\]"),
}


def calls(tensors: list[Tensor], rule: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Forward by its three doors, and backward by two."""
    arguments = schema_order(COMMON, rule)
    good = inputs(COMMON)
    out, lse = torch.zeros_like(good[0]), torch.zeros(2, 3, 7)
    return {
        "public": lambda: latent_attention(*tensors, softmax_scale=COMMON.softmax_scale, **rule),
        "op": lambda: torch.ops.xeco.latent_attention(*tensors, *arguments),
        "plain kernel": lambda: _forward_kernel(*tensors, *arguments),
        "backward op": lambda: torch.ops.xeco.latent_attention_backward(out, None, *tensors, out, lse, *arguments),
        "plain backward": lambda: _backward_kernel(out, None, *tensors, out, lse, *arguments),
    }


DOORS = ["public", "op", "plain kernel", "backward op", "plain backward"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(case: str, door: str) -> None:
    name, change, sentence = TENSORS[case]
    tensors = inputs(COMMON)
    tensors[NAMES.index(name)] = change(tensors[NAMES.index(name)])
    with pytest.raises(ValueError if door == "public" else (*REFUSED, NotImplementedError), match=sentence):
        calls(tensors, {})[door]()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", RULES)
def test_rules_that_cannot_be_are_refused(case: str, door: str) -> None:
    rule, sentence = RULES[case]
    with pytest.raises(REFUSED, match=sentence):
        calls(inputs(COMMON), rule)[door]()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("rank", "rope", "sentence"),
    [
        (513, 8, r"q_latent: expected a width \(kv_lora_rank\) from 1 to 512, got 513"),
        (0, 8, r"q_latent: expected a width \(kv_lora_rank\) from 1 to 512, got 0"),
        (24, 129, r"q_rope: expected a width \(qk_rope_head_dim\) from 1 to 128, got 129"),
        (24, 0, r"q_rope: expected a width \(qk_rope_head_dim\) from 1 to 128, got 0"),
    ],
)
def test_widths_out_of_range_are_refused(door: str, rank: int, rope: int, sentence: str) -> None:
    tensors = inputs(COMMON._replace(R=rank, P=rope))
    with pytest.raises(REFUSED, match=sentence):
        calls(tensors, {})[door]()


BACKWARD: dict[str, tuple[int, Tensor, str]] = {
    "another shape of d_out": (0, torch.zeros(2, 7, 3, 16), r"d_out: expected .*got \[2, 7, 3, 16\]"),
    "another dtype of d_out": (0, torch.zeros(2, 7, 3, 24, dtype=torch.half), "d_out: expected"),
    "d_lse with queries and heads exchanged": (1, torch.zeros(2, 7, 3), r"d_lse: expected .*got \[2, 7, 3\]"),
    "another shape of out": (6, torch.zeros(2, 7, 2, 24), r"out: expected .*got \[2, 7, 2, 24\]"),
    "another shape of lse": (7, torch.zeros(2, 3, 6), r"lse: expected .*got \[2, 3, 6\]"),
}


@pytest.mark.parametrize("kernel", [torch.ops.xeco.latent_attention_backward, _backward_kernel])
@pytest.mark.parametrize("case", BACKWARD)
def test_what_the_backward_op_cannot_have_been_given_is_refused(case: str, kernel: Callable[..., Any]) -> None:
    number, wrong, sentence = BACKWARD[case]
    tensors = inputs(COMMON)
    arguments = [
        torch.zeros(2, 7, 3, 24),
        torch.zeros(2, 3, 7),
        *tensors,
        torch.zeros(2, 7, 3, 24),
        torch.zeros(2, 3, 7),
    ]
    arguments[number] = wrong
    with pytest.raises(REFUSED, match=sentence):
        kernel(*arguments, *schema_order(COMMON, {}))


def decode_through(door: str, tensors: list[Tensor], **given: Any) -> Any:
    """Decode by one of its doors."""
    if door == "public":
        return latent_attention_decode(*tensors, softmax_scale=0.3, **given)
    kernel = torch.ops.xeco.latent_attention_decode if door == "op" else decode_kernel
    ranges = [given.get(name) for name in ("block_table", "starts", "lengths")]
    return kernel(*tensors, *ranges, 0.3, given.get("window", 0), 0.0, given.get("num_splits", 0))


TABLE = torch.arange(10, dtype=torch.int32).view(2, 5)
LENGTHS = torch.tensor([18, 3])
# what is changed in a paged call with 10 pages of 4 tokens, 5 for each of 2 sequences
DECODE: dict[str, tuple[dict[str, Any], str]] = {
    "no lengths": ({"lengths": None}, "lengths: needed with a block_table, got"),
    "lengths behind the table": (
        {"lengths": torch.tensor([18, 21])},
        "lengths: expected values from 0 to 20, got 21 for sequence 1",
    ),
    "negative lengths": (
        {"lengths": torch.tensor([-1, 3])},
        "lengths: expected values from 0 to 20, got -1 for sequence 0",
    ),
    "lengths in int32": ({"lengths": LENGTHS.int()}, "lengths: expected .*int64"),
    "lengths of another batch": ({"lengths": torch.tensor([3])}, r"lengths: expected .*got \[1\]"),
    "starts behind the table": ({"starts": torch.tensor([0, 21])}, "starts: expected values from 0 to 20, got 21"),
    "a page that does not exist": (
        {"block_table": TABLE + 6},
        r"block_table: expected pages from 0 to 9, got 10 at \[0, 4\]",
    ),
    "a page below zero": ({"block_table": TABLE - 1}, r"block_table: expected pages from 0 to 9, got -1 at \[0, 0\]"),
    "a table in int64": ({"block_table": TABLE.long()}, "block_table: expected .*int32"),
    "a table of another batch": ({"block_table": TABLE[:1]}, r"block_table: expected .*got \[1, 5\]"),
    "a table with holes": ({"block_table": TABLE.T.contiguous().T}, "block_table: expected a dense last dimension"),
    "a table of one dimension": ({"block_table": TABLE[0]}, r"block_table: expected .*got \[5\]"),
    "pages of no token": ({"page_size": 0}, "c_kv: expected pages of at least one token"),
    "negative splits": ({"num_splits": -1}, r"num_splits: expected 0 \(automatic\) to 1024, got -1"),
    "too many splits": ({"num_splits": 1025}, r"num_splits: expected 0 \(automatic\) to 1024, got 1025"),
    "negative window": ({"window": -1}, "window: expected 0"),
}


@pytest.mark.parametrize("door", ["public", "op", "plain kernel"])
@pytest.mark.parametrize("case", DECODE)
def test_decode_refuses_what_is_outside_the_cache(case: str, door: str) -> None:
    change, sentence = DECODE[case]
    given = {
        "block_table": TABLE,
        "starts": None,
        "lengths": LENGTHS,
        "window": 0,
        "num_splits": 0,
        "page_size": 4,
        **change,
    }
    page_size = given.pop("page_size")
    tensors = [
        torch.zeros(2, 1, 3, 16),
        torch.zeros(2, 1, 3, 8),
        torch.zeros(10, page_size, 16),
        torch.zeros(10, page_size, 8),
    ]
    with pytest.raises(REFUSED, match=sentence):
        decode_through(door, tensors, **given)


@pytest.mark.parametrize("door", ["public", "op", "plain kernel"])
@pytest.mark.parametrize("lengths", [[130, 1], [1, -5]])
def test_decode_refuses_lengths_outside_a_contiguous_cache(door: str, lengths: list[int]) -> None:
    with pytest.raises(REFUSED, match="lengths: expected values from 0 to 129, got"):
        decode_through(door, inputs(COMMON), lengths=torch.tensor(lengths))


APPEND: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "latents of two dimensions": ("c_kv", lambda x: x[0], r"c_kv: expected .*got \[3, 16\]"),
    "another number of tokens": ("k_rope", lambda x: x[:, :2], r"k_rope: expected .*got \[2, 2, 8\]"),
    "an odd width": ("k_rope", lambda x: x[..., :7].contiguous(), "k_rope: expected an even width, got 7"),
    "angles of another width": ("cos", lambda x: x[..., :4], r"cos: expected .*got \[2, 3, 4\]"),
    "sines for one sequence alone": ("sin", lambda x: x[:1], r"sin: expected .*got \[1, 3, 8\]"),
    "angles in float16": ("cos", lambda x: x.half(), "(cos|sin): expected"),
    "a cache of another width": ("c_kv_cache", lambda x: x[..., :8], r"c_kv_cache: expected .*got \[2, 9, 8\]"),
    "a cache of another batch": ("c_kv_cache", lambda x: x[:1], r"c_kv_cache: expected .*got \[1, 9, 16\]"),
    "caches of two lengths": ("k_rope_cache", lambda x: x[:, :5], r"k_rope_cache: expected .*got \[2, 5, 8\]"),
    "a cache of another dtype": ("k_rope_cache", lambda x: x.double(), "k_rope_cache: expected"),
    "a cache with holes": ("c_kv_cache", every_second, "c_kv_cache: expected a dense last dimension"),
    "positions in int32": ("positions", lambda x: x.int(), "positions: expected .*int64"),
    "positions of another batch": ("positions", lambda x: x[:1], r"positions: expected .*got \[1\]"),
}
APPEND_NAMES = ["c_kv", "k_rope", "cos", "sin", "c_kv_cache", "k_rope_cache", "block_table", "positions"]


@pytest.mark.parametrize("door", ["public", "op", "plain kernel"])
@pytest.mark.parametrize("case", APPEND)
def test_rope_and_append_refuses_what_does_not_fit(case: str, door: str) -> None:
    shapes = [(2, 3, 16), (2, 3, 8), (2, 3, 8), (2, 3, 8), (2, 9, 16), (2, 9, 8)]
    arguments: list[Any] = [*(torch.zeros(*shape) for shape in shapes), None, torch.tensor([0, 6])]
    name, change, sentence = APPEND[case]
    arguments[APPEND_NAMES.index(name)] = change(arguments[APPEND_NAMES.index(name)])
    doors: dict[str, Callable[..., Any]] = {
        "public": lambda *a: rope_and_append(*a[:6], block_table=a[6], positions=a[7]),
        "op": torch.ops.xeco.rope_and_append,
        "plain kernel": append_kernel,
    }
    with pytest.raises(REFUSED, match=sentence):
        doors[door](*arguments)


def test_float64_is_refused_by_the_compiled_kernels_alone() -> None:
    """The public function runs it in plain torch."""
    tensors = inputs(COMMON, torch.float64)
    out, lse = latent_attention(*tensors, softmax_scale=0.3)
    assert out.dtype == lse.dtype == torch.float64
