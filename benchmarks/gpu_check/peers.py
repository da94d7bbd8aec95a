"""What the kernels are compared with on a GPU, beside the implementations of `baselines`.

Every one is checked against float64 before anything is timed, as there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from benchmarks import baselines
from benchmarks.baselines import ETA, OBJECTIVES, SPECULATORS, Implementation
from benchmarks.baselines import exact_terms as exact
from benchmarks.baselines import supervised_mean as mean
from benchmarks.inputs import IGNORED, Inputs
from specforge_lk.overlap import OverlapTerms, overlap_terms
from tools.wheels import SPECFORGE, wheel

LIGER: Final = "liger-kernel==0.8.5"
Loss = Callable[[Inputs], torch.Tensor]


class Peer(NamedTuple):
    """An implementation, and where it is one function, the loss before its backward pass."""

    implementation: Implementation
    loss: Loss | None = None


def peers(device: str) -> dict[str, Peer]:
    """Return all of them by name, what is compiled last; downloads the wheels on first use."""
    found = _operation() | {
        name: Peer(implementation)
        for name, implementation in baselines.implementations().items()
        # The floor is taken from the measured bandwidth, and cross-entropy has no target.
        if not name.startswith(("floor", "cross-entropy"))
    }
    found |= _specforge(device) | _speculators(device) | _liger()
    return dict(sorted(found.items(), key=lambda item: item[1].implementation.compiled))


def _peer(loss: Loss, reads: tuple[str, ...], definition: Loss, compiled: bool = False) -> Peer:
    def step(x: Inputs) -> None:
        loss(x).backward()

    return Peer(Implementation(step, reads, definition, compiled=compiled), loss)


def _operation() -> dict[str, Peer]:
    """Return the operation alone, each row's loss from its terms, without a trainer's reduction."""

    def terms(x: Inputs) -> OverlapTerms:
        log_normalizer, log_coverage = x.rows
        return overlap_terms(x.z, x.y, log_normalizer, mask=x.mask, log_coverage=log_coverage)

    def of(objective: str) -> Peer:
        return _peer(
            # Positions that are not supervised have terms of 0.
            lambda x: (
                OBJECTIVES[objective](terms(x), x).masked_fill(~x.mask, 0).sum() / x.n_supervised
            ),
            ("z", "y"),
            lambda x: mean(x, OBJECTIVES[objective](exact(x), x)),
        )

    return {f"overlap_terms {name}": of(name) for name in ("kl", "lk_alpha", "lk_lambda")}


def _specforge(device: str) -> dict[str, Peer]:
    """Return SpecForge's KL in its Triton kernels, alone and under its LK losses.

    The gradient is written over the logits, which are a copy here: only on the first call, which
    the check makes, are they those of the inputs.
    """
    root = wheel(SPECFORGE) / "specforge" / "core"
    losses, lk = (baselines.load(root / name) for name in ("loss.py", "lk_loss.py"))

    def kl(x: Inputs) -> torch.Tensor:
        return losses.LogSoftmaxLoss.apply(x.scratch, x.target_p, x.position_mask)

    def combined(kind: str, acceptance: Callable[..., Any], x: Inputs) -> torch.Tensor:
        given = {"target_probs": x.target_p_on_draft, "position_mask": x.position_mask}
        rate, log_rate = acceptance(logits=x.scratch, **given)
        rates = {"acceptance_rate": rate, "log_acceptance_rate": log_rate}
        options = {"lk_loss_type": kind, "kl_scale": 1.0, "kl_decay": ETA}
        return lk.compute_lk_loss(kl_loss=kl(x), **rates, **options)

    def peer(loss: Loss, reads: tuple[str, ...], definition: Loss, compiled: bool = False) -> Peer:
        def step(x: Inputs) -> None:
            x.scratch.grad = None
            loss(x).backward()
            x.z.grad = x.scratch.grad

        return Peer(Implementation(step, reads, definition, compiled=compiled), loss)

    plain = baselines.specforge_definitions()
    both = ("scratch", "target_p", "target_p_on_draft")
    eager = lk.compute_acceptance_rate
    found = {"specforge kl, triton": peer(kl, both[:2], plain["kl"])}
    for name, kind in (("lk_lambda", "lambda"), ("lk_alpha", "alpha")):
        loss = partial(combined, kind, eager)
        found[f"specforge {name}, triton"] = peer(loss, both, plain[name])
    if device == "cuda":
        fused = partial(combined, "lambda", torch.compile(eager))
        name = "specforge lk_lambda, triton and inductor"
        found[name] = peer(fused, both, plain["lk_lambda"], compiled=True)
    return found


def _speculators(device: str) -> dict[str, Peer]:
    """Return the fused losses of speculators, and its eager hybrid loss compiled."""
    baselines.packages_of(wheel(SPECULATORS), "speculators", "speculators.utils")
    losses = importlib.import_module("speculators.losses")
    fused = importlib.import_module("speculators.losses.fused")
    eager = importlib.import_module("speculators.losses.eager")
    if device == "cpu":
        # There is no clock to tune by in the interpreter.
        for kernel in (fused.loss_forward_kernel, fused.loss_backward_kernel):
            kernel.configs = kernel.configs[:1]
    named = {
        "kl_div": (fused.fused_kl_div_loss, "kl"),
        "nla": (fused.fused_nla_loss, "lk_alpha"),
        "lk_hybrid": (fused.fused_lk_hybrid_loss, "lk_hybrid"),
    }
    found = {
        f"speculators {name}, fused": _speculators_peer(losses.loss_function, function, objective)
        for name, (function, objective) in named.items()
    }
    if device == "cuda":
        compiled = torch.compile(eager.lk_hybrid_loss)
        name = "speculators lk_hybrid, inductor"
        found[name] = _speculators_peer(losses.loss_function, compiled, "lk_hybrid", compiled=True)
    return found


def _speculators_peer(
    reduce: Callable[..., torch.Tensor],
    loss: Callable[..., torch.Tensor],
    objective: str,
    compiled: bool = False,
) -> Peer:
    return _peer(
        lambda x: reduce(x.z, x.y, x.mask, x.mask, loss_fn=loss),
        ("z", "y"),
        # p is renormalized on the draft vocabulary.
        lambda x: mean(x, OBJECTIVES[objective](exact(x, renormalized=True), x)),
        compiled,
    )


def _liger() -> dict[str, Peer]:
    """Return Liger's cross-entropy with total variation, and its TVD between probabilities."""
    names = ("liger_kernel", "liger_kernel.ops")
    baselines.packages_of(wheel(LIGER), *names)
    both = importlib.import_module("liger_kernel.ops.fused_ce_tvd").LigerFusedCETVDFunction
    tvd = importlib.import_module("liger_kernel.ops.tvd").LigerTVDLossFunction

    def tv(x: Inputs) -> torch.Tensor:
        return mean(x, 1 - exact(x, renormalized=True).alpha)

    def of_both(x: Inputs) -> torch.Tensor:
        ce, distance = both.apply(x.z[0], x.y[0], x.labels, IGNORED)
        return (ce + distance).sum() / x.n_supervised

    def of_both_exactly(x: Inputs) -> torch.Tensor:
        ce = torch.nn.functional.cross_entropy(x.z[0].double(), x.labels, ignore_index=IGNORED)
        return ce + tv(x)

    def of_probabilities(x: Inputs) -> torch.Tensor:
        q, p = (t[0].float().softmax(-1) for t in (x.z, x.y))
        return tvd.apply(q, p, x.labels, "sum", IGNORED) / x.n_supervised

    return {
        "liger ce + tvd": _peer(of_both, ("z", "y"), of_both_exactly),
        "liger tvd": _peer(of_probabilities, ("z", "y"), tv),
    }


def checked(
    known: Mapping[str, Peer], device: str, tokens: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the gradient's error of each that is the function it should be, and why others fail.

    An error of one is not the end: its row says what it was.
    """
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, peer in known.items():
        try:
            errors |= baselines.check({name: peer.implementation}, device, tokens)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return errors, failures
