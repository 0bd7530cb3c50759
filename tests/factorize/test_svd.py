"""The decomposition through the smaller Gram matrix is the singular value decomposition."""

import pytest
import torch

from xeco_convert.factorize.svd import thin_svd

SHAPES = [(1, 1), (7, 7), (5, 40), (40, 5), (1, 9), (9, 1)]


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_those_of_torch_up_to_sign(rows: int, columns: int, dtype: torch.dtype) -> None:
    matrix = random_matrix(rows, columns).to(dtype)
    found = thin_svd(matrix)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert found.left.dtype == found.right.dtype == torch.float64
    torch.testing.assert_close(found.singular_values, s, rtol=1e-7, atol=1e-7)
    sign = (found.left * u).sum(0).sign()
    torch.testing.assert_close(found.left * sign, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.right * sign[:, None], s[:, None] * vh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_all_triplets_give_the_matrix_back(rows: int, columns: int) -> None:
    matrix = random_matrix(rows, columns).double()
    found = thin_svd(matrix)
    torch.testing.assert_close(found.left @ found.right, matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_truncation_leaves_the_error_of_the_discarded_values(rank: int) -> None:
    matrix = random_matrix(5, 40).double()
    cut = thin_svd(matrix, rank)
    discarded = torch.linalg.svdvals(matrix)[rank:].square().sum()
    torch.testing.assert_close((cut.left @ cut.right - matrix).square().sum(), discarded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (20, 6)])
def test_rank_deficient_and_zero_matrices_give_finite_factors(rows: int, columns: int) -> None:
    for matrix in (random_matrix(rows, 2).double() @ random_matrix(2, columns).double(), torch.zeros(rows, columns)):
        found = thin_svd(matrix)
        assert bool(found.left.isfinite().all()) and bool(found.right.isfinite().all())
        torch.testing.assert_close(found.left @ found.right, matrix.double(), rtol=1e-9, atol=1e-9)
