"""Error of the gradients against the definition in float64, inputs in float32 and bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from benchmarks.baselines import loss_of
from benchmarks.measure import Results
from specforge_lk.cli.progress import each
from specforge_lk.losses import LOSSES
from specforge_lk.overlap import OverlapTerms, overlap_terms

SOURCES: Final = ("benchmarks.baselines", "benchmarks.accuracy")
COVERAGE: Final = 0.85
#: |log p - log q| below which tokens count as tied: what float32 makes of log Z.
TIE: Final = 1e-6

#: Draft logits [N, V], target logits [N, V] and log Z [N]: what the operation is given.
Logits = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
#: A scalar of the terms, whose gradient is measured.
Objective = Callable[[OverlapTerms], torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """A kind of logits, the dtype that the operation is given, and a loss."""

    case: str
    dtype: str
    loss: str
    tokens: int = 128
    vocabulary: int = 32000

    def __str__(self) -> str:
        return f"{self.loss} of {self.case} {self.dtype} logits"


def _random(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    return _covered(1.2 * y + noise, 2 * y)


def _peaked(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Put most of the mass on a few tokens, at logits near 60."""
    return _covered(12 * y + 5 * noise, 15 * y)


def _same(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Every other row: z is exactly y up to a constant and nothing is outside the draft
    vocabulary, so that all tokens tie. The remaining rows keep the gradient from being 0."""
    z, y, log_z = _random((y * 1024).round() / 1024, noise)
    z[::2] = y[::2] + 3
    log_z[::2] = y[::2].double().logsumexp(-1).float()
    return z, y, log_z


def _grid(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Logits on a coarse grid, z a permutation of y in parts: half of the tokens tie."""
    y = (4 * y).round() / 2
    z = y.clone()
    half = y.shape[-1] // 2
    z[:, :half] = y[:, :half].flip(-1)
    return z, y, y.double().logsumexp(-1).float()


def _underflowed(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Every other row: draft and target each on a token that the other rules out; alpha is below
    e^-150, which float32 does not have."""
    z, y, log_z = _random(y, noise)
    z[::2, 0], y[::2, 1] = 200.0, 200.0
    log_z[::2] = y[::2].double().logsumexp(-1).float()
    return z, y, log_z


def _covered(z: torch.Tensor, y: torch.Tensor) -> Logits:
    return z, y, (y.double().logsumexp(-1) - math.log(COVERAGE)).float()


CASES: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], Logits]]] = {
    "random": _random,
    "peaked": _peaked,
    "equal up to a constant": _same,
    "coarse grid": _grid,
    "underflowed alpha": _underflowed,
}
_LOSSES: Final = {
    r.name: r.build(r.options()) for r in LOSSES if r.name not in ("tau", "reverse_kl")
}

GRID: Final = tuple(
    Cell(case, dtype, loss)
    for case, dtype in (*((case, "float32") for case in CASES), ("random", "bfloat16"))
    for loss in _LOSSES
)
QUICK: Final = tuple(Cell(c.case, c.dtype, c.loss, tokens=8, vocabulary=500) for c in GRID)


def run(path: Path, grid: tuple[Cell, ...], *, fresh: bool, console: Console) -> None:
    """Measure the cells that ``path`` does not hold yet; arguments as for `operation.run`."""
    results = Results(path, *SOURCES, fresh=fresh)
    waiting = [cell for cell in grid if not results.has(asdict(cell))]
    for cell in each("accuracy", waiting, console):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, cell.tokens, cell.vocabulary, generator=generator)
        logits = CASES[cell.case](*drawn)
        measured = _float32 if cell.dtype == "float32" else _bfloat16
        results.add(asdict(cell), errors=measured(mean_of(cell.loss), logits))


def mean_of(loss: str) -> Objective:
    """Return the mean of a loss over all positions."""

    def mean(overlap: OverlapTerms) -> torch.Tensor:
        everywhere = torch.ones_like(overlap.alpha, dtype=torch.bool)
        return loss_of(_LOSSES[loss], overlap, everywhere)

    return mean


def _float32(objective: Objective, logits: Logits) -> dict[str, float]:
    return {"total": distance(gradient(objective, logits), objective, logits)}


def _bfloat16(objective: Objective, logits: Logits) -> dict[str, float]:
    """Tell where the error of a bfloat16 gradient comes from.

    Returns:
        total: against the gradient of the logits before rounding.
        input_rounding: of it, what float64 makes of the rounded logits.
        operation: against float64 of the rounded logits. This holds the two below.
        output_rounding: rounding that exact gradient to bfloat16.
        arithmetic: the operation's gradient where it need not be rounded.
    """
    rounded = _covered(*(t.bfloat16() for t in logits[:2]))
    wide = rounded[0].float(), rounded[1].float(), rounded[2]
    computed, exact = gradient(objective, rounded), gradient(objective, wide, exactly=True)
    return {
        "total": distance(computed, objective, logits),
        "input_rounding": distance(exact, objective, logits),
        "operation": distance(computed, objective, wide),
        "output_rounding": distance(exact.bfloat16(), objective, wide),
        "arithmetic": distance(gradient(objective, wide), objective, wide),
    }


def gradient(objective: Objective, logits: Logits, *, exactly: bool = False) -> torch.Tensor:
    """Return the gradient of an objective by z; ``exactly``: by the definition, in float64."""
    z, y, log_z = (t.double() for t in logits) if exactly else logits
    z = z.detach().clone().requires_grad_()
    overlap = overlap_terms(z, y, log_z, impl="reference" if exactly else "auto")
    (found,) = torch.autograd.grad(objective(overlap), z)
    return found


def distance(computed: torch.Tensor, objective: Objective, logits: Logits) -> float:
    """Return the norm of the error over the norm of the exact gradient; see `nearest`."""
    z, y, log_z = (t.double() for t in logits)
    exact = gradient(objective, logits, exactly=True)
    overlap = overlap_terms(z, y, log_z, impl="reference")
    error = nearest(computed.double() - exact, derivatives(objective, overlap), (z, y, log_z))
    return (error.norm() / exact.norm()).item()


def derivatives(objective: Objective, overlap: OverlapTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the derivatives [N] of an objective by alpha and by log alpha."""
    names = ("kl", "alpha", "log_alpha")
    leaves = {name: getattr(overlap, name).detach().requires_grad_() for name in names}
    by = leaves["alpha"], leaves["log_alpha"]
    found = torch.autograd.grad(objective(replace(overlap, **leaves)), by, materialize_grads=True)
    return found[0], found[1]


def nearest(
    error: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor], logits: Logits
) -> torch.Tensor:
    """Return what is left of a gradient's error [N, V] beside the nearest gradient that is exact.

    Where p = q, alpha has a kink, and every weight of the tied tokens between 0 and 1 gives a
    gradient of it; which one is a matter of how log Z was rounded. The error is the distance to
    the nearest, one weight for all of a row's ties.

    Args:
        error: against the gradient that gives ties the weight 1/2, in float64.
        by: the objective's `derivatives`.
        logits: in float64.
    """
    z, y, log_z = logits
    log_q = z.log_softmax(-1)
    log_ratio = y - log_z[:, None] - log_q
    tied, q = log_ratio.abs() < TIE, log_q.exp()
    # What one more unit of the ties' weight adds to the gradient; see `overlap_terms`.
    mass = torch.where(tied, q, 0.0)
    log_alpha = torch.minimum(y - log_z[:, None], log_q).logsumexp(-1)
    per_weight = (by[0] + by[1] / log_alpha.exp())[:, None] * (
        mass - q * mass.sum(-1, keepdim=True)
    )
    weight = (log_ratio.sign() + 1) / 2
    taken = torch.where(tied, weight, 0.0).sum(-1) / tied.sum(-1).clamp_min(1)
    best = (error * per_weight).sum(-1) / per_weight.square().sum(-1).clamp_min(1e-300)
    return error - best.clamp(-taken, 1 - taken)[:, None] * per_weight
