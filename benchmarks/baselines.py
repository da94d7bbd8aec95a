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
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from specforge.core.target_distribution import TargetDistribution
from specforge.losses.reduction import DraftLoss, reduce_heads

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
#: Positions whose label is this are not supervised; torch's default.
IGNORED: Final = -100

#: Relative error of a float32 gradient beyond which the mathematics must differ.
TOLERANCE: Final = 1e-5


# -------------------------------------------------------------------------------- inputs


class Inputs:
    """Tensors of one draft position's loss, each made when first asked for.

    Rows repeat with a period of `PERIOD`: times do not depend on values, and drawing 10^9 normal
    numbers takes longer than measuring.

    Args:
        tokens: N, positions.
        vocabulary: V_d, the draft vocabulary.
        dtype: of draft and target logits.
        supervised: share of positions that are supervised.
    """

    PERIOD: Final = 64
    COVERAGE: Final = (0.75, 0.95)

    def __init__(self, tokens: int, vocabulary: int, dtype: torch.dtype, supervised: float) -> None:
        self.tokens, self.vocabulary, self.dtype = tokens, vocabulary, dtype
        generator = torch.Generator().manual_seed(0)
        rows = min(self.PERIOD, tokens)
        y, noise = torch.randn(2, rows, vocabulary, generator=generator)
        self._y = (2 * y).to(dtype)
        self._z = (1.2 * y + noise).to(dtype)
        low, high = self.COVERAGE
        self._log_coverage = torch.empty(rows).uniform_(low, high, generator=generator).log()
        self._log_normalizer = self._y.float().logsumexp(-1) - self._log_coverage
        self._generator = generator
        self.supervise(supervised)

    def supervise(self, share: float) -> None:
        """Choose the supervised positions, a ``share`` of all."""
        self.mask = torch.zeros(1, self.tokens, dtype=torch.bool)
        self.n_supervised = round(share * self.tokens)
        chosen = torch.randperm(self.tokens, generator=self._generator)
        self.mask[0, chosen[: self.n_supervised]] = True
        # SpecForge's and speculators' forms of it, and hard labels.
        self.position_mask = self.mask[..., None].int()
        labels = self._repeated(self._y.argmax(-1))[0]
        self.labels = labels.masked_fill(~self.mask[0], IGNORED)

    def hold(self, names: tuple[str, ...], *, only: bool) -> None:
        """Make these large tensors now; ``only``: after dropping all others."""
        for name in LARGE if only else ():
            if name not in names:
                self.__dict__.pop(name, None)
        for name in names:
            getattr(self, name)

    def release(self) -> None:
        """Drop the gradient of the previous call."""
        self.z.grad = None

    @cached_property
    def z(self) -> torch.Tensor:
        return self._repeated(self._z).requires_grad_()

    @cached_property
    def y(self) -> torch.Tensor:
        return self._repeated(self._y)

    @cached_property
    def target_p(self) -> torch.Tensor:
        """SpecForge: p~ in float32, whatever the logits have."""
        return self._repeated(self._y.float().softmax(-1))

    @cached_property
    def target_p_on_draft(self) -> torch.Tensor:
        """SpecForge: p, not renormalized, in float32."""
        return self._repeated((self._y.float() - self._log_normalizer[:, None]).exp())

    @cached_property
    def gradient(self) -> torch.Tensor:
        """Memory that the floor writes to."""
        return torch.zeros_like(self.y)

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log Z and log coverage, [1, N]."""
        return self._repeated(self._log_normalizer), self._repeated(self._log_coverage)

    def target(self) -> TargetDistribution:
        return TargetDistribution(self.y, *self.rows, token_ids=self.labels[None])

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        whole = rows.new_empty(self.tokens, *rows.shape[1:])
        for part in whole.split(len(rows)):
            part.copy_(rows[: len(part)])
        return whole[None]


#: Tensors [1, N, V_d] of `Inputs`.
LARGE: Final = ("z", "y", "target_p", "target_p_on_draft", "gradient")


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

    return Implementation(step, ("z", "y"), lambda x: _mean(x, _OBJECTIVES[name](_exact(x), x)))


def _specforge() -> dict[str, Implementation]:
    root = wheel(SPECFORGE) / "specforge" / "core"
    # Loaded by file: the patched SpecForge has the package's name in this environment.
    losses, lk = _load(root / "loss.py"), _load(root / "lk_loss.py")
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

    def of_kl(x: Inputs) -> torch.Tensor:
        # Its KL averages over all positions, the unsupervised ones as zeros.
        return x.n_supervised / x.tokens * _mean(x, _exact(x).kl)

    def of_lambda(x: Inputs) -> torch.Tensor:
        terms = _exact(x)
        weight = torch.exp(-ETA * _mean(x, terms.alpha.detach()))
        return weight * of_kl(x) + (1 - weight) * _mean(x, 1 - terms.alpha)

    both = ("z", "target_p", "target_p_on_draft")
    found = {
        "specforge kl": Implementation(alone(eager), ("z", "target_p"), of_kl),
        "specforge lk_lambda": Implementation(combined(eager, "lambda"), both, of_lambda),
        "specforge lk_alpha": Implementation(
            combined(eager, "alpha"),
            both,
            lambda x: _mean(x, _OBJECTIVES["lk_alpha"](_exact(x), x)),
            everywhere=False,
        ),
    }
    if compiles():
        found["specforge kl, inductor"] = Implementation(
            alone(compiled), ("z", "target_p"), of_kl, compiled=True, everywhere=False
        )
        found["specforge lk_lambda, inductor"] = Implementation(
            combined(compiled, "lambda"), both, of_lambda, compiled=True, everywhere=False
        )
    return found


def _speculators() -> dict[str, Implementation]:
    # Its package imports much that is not needed here: an empty one stands in for it.
    package = types.ModuleType("speculators")
    package.__path__ = [str(wheel(SPECULATORS) / "speculators")]
    sys.modules.setdefault("speculators", package)
    losses = importlib.import_module("speculators.losses")
    eager = importlib.import_module("speculators.losses.eager")

    def implementation(
        loss: Callable[..., torch.Tensor], objective: str, everywhere: bool
    ) -> Implementation:
        def step(x: Inputs) -> None:
            losses.loss_function(x.z, x.y, x.mask, x.mask, loss_fn=loss).backward()

        def definition(x: Inputs) -> torch.Tensor:
            # p is renormalized on the draft vocabulary, and lambda is each position's own.
            return _mean(x, _OBJECTIVES[objective](_exact(x, renormalized=True), x))

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


def _exact(x: Inputs, *, renormalized: bool = False) -> OverlapTerms:
    """Compute terms by the definition in float64; coverage 1 where ``renormalized``."""
    y = x.y.double()
    log_normalizer = y.logsumexp(-1) if renormalized else x.rows[0].double()
    return overlap_terms(x.z, y, log_normalizer, impl="reference")


def _mean(x: Inputs, values: torch.Tensor) -> torch.Tensor:
    return values[x.mask].mean()


def _mixed(weight: torch.Tensor, terms: OverlapTerms) -> torch.Tensor:
    return weight * terms.kl + (1 - weight) * (1 - terms.alpha)


#: Per-position losses by the definition.
_OBJECTIVES: Final[Mapping[str, Callable[[OverlapTerms, Inputs], torch.Tensor]]] = {
    "kl": lambda terms, x: terms.kl,
    "lk_alpha": lambda terms, x: -terms.log_alpha,
    "lk_lambda": lambda terms, x: _mixed(torch.exp(-ETA * _mean(x, terms.alpha.detach())), terms),
    "lk_hybrid": lambda terms, x: _mixed(torch.exp(-ETA * terms.alpha.detach()), terms),
}


def check(known: Mapping[str, Implementation]) -> dict[str, float]:
    """Return the relative error of every implementation's gradient, by its definition in float64.

    Raises:
        RuntimeError: one is off by more than `TOLERANCE`, so that its time would be the time of
            another operation.
    """
    x = Inputs(24, 96, torch.float32, supervised=0.5)
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


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"unpatched_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing: remove {WHEELS} and run again")
    module = importlib.util.module_from_spec(spec)
    # torch.compile looks its functions' modules up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
