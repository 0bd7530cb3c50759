"""Truncated singular value decompositions of weights, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ROWS = 256  # of a Gram matrix: narrow enough to skip most of what symmetry gives, wide enough for fast products


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Factors of a matrix: left [rows, rank] with orthonormal columns, right [rank, columns] with the singular values in."""

    left: Tensor
    right: Tensor
    singular_values: Tensor


def thin_svd(matrix: Tensor, rank: int | None = None) -> LowRank:
    """The first `rank` (None: all) singular triplets of a real matrix [rows, columns], through its smaller Gram matrix in
    float64.

    An eigenproblem of min(rows, columns) is several times cheaper than an SVD of the matrix. Squaring costs half the
    digits: singular values below 1e-8 of the largest are noise, which is far below what a 16-bit weight holds.
    """
    exact = matrix.to(torch.float64)
    wide = exact.shape[0] <= exact.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(_lower_gram(exact if wide else exact.T))
    singular_values = eigenvalues.flip(0)[:rank].clamp_min(0).sqrt()
    vectors = vectors.flip(1)[:, :rank]
    if wide:
        return LowRank(left=vectors, right=vectors.T @ exact, singular_values=singular_values)
    # left = matrix·v / σ, where directions of σ = 0 (rank-deficient weights) get a zero column: they carry nothing.
    scale = torch.where(singular_values > 1e-8 * singular_values[:1], 1 / singular_values, 0.0)
    right = singular_values[:, None] * vectors.T
    return LowRank(left=exact @ vectors * scale, right=right, singular_values=singular_values)


def _lower_gram(rows: Tensor) -> Tensor:
    """rows·rowsᵀ below the diagonal and in blocks on it, which is all that eigh reads: a third less work than the whole."""
    gram = rows.new_zeros(rows.shape[0], rows.shape[0])
    for start in range(0, rows.shape[0], _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        gram[start:, start:stop] = rows[start:] @ rows[start:stop].T
    return gram
