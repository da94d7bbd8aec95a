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
        results.add(asdict(cell), errors=measured(cell.loss, logits))


def _float32(loss: str, logits: Logits) -> dict[str, float]:
    return {"total": _distance(_gradient(loss, logits), loss, logits)}


def _bfloat16(loss: str, logits: Logits) -> dict[str, float]:
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
    computed, exact = _gradient(loss, rounded), _gradient(loss, wide, exactly=True)
    return {
        "total": _distance(computed, loss, logits),
        "input_rounding": _distance(exact, loss, logits),
        "operation": _distance(computed, loss, wide),
        "output_rounding": _distance(exact.bfloat16(), loss, wide),
        "arithmetic": _distance(_gradient(loss, wide), loss, wide),
    }


def _gradient(loss: str, logits: Logits, *, exactly: bool = False) -> torch.Tensor:
    """Return the gradient of the mean loss by z; ``exactly``: by the definition, in float64."""
    z, y, log_z = (t.double() for t in logits) if exactly else logits
    z = z.detach().clone().requires_grad_()
    overlap = overlap_terms(z, y, log_z, impl="reference" if exactly else "auto")
    (gradient,) = torch.autograd.grad(_mean_loss(loss, overlap), z)
    return gradient


def _mean_loss(loss: str, overlap: OverlapTerms) -> torch.Tensor:
    everywhere = torch.ones_like(overlap.alpha, dtype=torch.bool)
    return loss_of(_LOSSES[loss], overlap, everywhere)


def _distance(computed: torch.Tensor, loss: str, logits: Logits) -> float:
    """Return the norm of the error over the norm of the exact gradient.

    Where p = q, alpha has a kink, and every weight of the tied tokens between 0 and 1 gives a
    gradient of it; which one is a matter of how log Z was rounded. The error is the distance to
    the nearest, one weight for all of a row's ties.
    """
    z, y, log_z = (t.double() for t in logits)
    exact = _gradient(loss, logits, exactly=True)
    overlap = overlap_terms(z, y, log_z, impl="reference")
    rates = replace(
        overlap,
        **{n: getattr(overlap, n).requires_grad_() for n in ("kl", "alpha", "log_alpha")},
    )
    d_alpha, d_log_alpha = torch.autograd.grad(
        _mean_loss(loss, rates), (rates.alpha, rates.log_alpha), materialize_grads=True
    )
    log_q = z.log_softmax(-1)
    log_ratio = y - log_z[:, None] - log_q
    tied, q = log_ratio.abs() < TIE, log_q.exp()
    # What one more unit of the ties' weight adds to the gradient; see `overlap_terms`.
    mass = torch.where(tied, q, 0.0)
    per_weight = (d_alpha + d_log_alpha / overlap.alpha.detach())[:, None] * (
        mass - q * mass.sum(-1, keepdim=True)
    )
    weight = (log_ratio.sign() + 1) / 2
    taken = torch.where(tied, weight, 0.0).sum(-1) / tied.sum(-1).clamp_min(1)
    error = computed.double() - exact
    best = (error * per_weight).sum(-1) / per_weight.square().sum(-1).clamp_min(1e-300)
    error -= best.clamp(-taken, 1 - taken)[:, None] * per_weight
    return (error.norm() / exact.norm()).item()
