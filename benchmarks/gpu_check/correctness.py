"""Every kernel of `overlap_terms` against float64: terms, each gradient alone and all at once.

A cell is right where every error is within what float32 can do: numbers of size M are rounded by
eps M, and a gradient once more to its own dtype. What is built on the kernels is in `built_on`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

from benchmarks import accuracy
from benchmarks.accuracy import Logits, Objective
from benchmarks.gpu_check.bounds import BF16, F16, F32, FLOAT32, names, size
from benchmarks.gpu_check.built_on import CHECKS
from benchmarks.gpu_check.record import Record
from specforge_lk.overlap import OverlapTerms, overlap_terms

VOCABULARIES: Final = (32_000, 128_256, 4096, 151_936, 50_257, 37, 1)
TERMS: Final = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q", "log_p", "log_coverage")
#: Dtypes of draft and target logits.
DTYPES: Final = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32))


def _excluded(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Tokens that neither can have, tokens that the target cannot, and a row with one token."""
    z, y, log_z = accuracy.CASES["random"](y, noise)
    z[:, ::3] = y[:, ::3] = -torch.inf
    y[:, 1::7] = -torch.inf
    z[0, 2:] = y[0, 2:] = -torch.inf
    z[0, :2][-1], y[0, :2][-1] = 1.0, 0.0
    return z, y, log_z


def _near_underflow(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Log alpha on both sides of -87.3, below which float32 has no alpha of full precision."""
    z, y, _ = accuracy.CASES["random"](y, noise)
    height = torch.linspace(80, 110, len(z), device=z.device)
    z[:, 0], y[:, -1] = height, height
    return z, y, y.double().logsumexp(-1).float()


CASES: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], Logits]]] = {
    **accuracy.CASES,
    "log alpha near -87": _near_underflow,
    "excluded tokens": _excluded,
}
#: Of these, tokens that p lacks make the reverse KL infinite.
NO_REVERSE: Final = ("excluded tokens",)
#: Objectives with it.
REVERSE: Final = ("reverse_kl", "all")
#: Also checked as a full vocabulary, whose log Z the kernels compute.
FULL: Final = ("random", "excluded tokens")


@dataclass(frozen=True)
class Cell:
    """Logits of one kind, in one vocabulary and one pair of dtypes, for one implementation.

    ``full``: no log normalizer is given, for the vocabulary is the target's.
    """

    impl: str
    vocabulary: int
    dtypes: tuple[torch.dtype, torch.dtype]
    case: str
    rows: int
    full: bool = False

    def __str__(self) -> str:
        full = ", full vocabulary" if self.full else ""
        shape = f"{self.rows} x {self.vocabulary}"
        return f"{self.impl}, {self.case}{full}, {shape}, {names(self.dtypes)}"


def cells(dry: bool) -> Iterator[list[Cell]]:
    """Yield what is checked by vocabulary, those in use first."""
    impl, rows = ("cpu", 10) if dry else ("triton", 40)
    for vocabulary in (70, 1) if dry else VOCABULARIES:
        # Other cases need a second token.
        cases = {case: case in FULL for case in CASES if vocabulary > 1 or case in FULL}
        found = [
            Cell(impl, vocabulary, dtypes, case, rows, full)
            for dtypes in DTYPES
            for case, also_full in cases.items()
            for full in (False, True)[: 1 + also_full]
        ]
        if dry:
            # Triton's interpreter is slow, and rounds to bfloat16 towards 0.
            found.append(Cell("triton", vocabulary, DTYPES[0], "random", 3, full=True))
        yield found
    yield [Cell("closed_form", 70 if dry else 32_000, (BF16, BF16), case, 10) for case in CASES]


def run(record: Record) -> None:
    """Check the kernels in the vocabulary in use, what is built on them, and all else."""
    first, *rest = cells(record.dry)
    _check_all(record, first)
    for check in record.each(CHECKS):
        with record.guarded(check=check.name):
            for found in check.run(record.device, record.dry):
                record.row(check=check.name, **found)
    for vocabulary in rest:
        _check_all(record, vocabulary)


def _check_all(record: Record, wanted: Iterable[Cell]) -> None:
    for cell in record.each(wanted):
        with record.guarded(check="overlap_terms", cell=str(cell)):
            record.row(check="overlap_terms", **checked(cell, record.device))


# ---------------------------------------------------------------------------- overlap_terms


def checked(cell: Cell, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(cell.vocabulary)
    shape = 2, cell.rows, cell.vocabulary
    z, y, log_z = CASES[cell.case](*torch.randn(shape, generator=generator, device=device))
    z, y = z.to(cell.dtypes[0]), y.to(cell.dtypes[1])
    # Rows of another length in memory than in use, the target's a window, as in training.
    z, y = F.pad(z, (0, 3))[:, : cell.vocabulary], F.pad(y, (0, 0, 2, 5))[2 : 2 + cell.rows]
    if cell.full:
        log_z = y.double().logsumexp(-1)
    mask = torch.arange(cell.rows, device=device) % 5 != 1
    z[~mask], y[~mask] = torch.nan, torch.nan
    tokens = torch.randint(cell.vocabulary, (cell.rows,), generator=generator, device=device)
    tokens[3::4] = -1
    reverse = cell.case not in NO_REVERSE

    def terms(z: torch.Tensor, y: torch.Tensor, log_z: torch.Tensor, impl: str) -> OverlapTerms:
        given: dict[str, Any] = {"mask": mask, "tokens": tokens, "reverse_kl": reverse}
        return overlap_terms(z, y, None if cell.full else log_z, impl=impl, **given)

    exact = terms(z.double(), y.double(), log_z.double(), "reference")
    found = terms(z, y, log_z, cell.impl)
    bound = FLOAT32 * (1 + size(z[mask], y[mask], log_z[mask]))
    errors = {
        name: _error(name, found, exact, mask, bound)
        for name in TERMS
        if reverse or name != "reverse_kl"
    }
    worst = max(errors.values()) / bound
    # The first of the highest, and 0 outside the mask.
    argmax_is_right = torch.equal(found.draft_argmax, exact.draft_argmax)
    gradients = {}
    for name, objective in _objectives(mask, reverse).items():
        error, norm = _gradient_error(objective, (z, y, log_z), mask, terms, cell.impl)
        if name in REVERSE:
            # q (log q/p - L), whose difference nearly vanishes where q has all on one token.
            norm = max(norm, float(z[mask].double().softmax(-1).norm()))
        gradients[name] = error / norm if norm else error
        allowed = bound + _rounding(cell.dtypes[0], cell.rows * cell.vocabulary, norm)
        over = gradients[name] / allowed
        worst = max(worst, over if over >= 0 else math.inf)  # nan is no order
    return {
        "impl": cell.impl,
        "case": cell.case,
        "shape": [cell.rows, cell.vocabulary],
        "full": cell.full,
        "dtypes": names(cell.dtypes),
        "terms": errors,
        "gradients": gradients,
        "argmax": argmax_is_right,
        "error_over_bound": worst,
        "ok": worst <= 1 and argmax_is_right,
    }


def _error(
    name: str, found: OverlapTerms, exact: OverlapTerms, mask: torch.Tensor, bound: float
) -> float:
    """Return the largest error of a term; infinite where it is not 0 outside the mask."""
    value, expected = (getattr(of, name).double() for of in (found, exact))
    if value[~mask].any():
        return math.inf
    value, expected = value[mask], expected[mask]
    scale = torch.where(expected.abs() > 1e20, expected.abs(), 1.0)
    if name == "alpha":
        # A product of exponentials: its error is in proportion to it, down to what float32 has.
        scale = expected.abs().clamp_min(torch.finfo(F32).tiny / bound)
    # Without coverage its logarithm is -inf for both.
    error = torch.where(value == expected, 0.0, (value - expected).abs() / scale)
    return float(error.nan_to_num(math.inf).max())


def _objectives(mask: torch.Tensor, reverse: bool) -> dict[str, Objective]:
    """Return sums with another weight for every row: of each term that has a gradient, and all."""
    weight = torch.linspace(0.5, 1.5, len(mask), device=mask.device) * mask

    def of(**factors: float) -> Objective:
        def total(terms: OverlapTerms) -> torch.Tensor:
            named = [factor * getattr(terms, name) for name, factor in factors.items()]
            return (weight * torch.stack(named)).sum()

        return total

    found = {
        "kl": of(kl=1),
        "alpha": of(alpha=-1),
        "log_alpha": of(log_alpha=-1),
        "log_q": of(log_q=-1),
        "kl and alpha": of(kl=0.3, alpha=-0.7),
    }
    if reverse:
        found["reverse_kl"] = of(reverse_kl=1)
        found["all"] = of(kl=0.3, alpha=-0.7, log_alpha=-0.5, reverse_kl=0.2, log_q=-0.1)
    return found


def _gradient_error(
    objective: Objective,
    logits: Logits,
    mask: torch.Tensor,
    terms: Callable[..., OverlapTerms],
    impl: str,
) -> tuple[float, float]:
    """Return the norms of a gradient's error and of the gradient.

    The error is infinite where a position outside the mask has a gradient. Where p = q there is a
    kink: see `accuracy.nearest`.
    """
    z, y, log_z = logits
    draft = z.detach().requires_grad_()
    (found,) = torch.autograd.grad(objective(terms(draft, y, log_z, impl)), draft)
    wide = [t.double() for t in logits]
    wide[0].requires_grad_()
    overlap = terms(*wide, "reference")
    (exact,) = torch.autograd.grad(objective(overlap), wide[0])
    # A position without coverage has no gradient, as one outside the mask.
    some = mask & (y.amax(-1) > -torch.inf)
    norm = float(exact[some].norm())
    if found[~some].any() or not found.isfinite().all():
        return math.inf, norm
    # "reference" clamps logits of -inf, which then have no gradient; the kernels' there is q - p.
    error = (found.double() - exact).masked_fill(z == -torch.inf, 0)[some]
    by_alpha, by_log_alpha = accuracy.derivatives(objective, overlap)
    z, y, log_z = (t.detach()[some] for t in wide)
    error = accuracy.nearest(error, (by_alpha[some], by_log_alpha[some]), (z, y, log_z))
    # A comparison with nan would pass.
    return float(error.norm().nan_to_num(math.inf)), norm


def _rounding(dtype: torch.dtype, elements: int, norm: float) -> float:
    """Return what rounding a gradient to its dtype adds to its error, over its norm if it has one.

    Half a unit in the last place, and of what is below the normal numbers all that is lost; a GPU
    computes without float32's.
    """
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps / 2, torch.finfo(F32).tiny)
    return info.eps / 2 + (least * math.sqrt(elements) / norm if norm else 0)
