"""latent_attention_packed on every kernel: the same as attention over the rows that the codes stand for."""

from typing import Any

import pytest
import torch
from operands import CODE_BITS as BITS
from operands import COMMON, DTYPES, RULES, SIZES, Sizes, bits_for, finite, inputs, possible, schema_order
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_packed
from xeco_convert.ops.packed_rows import pack_rows, unpack_rows

pytestmark = pytest.mark.usefixtures("level")
EPSILON = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Of the largest number. By products of integers queries and softmax weights have 15 bits: measured up to 2e-4.
TOLERANCE = {"baseline": 1e-5, "avx512": 1e-5, "reference": 1e-5}
OF_INTEGERS = 6e-4


def packed_inputs(sizes: Sizes, dtype: torch.dtype, bits: tuple[Any, Any]) -> list[Tensor]:
    q_latent, q_rope, c_kv, k_rope = inputs(sizes, dtype)
    latent, rope = bits_for(sizes, bits)
    return [q_latent, q_rope, pack_rows(c_kv, latent), pack_rows(k_rope, rope)]


def attend(tensors: list[Tensor], sizes: Sizes, bits: tuple[Any, Any], **rule: Any) -> tuple[Tensor, Tensor]:
    latent, rope = bits_for(sizes, bits)
    settings: dict[str, Any] = {"latent_bits": latent, "rope_bits": rope, "softmax_scale": sizes.softmax_scale}
    return latent_attention_packed(*tensors, **settings, **rule)


def exact(tensors: list[Tensor], sizes: Sizes, bits: tuple[Any, Any], **rule: Any) -> tuple[Tensor, Tensor]:
    q_latent, q_rope, c_kv, k_rope = tensors
    latent, rope = bits_for(sizes, bits)
    rows = (unpack_rows(c_kv, latent, torch.float64), unpack_rows(k_rope, rope, torch.float64))
    return latent_attention(q_latent.double(), q_rope.double(), *rows, softmax_scale=sizes.softmax_scale, **rule)


def assert_right(
    sizes: Sizes, dtype: torch.dtype, bits: tuple[Any, Any], level: str, rule: dict[str, Any] | None = None
) -> None:
    tensors = packed_inputs(sizes, dtype, bits)
    (out, lse), (right, right_lse) = (function(tensors, sizes, bits, **(rule or {})) for function in (attend, exact))
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.shape == right.shape
    assert torch.equal(lse == -torch.inf, right_lse == -torch.inf)
    if out.numel():
        off = TOLERANCE.get(level, OF_INTEGERS)
        assert float((out.double() - right).abs().max()) <= (off + EPSILON[dtype]) * float(right.abs().max())
        assert float((finite(lse).double() - finite(right_lse)).abs().max()) <= off


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", [*SIZES, Sizes(1, 3000, 5, 64, 16)])
def test_results_are_those_of_the_rows_that_codes_stand_for(
    sizes: Sizes, bits: tuple[Any, Any], dtype: torch.dtype, level: str
) -> None:
    assert_right(possible(sizes, bits), dtype, bits, level)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("threads")
def test_ranges_windows_and_caps_are_followed(rule: str, bits: tuple[Any, Any], level: str) -> None:
    assert_right(COMMON, torch.float32, bits, level, RULES[rule])


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_no_query_sees_are_not_read(bits: tuple[Any, Any]) -> None:
    """Their bytes are those of NaN."""
    tensors = packed_inputs(COMMON, torch.float32, bits)
    rule: dict[str, Any] = {"starts": torch.tensor([3, 70]), "ends": torch.tensor([64, 120]), "causal": False}
    expected = attend(tensors, COMMON, bits, **rule)
    for rows in tensors[2:]:
        for sequence, (start, end) in enumerate([(3, 64), (70, 120)]):
            rows[sequence, :start] = rows[sequence, end:] = 255
    for found, right in zip(attend(tensors, COMMON, bits, **rule), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("which", range(4))
def test_numbers_that_are_none_are_not_hidden(which: int, bits: tuple[Any, Any]) -> None:
    tensors = packed_inputs(COMMON, torch.float32, bits)
    if which < 2:
        tensors[which][1, 2, 0, 1] = torch.nan
    else:
        tensors[which][1, 2, -2:] = 255  # the scale
    out, lse = attend(tensors, COMMON, bits, causal=False)
    assert bool(out[0].isfinite().all()) and bool(out[1, 2, 0].isnan().any()) and bool(lse[1, 0, 2].isnan())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_scale_is_not_hidden_by_a_weight_of_zero(sign: float, bits: tuple[Any, Any]) -> None:
    """A token whose score is -inf for half of the queries, with infinite numbers to add up."""
    tensors = packed_inputs(COMMON, torch.float32, bits)
    tensors[2][1, 2, :-2] = 255  # above the middle, all of them
    tensors[2][1, 2, -2:] = torch.tensor([0x80, 0x7F])
    tensors[0][1] = sign * tensors[0][1].abs()
    out, _ = attend(tensors, COMMON, bits, causal=False)
    assert bool(out[0].isfinite().all()) and not bool(out[1].isfinite().any())


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_read_through_any_strides(bits: tuple[Any, Any]) -> None:
    tensors = packed_inputs(COMMON, torch.bfloat16, bits)
    expected = attend(tensors, COMMON, bits)
    wide = torch.full((COMMON.B, COMMON.T, 200), 255, dtype=torch.uint8)
    first = tensors[2].shape[2]
    views = [wide[:, :, 3 : 3 + first], wide[:, :, 7 + first : 7 + first + tensors[3].shape[2]]]
    for view, rows in zip(views, tensors[2:], strict=True):
        view.copy_(rows)
    queries = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors[:2]]
    for found, right in zip(attend([*queries, *views], COMMON, bits), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("bits", BITS)
def test_the_number_of_threads_changes_no_bit(bits: tuple[Any, Any]) -> None:
    sizes, before = Sizes(1, 3000, 5, 64, 16), torch.get_num_threads()
    tensors, results = packed_inputs(sizes, torch.float32, bits), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(attend(tensors, sizes, bits)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.on_host
def test_the_op_is_registered_as_torch_wants_it() -> None:
    tensors = packed_inputs(COMMON, torch.float32, (4, 8))
    arguments = (*tensors, *schema_order(COMMON, RULES["window, padding and positions"]), 4, 8)
    torch.library.opcheck(torch.ops.xeco.latent_attention_packed.default, arguments)


EXPECTED = r"expected 8, 6, 5, 4, 3 or 2, or how many numbers each of 2 to 7 bit planes reaches, .*"
BAD: dict[str, tuple[dict[int, Any], dict[str, Any], str]] = {
    "bits that no kernel has": ({}, {"latent_bits": 7}, rf"latent_bits: {EXPECTED}, got 7"),
    "rotary bits that no kernel has": ({}, {"rope_bits": 16}, rf"rope_bits: {EXPECTED}, got 16"),
    "planes that grow": ({}, {"latent_bits": (24, 8, 16)}, rf"latent_bits: {EXPECTED}, got \(24, 8, 16\)"),
    "one plane": ({}, {"latent_bits": (24,)}, rf"latent_bits: {EXPECTED}, got \(24,\)"),
    "eight planes": ({}, {"latent_bits": (24,) * 8}, rf"latent_bits: {EXPECTED}, got \(24, .*\)"),
    "planes of half bytes": ({}, {"latent_bits": (24, 12)}, rf"latent_bits: {EXPECTED}, got \(24, 12\)"),
    "planes of another width": (
        {},
        {"latent_bits": (16, 16)},
        r"latent_bits: expected a first bit plane .*, got 16 of 24",
    ),
    "planes that are no whole bytes": (
        {0: torch.zeros(2, 7, 3, 23)},
        {"latent_bits": 3},
        r"latent_bits: .* of 8 .*, got 23",
    ),
    "rows of other bits": (
        {},
        {"latent_bits": 8},
        r"c_kv: expected \[B, T, bytes\] = \[2, any, 26\], got \[2, 129, 14\]",
    ),
    "rows of numbers": ({2: torch.zeros(2, 129, 14)}, {}, r"c_kv: expected uint8( on \S+)?, got torch.float32"),
    "fewer keys": (
        {3: torch.zeros(2, 9, 10, dtype=torch.uint8)},
        {},
        r"k_rope: expected \[B, T, bytes\] = \[2, 129, 10\], got \[2, 9, 10\]",
    ),
    "an odd width": (
        {0: torch.zeros(2, 7, 3, 23)},
        {},
        r"latent_bits: expected rows of a multiple of 2 numbers, got 23",
    ),
    "a range beyond the cache": (
        {},
        {"ends": torch.tensor([129, 130])},
        r"ends: expected values from 0 to 129, got 130",
    ),
}


@pytest.mark.on_host  # a range is a value: on a GPU the kernel finds it, and stops
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str) -> None:
    changes, settings, sentence = BAD[case]
    tensors = packed_inputs(COMMON, torch.float32, (4, 8))
    for place, tensor in changes.items():
        tensors[place] = tensor
    arguments = {"latent_bits": 4, "rope_bits": 8, "softmax_scale": 0.3, **settings}
    with pytest.raises((ValueError, RuntimeError), match=f"latent_attention_packed: {sentence}"):
        latent_attention_packed(*tensors, **arguments)


@pytest.mark.on_host
@pytest.mark.parametrize("layout", [2, 3, 5, 16, 3 | 1 << 7 | 2 << 14, 2 | 2 << 7, -1])
def test_odd_layouts_are_refused_by_kernel_and_fake_too(layout: int) -> None:
    """Numbers that `packed_rows.layout_number` gives for no rows of this width."""
    tensors = packed_inputs(COMMON, torch.float32, (4, 8))
    arguments = (*tensors, *schema_order(COMMON, {}), layout, 8)
    with pytest.raises(RuntimeError, match="latent_attention_packed: latent_bits"):
        torch.ops.xeco.latent_attention_packed(*arguments)
    on_meta = [tensor.to("meta") for tensor in tensors]
    with pytest.raises(ValueError, match="latent_attention_packed: latent_bits: expected"):
        torch.ops.xeco.latent_attention_packed(*on_meta, *schema_order(COMMON, {}), layout, 8)


def test_a_gradient_is_refused() -> None:
    tensors = packed_inputs(COMMON, torch.float32, (8, 8))
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="latent_attention_packed: has no gradient"):
        attend(tensors, COMMON, (8, 8))
