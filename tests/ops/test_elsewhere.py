"""The ops' tests run on a GPU through `Elsewhere`, which is shown here to change nothing: another place on the CPU."""

import pytest
import torch
from elsewhere import Elsewhere
from levels import LEVELS
from operands import COMMON, inputs
from torch import Tensor

from xeco_convert import ops

HERE = Elsewhere(device="cpu", repeats=2)


def with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves, softmax_scale=COMMON.softmax_scale, starts=torch.tensor([3, 70]))
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


def test_results_and_gradients_are_those_of_the_function() -> None:
    tensors = inputs(COMMON, torch.bfloat16)
    found, expected = (with_gradients(place.latent_attention, tensors) for place in (HERE, ops))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_gradient_of_one_result_and_of_some_inputs_is_found() -> None:
    gradients = []
    for place in (HERE, ops):
        tensors = inputs(COMMON, torch.bfloat16)
        tensors[2].requires_grad_()
        place.latent_attention(*tensors, softmax_scale=0.3)[1].sum().backward()
        gradients.append(tensors[2].grad)
        assert tensors[0].grad is None
    assert torch.equal(*gradients)


def test_views_stay_views() -> None:
    """A row that is not read in place would be a row with other strides."""
    buffer = torch.arange(60.0).view(3, 20)
    view = buffer[:, 4:12:2].requires_grad_()
    moved = HERE.moved([view.detach()])[0]
    assert (moved.stride(), moved.storage_offset()) == (view.stride(), view.storage_offset())
    assert torch.equal(moved, view) and moved.data_ptr() != view.data_ptr()


def test_caches_are_changed_in_place() -> None:
    rows = [torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3, 4)]
    buffers = [torch.full((2, 9, 12), torch.nan) for _ in range(2)]
    for place, buffer in zip((HERE, ops), buffers, strict=True):
        place.rope_and_append(*rows, buffer[..., :8], buffer[..., 8:], positions=torch.tensor([1, 5]))
    assert torch.equal(buffers[0].nan_to_num(9), buffers[1].nan_to_num(9)) and buffers[0].isfinite().any()


def test_a_run_that_gives_other_bits_is_noticed() -> None:
    results = iter([torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])])
    with pytest.raises(AssertionError, match="run 2 gives other bits"):
        HERE.repeated(lambda: [next(results)])


@pytest.mark.gpu
def test_every_test_of_the_ops_runs_on_the_gpu_that_is_present() -> None:
    assert LEVELS[-1] == "cuda"
