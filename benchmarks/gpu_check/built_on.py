"""What is built on the kernels, against float64: `linear_overlap`, the target, every loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from specforge.core.target_distribution import TargetDistribution
from specforge.losses.reduction import ScheduledLoss, reduce_heads

from benchmarks.gpu_check.bounds import BF16, F16, F32, FLOAT32, names, size
from specforge_lk.losses import LOSSES
from specforge_lk.overlap import (
    OverlapTerms,
    Projection,
    linear_overlap,
    overlap_terms,
    projected_target_terms,
    target_terms,
)

Rows = Iterator[dict[str, Any]]
#: Of `target_terms`: vocabularies in use, one of odd size, one below a tile, one token.
TARGETS: Final = (128_256, 151_936, 50_257, 4096, 37, 1)


@dataclass(frozen=True)
class Check:
    """A name, and what yields its rows on a device; small where it is a rehearsal."""

    name: str
    run: Callable[[str, bool], Rows]

    def __str__(self) -> str:
        return self.name


# --------------------------------------------------------------------------- linear_overlap


def _linear(device: str, dry: bool) -> Rows:
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
        targets: tuple[torch.Tensor | Projection, ...] = logits, Projection(goal, target_head)
        mask = torch.arange(rows, device=device) % 3 != 1
        for log_z in (logits.float().logsumexp(-1) + 0.1, None):
            # The products as they are rounded, everything after them in float64.
            z = F.linear(hidden, draft_head).double().requires_grad_()
            wide = None if log_z is None else log_z.double()
            exact = overlap_terms(z, logits.double(), wide, mask=mask, impl="reference")
            (gradient,) = torch.autograd.grad(_lambda(exact), z)
            expected = gradient @ draft_head.double(), gradient.T @ hidden.double()
            bound = 4 * torch.finfo(dtype).eps * math.sqrt(size(z, logits))
            for target, frozen in product(targets, (False, True)):
                given = hidden.clone().requires_grad_(), draft_head.clone()
                given[1].requires_grad_(not frozen)
                terms = linear_overlap(*given, target, log_z, mask=mask)
                _lambda(terms).backward()
                best = z.detach().gather(-1, terms.draft_argmax[:, None])[:, 0]
                errors = {
                    "alpha": _furthest(terms.alpha, exact.alpha),
                    "draft_argmax": _furthest(best[mask], z.detach().amax(-1)[mask]),
                    "hidden": _relative(given[0].grad, expected[0]),
                    **({} if frozen else {"head": _relative(given[1].grad, expected[1])}),
                }
                yield {
                    "target": "logits" if target is logits else "projection",
                    "head": "frozen" if frozen else "trained",
                    "full": log_z is None,
                    "shape": [rows, width, vocabulary],
                    "dtypes": names((dtype,)),
                    **_verdict(errors, bound),
                }


def _lambda(terms: OverlapTerms) -> torch.Tensor:
    weight = torch.exp(-3 * terms.alpha.detach().mean())
    return (weight * terms.kl - (1 - weight) * terms.alpha).sum()


# ------------------------------------------------------------------------------- the target


class Target(Protocol):
    """What SpecForge's `TargetDistribution` and our `TargetTerms` have in common."""

    @property
    def logits(self) -> torch.Tensor: ...

    @property
    def log_normalizer(self) -> torch.Tensor: ...

    @property
    def log_coverage(self) -> torch.Tensor: ...

    @property
    def token_ids(self) -> torch.Tensor: ...


@torch.no_grad()
def _target_terms(device: str, dry: bool) -> Rows:
    """Yield `target_terms` of awkward logits: windows, ties, excluded tokens, padding."""
    rows = 12
    impls = ("reference",) if device == "cpu" else ("triton", "reference")
    for vocabulary, dtype in product((60, 1) if dry else TARGETS, (F32, BF16, F16)):
        generator = torch.Generator(device).manual_seed(vocabulary)
        drawn = torch.randn(rows + 3, vocabulary, generator=generator, device=device)
        logits = (5 * drawn).to(dtype)[2 : 2 + rows]
        logits[0] = logits[0].round()  # ties
        logits[1] = -torch.inf  # a position without a target
        logits[2, ::2] = -torch.inf
        logits[3] = 7 * logits[3]
        order = torch.randperm(vocabulary, generator=generator, device=device)
        restricted = order[: max(1, vocabulary // 4)].sort().values.int()
        logits[4, restricted] = -torch.inf  # one without coverage
        for kept, impl in product((restricted, None), impls):
            found = target_terms(logits, kept, impl=impl)
            errors = _target_errors(found, logits, kept)
            # They are copied, and the first of the highest is taken where there is one.
            chosen = logits if kept is None else logits[:, kept]
            copied = torch.equal(found.logits, chosen)
            some = logits.amax(-1) > -torch.inf
            first = torch.equal(found.token_ids[some], logits.double().argmax(-1)[some])
            verdict = _verdict(errors, FLOAT32 * (1 + size(logits)))
            yield {
                "impl": impl,
                "shape": [rows, vocabulary],
                "kept": None if kept is None else len(kept),
                "dtypes": names((dtype,)),
                "logits_are_the_same": copied,
                "argmax": first,
                **verdict,
                "ok": verdict["ok"] and copied and first,
            }


@torch.no_grad()
def _target(device: str, dry: bool) -> Rows:
    """Yield a target from logits and, without them, from hidden states: SpecForge's and ours."""
    rows, width, vocabulary = (6, 8, 60) if dry else (64, 256, 128_256)
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, device=device)
    head = 4 * width**-0.5 * torch.randn(vocabulary, width, generator=generator, device=device)
    t2d = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    t2d[torch.randperm(vocabulary, generator=generator, device=device)[: vocabulary // 4]] = True
    kept = t2d.nonzero().squeeze(1)
    for dtype in (F32, BF16):
        states, weight = hidden.to(dtype), head.to(dtype)
        logits = F.linear(states, weight)
        project = partial(F.linear, weight=weight)
        chunked = {"chunk_size": vocabulary // 3}
        of = TargetDistribution
        ways: Mapping[str, tuple[Callable[[], Target], torch.Tensor | None]] = {
            "from_logits": (partial(of.from_logits, logits, t2d), kept),
            "from_logits, whole": (partial(of.from_logits, logits), None),
            "from_hidden_states": (
                partial(of.from_hidden_states, states, weight, t2d, **chunked),
                kept,
            ),
            "projected_target_terms": (
                partial(projected_target_terms, states, project, kept, rows=rows // 2 - 1),
                kept,
            ),
            "projected_target_terms, whole": (
                partial(projected_target_terms, states, project, rows=rows // 2 - 1),
                None,
            ),
        }
        for name, (way, restricted) in ways.items():
            errors = _target_errors(way(), logits, restricted)
            # Products of other chunks may be rounded otherwise.
            again = 0 if name.startswith("from_logits") else torch.finfo(dtype).eps
            yield {
                "way": name,
                "shape": [rows, vocabulary],
                "dtypes": names((dtype,)),
                **_verdict(errors, (FLOAT32 + again) * (1 + size(logits))),
            }


def _target_errors(
    found: Target, logits: torch.Tensor, kept: torch.Tensor | None
) -> dict[str, float]:
    """Return errors of log p on the draft vocabulary and of the coverage, beside float64.

    That of ``token_ids`` is how far below the highest the logit of the chosen token is.
    """
    wide = logits.double()
    # A position whose logits are all -inf has no target: log Z is inf and every p is 0.
    top = wide.amax(-1, keepdim=True)
    log_p = torch.where(top == -torch.inf, -torch.inf, wide.log_softmax(-1))
    log_p = log_p if kept is None else log_p[:, kept]
    chosen = wide.gather(-1, found.token_ids[:, None])
    return {
        "log_p": _furthest(found.logits.double() - found.log_normalizer.double()[:, None], log_p),
        "log_coverage": _furthest(found.log_coverage, log_p.logsumexp(-1)),
        "token_ids": _furthest(chosen, top),
    }


# ------------------------------------------------------------------------------- the losses


def _losses(device: str, dry: bool) -> Rows:
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
        errors = {
            "value": float((value - exact).abs() / exact.abs().clamp_min(1)),
            "gradient": _relative(gradient, exact_gradient),
        }
        yield {
            "loss": record.name,
            "shape": list(shape),
            **_verdict(errors, FLOAT32 * (1 + size(z, full))),
        }


def _verdict(errors: Mapping[str, float], bound: float) -> dict[str, Any]:
    # max() passes over a nan that is not the first.
    worst = max(error if error >= 0 else math.inf for error in errors.values())
    return {"errors": dict(errors), "error_over_bound": worst / bound, "ok": worst <= bound}


def _relative(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm())


def _furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance; none where both are the same infinity."""
    found = found.double()
    distance = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(distance.nan_to_num(math.inf).max())


CHECKS: Final = (
    Check("target_terms", _target_terms),
    Check("linear", _linear),
    Check("target", _target),
    Check("losses", _losses),
)
