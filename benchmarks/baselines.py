"""What the overlap operation is compared with, each fed what its framework feeds it.

SpecForge and speculators are the wheels of PyPI, unpatched, loaded beside the packages of this
environment. Every implementation is checked against float64 before anything is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from specforge.losses.reduction import DraftLoss, reduce_heads

from benchmarks.inputs import IGNORED, Inputs
from benchmarks.measure import compiles
from specforge_lk.losses import KL, KLOptions, LambdaOptions, LKAlpha, LKLambda, NoOptions
from specforge_lk.overlap import OverlapTerms, overlap_terms
from tools.wheels import SPECFORGE, WHEELS, wheel

SPECULATORS: Final = "speculators==0.9.0"

OURS: Final[Mapping[str, DraftLoss]] = {
    "kl": KL(KLOptions()),
    "lk_alpha": LKAlpha(NoOptions()),
    "lk_lambda": LKLambda(LambdaOptions()),
}
ETA: Final = LambdaOptions().eta

#: Relative error of a float32 gradient beyond which the mathematics must differ.
TOLERANCE: Final = 1e-5


# ----------------------------------------------------------------------- implementations

Step = Callable[[Inputs], object]
Definition = Callable[[Inputs], torch.Tensor]


class Implementation(NamedTuple):
    """One bar of a plot.

    Attributes:
        step: forward and backward; the gradient is left in ``z.grad``.
        reads: large tensors it is fed.
        definition: its loss in float64 by the definition, of the documented mathematics; None
            where there is no loss.
        compiled: torch.compile is part of it.
        everywhere: measured at every supervised fraction. The others do the same work at each
            (they multiply by the mask) and are measured at fraction 1 only.
    """

    step: Step
    reads: tuple[str, ...]
    definition: Definition | None
    compiled: bool = False
    everywhere: bool = True


def implementations() -> dict[str, Implementation]:
    """Return all of them by name; downloads the wheels on first use."""
    found = {f"ours {name}": _ours(name, loss) for name, loss in OURS.items()}
    found |= _specforge() | _speculators()
    found["cross-entropy"] = Implementation(
        lambda x: _cross_entropy(x, x.z).backward(),
        ("z",),
        lambda x: _cross_entropy(x, x.z.double()),
    )
    found["floor"] = Implementation(_floor, ("z", "y", "gradient"), None)
    found["floor, new gradient"] = Implementation(_floor_new, ("z", "y"), None)
    return found


def _ours(name: str, loss: DraftLoss) -> Implementation:
    def step(x: Inputs) -> None:
        (head,) = reduce_heads(loss, [loss.terms(x.z, x.target(), x.mask)], [x.mask])
        head.loss.backward()

    return Implementation(
        step, ("z", "y"), lambda x: supervised_mean(x, OBJECTIVES[name](exact_terms(x), x))
    )


def _specforge() -> dict[str, Implementation]:
    root = wheel(SPECFORGE) / "specforge" / "core"
    # Loaded by file: the patched SpecForge has the package's name in this environment.
    losses, lk = load(root / "loss.py"), load(root / "lk_loss.py")
    compiled = losses._compute_loss
    eager = inspect.unwrap(compiled)

    # As algorithms/eagle3/model.py combines them, with the paper's eta for its decay.
    def combined(kl: Callable[..., torch.Tensor], kind: str) -> Step:
        def step(x: Inputs) -> None:
            acceptance, log_acceptance = lk.compute_acceptance_rate(
                logits=x.z, target_probs=x.target_p_on_draft, position_mask=x.position_mask
            )
            lk.compute_lk_loss(
                kl_loss=kl(x.z, x.target_p, x.position_mask),
                acceptance_rate=acceptance,
                log_acceptance_rate=log_acceptance,
                lk_loss_type=kind,
                kl_scale=1.0,
                kl_decay=ETA,
            ).backward()

        return step

    def alone(kl: Callable[..., torch.Tensor]) -> Step:
        return lambda x: kl(x.z, x.target_p, x.position_mask).backward()

    exactly = specforge_definitions()
    both = ("z", "target_p", "target_p_on_draft")
    found = {
        "specforge kl": Implementation(alone(eager), ("z", "target_p"), exactly["kl"]),
        "specforge lk_lambda": Implementation(
            combined(eager, "lambda"), both, exactly["lk_lambda"]
        ),
        "specforge lk_alpha": Implementation(
            combined(eager, "alpha"),
            both,
            exactly["lk_alpha"],
            everywhere=False,
        ),
    }
    if compiles():
        found["specforge kl, inductor"] = Implementation(
            alone(compiled), ("z", "target_p"), exactly["kl"], compiled=True, everywhere=False
        )
        found["specforge lk_lambda, inductor"] = Implementation(
            combined(compiled, "lambda"),
            both,
            exactly["lk_lambda"],
            compiled=True,
            everywhere=False,
        )
    return found


def specforge_definitions() -> dict[str, Definition]:
    """Return what SpecForge's losses are, by the name of ours, in float64."""

    def of_kl(x: Inputs) -> torch.Tensor:
        # Its KL averages over all positions, the unsupervised ones as zeros.
        return x.n_supervised / x.tokens * supervised_mean(x, exact_terms(x).kl)

    def of_lambda(x: Inputs) -> torch.Tensor:
        terms = exact_terms(x)
        weight = torch.exp(-ETA * supervised_mean(x, terms.alpha.detach()))
        return weight * of_kl(x) + (1 - weight) * supervised_mean(x, 1 - terms.alpha)

    def of_alpha(x: Inputs) -> torch.Tensor:
        return supervised_mean(x, OBJECTIVES["lk_alpha"](exact_terms(x), x))

    return {"kl": of_kl, "lk_lambda": of_lambda, "lk_alpha": of_alpha}


def packages_of(root: Path, *names: str) -> None:
    """Let modules of an unpacked wheel be imported, and not what its packages import.

    Args:
        root: of the wheel.
        names: packages, such as ``speculators.utils``, for which an empty one stands in.
    """
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)


def _speculators() -> dict[str, Implementation]:
    packages_of(wheel(SPECULATORS), "speculators")
    losses = importlib.import_module("speculators.losses")
    eager = importlib.import_module("speculators.losses.eager")

    def implementation(
        loss: Callable[..., torch.Tensor], objective: str, everywhere: bool
    ) -> Implementation:
        def step(x: Inputs) -> None:
            losses.loss_function(x.z, x.y, x.mask, x.mask, loss_fn=loss).backward()

        def definition(x: Inputs) -> torch.Tensor:
            # p is renormalized on the draft vocabulary, and lambda is each position's own.
            return supervised_mean(x, OBJECTIVES[objective](exact_terms(x, renormalized=True), x))

        return Implementation(step, ("z", "y"), definition, everywhere=everywhere)

    return {
        "speculators lk_hybrid": implementation(eager.lk_hybrid_loss, "lk_hybrid", True),
        "speculators kl_div": implementation(eager.kl_div_loss, "kl", False),
        "speculators nla": implementation(eager.neg_log_acceptance_loss, "lk_alpha", False),
    }


def loss_of(loss: DraftLoss, overlap: OverlapTerms, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of a loss over the supervised positions, from terms [...] at hand."""
    terms = {
        "kl": overlap.kl,
        "alpha": overlap.alpha,
        "_log_alpha": overlap.log_alpha,
        "coverage": overlap.log_coverage.exp(),
        "no_coverage": torch.zeros_like(overlap.alpha),
    }
    (head,) = reduce_heads(loss, [terms], [mask])
    return head.loss


def _cross_entropy(x: Inputs, z: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z[0], x.labels, ignore_index=IGNORED)


def _floor(x: Inputs) -> None:
    _stream(x, x.gradient)


def _floor_new(x: Inputs) -> None:
    gradient = torch.empty_like(x.y)
    _stream(x, gradient)
    # Returned, as the others': giving it back is not part of the time.
    x.z.grad = gradient


@torch.no_grad()
def _stream(x: Inputs, gradient: torch.Tensor) -> None:
    """Read the supervised rows of z and y twice, write all of the gradient once.

    Bytes are what counts: pairs of bfloat16 are read as one float32, so that no conversion
    is part of the floor.
    """
    z, y, out = (t[0].view(torch.float32) for t in (x.z, x.y, gradient))
    z, y = z[: x.n_supervised], y[: x.n_supervised]
    z.sum()
    y.sum()
    torch.add(z, y, out=out[: x.n_supervised])
    out[x.n_supervised :].zero_()


# --------------------------------------------------------------------------- definitions


def exact_terms(x: Inputs, *, renormalized: bool = False) -> OverlapTerms:
    """Compute terms by the definition in float64; coverage 1 where ``renormalized``."""
    y = x.y.double()
    log_normalizer = y.logsumexp(-1) if renormalized else x.rows[0].double()
    return overlap_terms(x.z, y, log_normalizer, impl="reference")


def supervised_mean(x: Inputs, values: torch.Tensor) -> torch.Tensor:
    return values[x.mask].mean()


def _mixed(weight: torch.Tensor, terms: OverlapTerms) -> torch.Tensor:
    return weight * terms.kl + (1 - weight) * (1 - terms.alpha)


#: Per-position losses by the definition.
OBJECTIVES: Final[Mapping[str, Callable[[OverlapTerms, Inputs], torch.Tensor]]] = {
    "kl": lambda terms, x: terms.kl,
    "lk_alpha": lambda terms, x: -terms.log_alpha,
    "lk_lambda": lambda terms, x: _mixed(
        torch.exp(-ETA * supervised_mean(x, terms.alpha.detach())), terms
    ),
    "lk_hybrid": lambda terms, x: _mixed(torch.exp(-ETA * terms.alpha.detach()), terms),
}


def check(
    known: Mapping[str, Implementation], device: str = "cpu", tokens: int = 24
) -> dict[str, float]:
    """Return the relative error of every implementation's gradient, by its definition in float64.

    Raises:
        RuntimeError: one is off by more than `TOLERANCE`, so that its time would be the time of
            another operation.
    """
    x = Inputs(tokens, 96, torch.float32, supervised=0.5, device=device)
    z = x.z
    errors = {}
    for name, implementation in known.items():
        if implementation.definition is None:
            continue
        x.release()
        implementation.step(x)
        if z.grad is None:
            raise RuntimeError(f"{name} computed no gradient")
        (exact,) = torch.autograd.grad(implementation.definition(x), z)
        errors[name] = ((z.grad - exact).norm() / exact.norm()).item()
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        raise RuntimeError(f"gradients differ from their definitions: {wrong} of {errors}")
    return errors


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"unpatched_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing: remove {WHEELS} and run again")
    module = importlib.util.module_from_spec(spec)
    # torch.compile looks its functions' modules up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
