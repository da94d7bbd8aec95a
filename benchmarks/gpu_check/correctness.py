"""Every kernel against float64 on the device: terms, each gradient alone and all at once.

A cell is right where every error is within what float32 can do: numbers of size M are rounded by
eps M, and a gradient once more to its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from specforge.core.target_distribution import TargetDistribution
from specforge.losses.reduction import ScheduledLoss, reduce_heads

from benchmarks import accuracy
from benchmarks.accuracy import Logits, Objective
from benchmarks.gpu_check.record import Record
from specforge_lk.losses import LOSSES
from specforge_lk.overlap import OverlapTerms, Projection, linear_overlap, overlap_terms

#: Roundings of a chain of operations, each of half an eps.
ROUNDINGS: Final = 8
VOCABULARIES: Final = (32_000, 128_256, 4096, 151_936, 50_257, 37, 1)
TERMS: Final = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q", "log_p", "log_coverage")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Dtypes of draft and target logits.
DTYPES: Final = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32))


def _excluded(y: torch.Tensor, noise: torch.Tensor) -> Logits:
    """Tokens that neither can have, tokens that the target cannot, and a row with one token."""
    z, y, log_z = accuracy.CASES["random"](y, noise)
    z[:, ::3] = y[:, ::3] = -torch.inf
    y[:, 1::7] = -torch.inf
    z[0, 2:] = y[0, 2:] = -torch.inf
    z[0, 1], y[0, 1] = 1.0, 0.0
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


@dataclass(frozen=True)
class Cell:
    """Logits of one kind, in one vocabulary and one pair of dtypes, for one implementation."""

    impl: str
    vocabulary: int
    dtypes: tuple[torch.dtype, torch.dtype]
    case: str
    rows: int

    def __str__(self) -> str:
        return f"{self.impl}, {self.case}, {self.rows} x {self.vocabulary}, {_names(self.dtypes)}"


def cells(dry: bool) -> Iterator[Cell]:
    """Yield what is checked, the vocabularies in use first."""
    for vocabulary in (70,) if dry else VOCABULARIES:
        for dtypes in DTYPES:
            for case in CASES:
                yield Cell("cpu" if dry else "triton", vocabulary, dtypes, case, 10 if dry else 40)
    # Triton's interpreter is slow, and rounds to bfloat16 towards 0.
    yield from (Cell("triton", 70, DTYPES[0], "coarse grid", 3),) if dry else ()
    for case in CASES:
        yield Cell("closed_form", 70 if dry else 32_000, (BF16, BF16), case, 10)


def run(record: Record) -> None:
    """Check the kernels, `linear_overlap`, the target's construction and every loss."""
    for cell in record.each(cells(record.dry)):
        record.row(check="overlap_terms", **_checked(cell, record.device))
    for check in record.each((_linear, _target, _losses)):
        for found in check(record.device, record.dry):
            record.row(check=check.__name__.strip("_"), **found)


# ---------------------------------------------------------------------------- overlap_terms


def _checked(cell: Cell, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(cell.vocabulary)
    shape = 2, cell.rows, cell.vocabulary
    z, y, log_z = CASES[cell.case](*torch.randn(shape, generator=generator, device=device))
    z, y = z.to(cell.dtypes[0]), y.to(cell.dtypes[1])
    # Rows of another length in memory than in use, the target's a window, as in training.
    z, y = F.pad(z, (0, 3))[:, : cell.vocabulary], F.pad(y, (0, 0, 2, 5))[2 : 2 + cell.rows]
    mask = torch.arange(cell.rows, device=device) % 5 != 1
    z[~mask], y[~mask] = torch.nan, torch.nan
    tokens = torch.randint(cell.vocabulary, (cell.rows,), generator=generator, device=device)
    tokens[3::4] = -1
    reverse = cell.case not in NO_REVERSE

    def terms(z: torch.Tensor, y: torch.Tensor, log_z: torch.Tensor, impl: str) -> OverlapTerms:
        given: dict[str, Any] = {"mask": mask, "tokens": tokens, "reverse_kl": reverse}
        return overlap_terms(z, y, log_z, impl=impl, **given)

    exact = terms(z.double(), y.double(), log_z.double(), "reference")
    found = terms(z, y, log_z, cell.impl)
    bound = ROUNDINGS / 2 * torch.finfo(F32).eps * (1 + _size(z[mask], y[mask], log_z[mask]))
    names = [name for name in TERMS if reverse or name != "reverse_kl"]
    errors = {name: _error(name, found, exact, mask, bound) for name in names}
    worst = max(errors.values()) / bound
    best = z.double().gather(-1, found.draft_argmax[:, None]).squeeze(-1)
    if not (best == z.double().amax(-1))[mask].all():
        worst = math.inf
    gradients = {}
    for name, objective in _objectives(mask, reverse).items():
        error, norm = _gradient_error(objective, (z, y, log_z), mask, terms, cell.impl)
        if name in REVERSE:
            # q (log q/p - L), whose difference nearly vanishes where q has all on one token.
            norm = max(norm, float(z[mask].double().softmax(-1).norm()))
        gradients[name] = error / norm if norm else error
        allowed = bound + _rounding(cell.dtypes[0], cell.rows * cell.vocabulary, norm)
        worst = max(worst, gradients[name] / allowed)
    return {
        "impl": cell.impl,
        "case": cell.case,
        "shape": [cell.rows, cell.vocabulary],
        "dtypes": _names(cell.dtypes),
        "terms": errors,
        "gradients": gradients,
        "error_over_bound": worst,
        "ok": worst <= 1,
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
    return float(((value - expected).abs() / scale).nan_to_num(math.inf).max())


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
    norm = float(exact[mask].norm())
    if found[~mask].any() or not found.isfinite().all():
        return math.inf, norm
    # "reference" clamps logits of -inf, which then have no gradient; the kernels' there is q - p.
    error = (found.double() - exact).masked_fill(z == -torch.inf, 0)[mask]
    by_alpha, by_log_alpha = accuracy.derivatives(objective, overlap)
    z, y, log_z = (t.detach()[mask] for t in wide)
    error = accuracy.nearest(error, (by_alpha[mask], by_log_alpha[mask]), (z, y, log_z))
    return float(error.norm()), norm


# --------------------------------------------------------------------- what is built on it


def _linear(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Yield `linear_overlap` beside float64 of the same logits, in every form that it has.

    A product is computed again for a chunk, and may then be rounded otherwise: a unit in the last
    place of its dtype, in the logits and in both gradients.
    """
    rows, width, vocabulary = (6, 8, 40) if dry else (3000, 512, 32_001)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for dtype in (F32, BF16):
        hidden, goal = (drawn(rows, width).to(dtype) for _ in range(2))
        draft_head, target_head = (
            (3 * width**-0.5 * drawn(vocabulary, width)).to(dtype) for _ in range(2)
        )
        logits = F.linear(goal, target_head)
        log_z = logits.float().logsumexp(-1) + 0.1
        mask = torch.arange(rows, device=device) % 3 != 1
        # The products as they are rounded, everything after them in float64.
        z = F.linear(hidden, draft_head).double().requires_grad_()
        exact = overlap_terms(z, logits.double(), log_z.double(), mask=mask, impl="reference")
        (gradient,) = torch.autograd.grad(_lambda(exact), z)
        expected = gradient @ draft_head.double(), gradient.T @ hidden.double()
        bound = 4 * torch.finfo(dtype).eps * math.sqrt(_size(z, logits))
        for target in (logits, Projection(goal, target_head)):
            for frozen in (False, True):
                given = hidden.clone().requires_grad_(), draft_head.clone()
                given[1].requires_grad_(not frozen)
                terms = linear_overlap(*given, target, log_z, mask=mask)
                _lambda(terms).backward()
                errors = {
                    "alpha": float((terms.alpha.double() - exact.alpha).abs().max()),
                    "hidden": _relative(given[0].grad, expected[0]),
                    **({} if frozen else {"head": _relative(given[1].grad, expected[1])}),
                }
                yield {
                    "target": "logits" if target is logits else "projection",
                    "head": "frozen" if frozen else "trained",
                    "shape": [rows, width, vocabulary],
                    "dtypes": _names((dtype,)),
                    "errors": errors,
                    "error_over_bound": max(errors.values()) / bound,
                    "ok": max(errors.values()) <= bound,
                }


def _lambda(terms: OverlapTerms) -> torch.Tensor:
    weight = torch.exp(-3 * terms.alpha.detach().mean())
    return (weight * terms.kl - (1 - weight) * terms.alpha).sum()


def _relative(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
def _target(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Yield log p, coverage and argmax of the target's construction beside float64."""
    rows, width, vocabulary = (6, 8, 60) if dry else (64, 256, 128_256)
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, device=device)
    head = 4 * width**-0.5 * torch.randn(vocabulary, width, generator=generator, device=device)
    kept = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    kept[torch.randperm(vocabulary, generator=generator, device=device)[: vocabulary // 4]] = True
    for dtype in (F32, BF16):
        states, weight = hidden.to(dtype), head.to(dtype)
        logits = F.linear(states, weight)
        exact = logits.double().log_softmax(-1)
        chunked = {"chunk_size": vocabulary // 3}
        ways = {
            "from_logits": partial(TargetDistribution.from_logits, logits, kept),
            "from_logits, whole": partial(TargetDistribution.from_logits, logits),
            "from_hidden_states": partial(
                TargetDistribution.from_hidden_states, states, weight, kept, **chunked
            ),
        }
        for name, way in ways.items():
            found = way()
            log_p = exact if name.endswith("whole") else exact[:, kept]
            # Products of other chunks may be rounded otherwise.
            again = torch.finfo(dtype).eps if name == "from_hidden_states" else 0
            bound = (ROUNDINGS / 2 * torch.finfo(F32).eps + again) * (1 + _size(logits))
            errors = {
                "log_p": _furthest(found.logits.double() - found.log_normalizer[:, None], log_p),
                "log_coverage": _furthest(found.log_coverage, log_p.logsumexp(-1)),
                "token_ids": _furthest(
                    logits.double().gather(-1, found.token_ids[:, None])[:, 0],
                    logits.double().amax(-1),
                ),
            }
            yield {
                "way": name,
                "shape": [rows, vocabulary],
                "dtypes": _names((dtype,)),
                "errors": errors,
                "error_over_bound": max(errors.values()) / bound,
                "ok": max(errors.values()) <= bound,
            }


def _furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max())


def _losses(device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """Yield every registered loss over a chain, beside the same on the CPU in float64."""
    heads, rows, vocabulary = 3, 12 if dry else 200, 50 if dry else 4099
    generator = torch.Generator().manual_seed(2)
    shape = heads, 2, rows, vocabulary
    z, full = 2 * torch.randn(2, *shape, generator=generator)
    labels = torch.randint(-1, vocabulary - 5, shape[:-1], generator=generator)
    mask = torch.rand(2, rows, generator=generator) < 0.8
    for record in LOSSES:

        def total(
            device: str, dtype: torch.dtype, record: Any = record
        ) -> tuple[torch.Tensor, torch.Tensor]:
            loss = record.build(record.options())
            if isinstance(loss, ScheduledLoss):
                loss.begin_step(0.5)
            draft = z.to(device, dtype).requires_grad_()
            whole = full.to(device, dtype)
            y, log_z = whole[..., :-5], whole.logsumexp(-1)
            coverage = y.logsumexp(-1) - log_z
            targets = [
                TargetDistribution(*of, token_ids=of[0].argmax(-1), labels=token.to(device))
                for *of, token in zip(y, log_z, coverage, labels, strict=True)
            ]
            masks = [mask.to(device)] * heads
            given = zip(draft[..., :-5], targets, masks, strict=True)
            found = reduce_heads(loss, [loss.terms(*of) for of in given], masks)
            value = torch.stack([head.loss for head in found]).sum()
            (gradient,) = torch.autograd.grad(value, draft)
            return value.detach().double().cpu(), gradient.double().cpu()

        value, gradient = total(device, F32)
        exact, exact_gradient = total("cpu", torch.float64)
        bound = ROUNDINGS / 2 * torch.finfo(F32).eps * (1 + _size(z, full))
        errors = {
            "value": float((value - exact).abs() / exact.abs().clamp_min(1)),
            "gradient": _relative(gradient, exact_gradient),
        }
        yield {
            "loss": record.name,
            "shape": list(shape),
            "errors": errors,
            "error_over_bound": max(errors.values()) / bound,
            "ok": max(errors.values()) <= bound,
        }


def _size(*tensors: torch.Tensor) -> float:
    """Return the size of the largest finite number."""
    return max(float(t.detach()[t.isfinite()].abs().max()) for t in tensors)


def _rounding(dtype: torch.dtype, elements: int, norm: float) -> float:
    """Return what rounding a gradient to its dtype adds to its error, over its norm.

    Half a unit in the last place, and of what is below the normal numbers all that is lost; a GPU
    computes without float32's.
    """
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps / 2, torch.finfo(F32).tiny)
    return info.eps / 2 + (least * math.sqrt(elements) / norm if norm else math.inf)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " / ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
