"""Error feedback: what quantizing one column loses is made up for by the columns that are still to come.

With the second moment H of the inputs, the squared error of a layer's output is ``tr(E H E^T)`` for a weight error E.
Let ``H^-1 = U^T U`` with U upper triangular. If the columns b of W are replaced by Q_b, the change of the later columns
that makes the output error smallest is

    W_rest <- W_rest - (W_b - Q_b) U_bb^-1 U_b,rest,

one column at a time (OBQ, GPTQ) or a whole block at once (BiLLM): for a block of one column U_bb is its diagonal entry.
Columns that were fed back within a block need no account of it, because only ``W_b`` before and ``Q_b`` after enter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 128
SUB_BLOCK = 16
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class InverseFactor:
    """U of ``(H + damping mean(diag H) I)^-1 = U^T U``.

    Attributes:
        upper_NN: float32 (N, N), upper triangular.
        damping: what was added to the diagonal, as a share of its mean; more than was asked for where H has so little
            rank (fewer tokens than channels) that it could not be factored otherwise.
        dead_channels: channels whose inputs were all zero. No error is fed into or out of them.
    """

    upper_NN: torch.Tensor
    damping: float
    dead_channels: int


def inverse_factor(second_moment_NN: torch.Tensor, damping: float = 0.01) -> InverseFactor:
    """Factor the damped inverse of a second moment (N, N).

    With R upper triangular and ``R R^T = H`` (a Cholesky factorization in reversed order) U is ``R^-1``: one
    factorization and one triangular inverse. Where it fails, damping is raised tenfold, at most to 1.
    Raises ArithmeticError when even that does not help: H is not a second moment.
    """
    diagonal = second_moment_NN.diagonal()
    dead = diagonal <= 0
    live = int((~dead).sum())
    mean = float(diagonal[~dead].mean()) if live else 1.0
    while True:
        damped = second_moment_NN.to(torch.float32, copy=True)
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            break
        if damping >= _MOST_DAMPING:
            raise ArithmeticError(f"a second moment {tuple(damped.shape)} has no Cholesky factor at damping {damping}")
        damping = min(max(10 * damping, 1e-4), _MOST_DAMPING)
    del damped
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous()
    return InverseFactor(upper, damping, len(dead) - live)


def feed_back(
    weight_MN: torch.Tensor,
    upper_NN: torch.Tensor,
    quantize_block: Callable[[int, torch.Tensor], torch.Tensor],
    block: int = BLOCK,
) -> torch.Tensor:
    """Quantize a weight block of columns by block, each with the error of those before fed into it.

    ``quantize_block(begin, columns_BM)`` gets the columns from `begin` on as rows of a float32 matrix (they are then
    contiguous) and returns what they are rebuilt as, (B, M). Returns the rebuilt weight, float32 (M, N).
    """
    running_NM = weight_MN.T.to(torch.float32, copy=True).contiguous()
    return _feed_back(running_NM, upper_NN, quantize_block, block).T


def feed_back_columns(
    columns_BM: torch.Tensor,
    upper_BB: torch.Tensor,
    quantize_column: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The same within a block, column by column: ``quantize_column(index, column_M)`` returns the rebuilt column (M,).

    Used inside a `quantize_block`. Returns the rebuilt columns, (B, M).
    """

    def sub_block(begin: int, columns: torch.Tensor) -> torch.Tensor:
        upper = upper_BB[begin : begin + len(columns), begin : begin + len(columns)]
        rebuilt = torch.empty_like(columns)
        for index in range(len(columns)):
            rebuilt[index] = quantize_column(begin + index, columns[index])
            error_M = (columns[index] - rebuilt[index]) / upper[index, index]
            columns[index + 1 :].addr_(upper[index, index + 1 :], error_M, alpha=-1)
        return rebuilt

    return _feed_back(columns_BM.clone(), upper_BB, sub_block, SUB_BLOCK)


def _feed_back(
    running_NM: torch.Tensor,
    upper_NN: torch.Tensor,
    quantize_block: Callable[[int, torch.Tensor], torch.Tensor],
    block: int,
) -> torch.Tensor:
    """`feed_back` on columns as rows; `running_NM` is used up."""
    rebuilt_NM = torch.empty_like(running_NM)
    for begin in range(0, len(running_NM), block):
        end = min(begin + block, len(running_NM))
        before_BM = running_NM[begin:end].clone()
        rebuilt_NM[begin:end] = quantize_block(begin, running_NM[begin:end])
        if end < len(running_NM):
            error_BM = before_BM.sub_(rebuilt_NM[begin:end])
            carried_BM = torch.linalg.solve_triangular(upper_NN[begin:end, begin:end].T, error_BM, upper=False)
            running_NM[end:].addmm_(upper_NN[begin:end, end:].T, carried_BM, alpha=-1)
    return rebuilt_NM
