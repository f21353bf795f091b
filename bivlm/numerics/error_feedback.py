"""Error feedback: compensate the error of quantizing one column by the columns after it.

With the second moment H of the inputs, the squared error of a layer's output is ``tr(E H E^T)`` for a weight error E.
Let ``H^-1 = U^T U`` with U upper triangular. If the columns b of W are replaced by Q_b, the change of the later columns
that minimises the output error is

    W_rest <- W_rest - (W_b - Q_b) U_bb^-1 U_b,rest,

one column at a time (OBQ, GPTQ) or a whole block at once (BiLLM): for a block of one column U_bb is its diagonal entry.
Columns that were fed back within a block need no account of it, because only ``W_b`` before and ``Q_b`` after enter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bivlm.errors import InputError
from bivlm.numerics.input_statistics import SiteStatistics

BLOCK = 128
SUB_BLOCK = 32
_MOST_DAMPING = 1.0
_INVERT_WHOLE = 256
_REVERSED_TOGETHER = 1 << 20


@dataclass(frozen=True)
class InverseFactor:
    """U of ``(H + damping mean(diag H) I)^-1 = U^T U``.

    Attributes:
        upper_NN: float32 (N, N), upper triangular.
        damping: what was added to the diagonal, as a share of its mean; more than requested where H has so little
            rank (fewer tokens than channels) that it could not be factored otherwise.
        dead_channels: channels whose inputs were all zero. No error is fed into or out of them.
        tokens: how many tokens H was made of; 0 if that is not known.
    """

    upper_NN: torch.Tensor
    damping: float
    dead_channels: int
    tokens: int = 0

    def figures(self) -> dict[str, int | float]:
        """Return what a record says of the second moment."""
        return {"damping": self.damping, "dead_channels": self.dead_channels, "tokens": self.tokens}


def inverse_factor(second_moment_NN: torch.Tensor, damping: float = 0.01) -> InverseFactor:
    """Factor the damped inverse of a second moment (N, N).

    With R upper triangular and ``R R^T = H`` (a Cholesky factorization in reversed order) U is ``R^-1``: one
    factorization and one triangular inverse. Where it fails, damping is raised tenfold, at most to 1.
    Raises ArithmeticError when even that does not help: H is not a second moment.
    """
    lower, damping, dead_channels = _reversed_cholesky(second_moment_NN, damping)
    _invert_lower(lower)
    _reverse(lower.T.view(-1))
    return InverseFactor(lower, damping, dead_channels)


def left_over(second_moment_NN: torch.Tensor, damping: float = 0.01) -> float:
    """Return ``sum_j 1 / U_jj^2``, what remains of tr(H) where errors are fed back; raises as `inverse_factor`."""
    lower, _, _ = _reversed_cholesky(second_moment_NN, damping)
    return float(lower.diagonal().to(torch.float64).square().sum())


def _reversed_cholesky(second_moment_NN: torch.Tensor, damping: float) -> tuple[torch.Tensor, float, int]:
    """Return R with rows and columns in reversed order, the damping that it took, and the number of dead channels."""
    diagonal = second_moment_NN.diagonal()
    dead = diagonal <= 0
    live = int((~dead).sum())
    mean = float(diagonal[~dead].mean()) if live else 1.0
    while True:
        # The library wants columns in a row and then factors in place: beside H there is one matrix of its size.
        lower = second_moment_NN.flip(0, 1).to(torch.float32).T
        lower.diagonal().add_(damping * mean)
        lower.diagonal()[dead.flip(0)] = mean
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            return lower, damping, len(dead) - live
        if damping >= _MOST_DAMPING:
            shape = tuple(second_moment_NN.shape)
            raise ArithmeticError(f"a second moment {shape} has no Cholesky factor at damping {damping}")
        damping = min(max(10 * damping, 1e-4), _MOST_DAMPING)


def input_factor(inputs: SiteStatistics | None, damping: float, method: str, weight_MN: torch.Tensor) -> InverseFactor:
    """Return the factor of the inverse second moment on the weight's device; raise `InputError` without inputs."""
    if inputs is None:
        raise InputError(f"method {method!r} needs the second moment of the layer's inputs; none was given")
    factor = inverse_factor(inputs.second_moment_NN.to(weight_MN.device), damping)
    return replace(factor, tokens=inputs.total_tokens)


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
    running_NM = torch.empty(weight_MN.shape[::-1], dtype=torch.float32, device=weight_MN.device)
    running_NM.copy_(weight_MN.to(torch.float32).T)

    def one_block(begin: int, columns_BM: torch.Tensor, carried_BM: torch.Tensor) -> None:
        end = begin + len(columns_BM)
        if end < len(running_NM):
            carried_BM.copy_(columns_BM)
        columns_BM.copy_(quantize_block(begin, columns_BM))
        if end < len(running_NM):
            error_MB, upper_BB = carried_BM.sub_(columns_BM).T, upper_NN[begin:end, begin:end]
            # Solved from the right, where the layout is that of the library and nothing is copied.
            torch.linalg.solve_triangular(upper_BB, error_MB, upper=True, left=False, out=error_MB)

    return _feed_back(running_NM, upper_NN, one_block, block).T


def feed_back_columns(
    columns_BM: torch.Tensor,
    upper_BB: torch.Tensor,
    quantize_column: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Feed errors back within a block: ``quantize_column(index, column_M)`` returns the rebuilt column (M,).

    Used inside a `quantize_block`. Returns the rebuilt columns, (B, M).
    """

    def sub_block(begin: int, columns_BM: torch.Tensor, carried_BM: torch.Tensor) -> None:
        end = begin + len(columns_BM)
        upper = upper_BB[begin:end, begin:end]
        diagonal = upper.diagonal().unsqueeze(1)
        # Row i of the transpose holds what column i takes of the errors of those before it.
        shares = (upper / diagonal).T.contiguous()
        errors_MB = carried_BM.T
        rows = zip(columns_BM.unbind(), carried_BM.unbind(), shares.unbind(), strict=True)
        for index, (column_M, error_M, share) in enumerate(rows):
            if index:
                torch.addmv(column_M, errors_MB[:, :index], share[:index], alpha=-1, out=column_M)
            rebuilt_M = quantize_column(begin + index, column_M)
            torch.sub(column_M, rebuilt_M, out=error_M)
            column_M.copy_(rebuilt_M)
        carried_BM.div_(diagonal)

    return _feed_back(columns_BM.clone(), upper_BB, sub_block, SUB_BLOCK)


def _feed_back(
    running_NM: torch.Tensor,
    upper_NN: torch.Tensor,
    quantize_rows: Callable[[int, torch.Tensor, torch.Tensor], None],
    block: int,
) -> torch.Tensor:
    """Run `feed_back` on columns as rows; rebuild `running_NM` in place.

    ``quantize_rows(begin, columns_BM, carried_BM)`` replaces the columns by what they are rebuilt as and sets
    ``carried = U_bb^-T (columns - rebuilt)``. Halving, not going from block to block, makes the products with U few
    and large, so that most of the work runs at the speed of a matrix product, whatever the block size.
    """
    carried_NM = torch.empty_like(running_NM)
    _halves(running_NM, carried_NM, upper_NN, quantize_rows, block, 0, len(running_NM))
    return running_NM


# Not a closure: one that calls itself would keep three matrices until the garbage collector comes by.
def _halves(
    running_NM: torch.Tensor,
    carried_NM: torch.Tensor,
    upper_NN: torch.Tensor,
    quantize_rows: Callable[[int, torch.Tensor, torch.Tensor], None],
    block: int,
    begin: int,
    end: int,
) -> None:
    blocks = -(-(end - begin) // block)
    if blocks == 1:
        quantize_rows(begin, running_NM[begin:end], carried_NM[begin:end])
        return
    middle = begin + (blocks + 1) // 2 * block
    _halves(running_NM, carried_NM, upper_NN, quantize_rows, block, begin, middle)
    running_NM[middle:end].addmm_(upper_NN[begin:middle, middle:end].T, carried_NM[begin:middle], alpha=-1)
    _halves(running_NM, carried_NM, upper_NN, quantize_rows, block, middle, end)


def _reverse(numbers: torch.Tensor) -> None:
    """Reverse the order of 1-D `numbers` in place: of a matrix's, that is the flip of both its sides."""
    half = len(numbers) // 2
    for begin in range(0, half, _REVERSED_TOGETHER):
        end = min(begin + _REVERSED_TOGETHER, half)
        front, back = numbers[begin:end], numbers[len(numbers) - end : len(numbers) - begin]
        kept = front.clone()
        front.copy_(back.flip(0))
        back.copy_(kept.flip(0))


def _invert_lower(lower_NN: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place by halves: matrix products on the half of it that is not zero.

    ``[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]``.
    """
    half = len(lower_NN) // 2
    if len(lower_NN) <= _INVERT_WHOLE:
        identity = torch.eye(len(lower_NN), dtype=lower_NN.dtype, device=lower_NN.device)
        lower_NN.copy_(torch.linalg.solve_triangular(lower_NN, identity, upper=False))
        return
    first, below, second = lower_NN[:half, :half], lower_NN[half:, :half], lower_NN[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    below.copy_((second @ below).neg_() @ first)
