"""Probes of losses: EAGLE-3's, and a batch under ``lk_loss_type`` and ``training.loss``."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from tools.probes.common import (
    DRAFT_VOCABULARY,
    Figures,
    batch,
    exact_alpha,
    gradient,
    objective,
    outcome,
    t2d,
)

#: Shares of supervised positions; the rest is masked padding behind the same positions.
SHARES = (1.0, 0.5, 0.1)


def without_triton() -> Figures:
    sys.modules["triton"] = None  # type: ignore[assignment]  # absent, for `import`
    figures: Figures = {}

    def load() -> None:
        import specforge.core.loss  # noqa: F401

    figures["import of EAGLE-3's loss where there is no Triton"] = outcome(load, "works")
    if figures["import of EAGLE-3's loss where there is no Triton"] == "works":
        _, loss, found = objective(lk_loss_type=None, kl_scale=1.0, kl_decay=1.0)
        target, logits, _ = (tensor.double() for tensor in batch())
        logits.requires_grad_(True)
        supervised = (target.argmax(-1) < DRAFT_VOCABULARY)[..., None]
        p = target[..., :DRAFT_VOCABULARY].softmax(-1)
        expected = -(supervised * p * logits.log_softmax(-1)).sum(-1).mean()
        expected.backward()
        figures["relative error of its value, against float64"] = abs(loss / expected.item() - 1)
        figures["relative error of its gradient (L2), against float64"] = (
            (found - gradient(logits)).norm() / gradient(logits).norm()
        ).item()
    return figures


def lk_objective() -> Figures:
    from specforge.config.schema import TrainingConfig
    from specforge.core.lk_loss import compute_acceptance_rate

    figures: Figures = {}
    settings: dict[str, Any] = {"lk_loss_type": "lambda", "kl_scale": 1.0, "kl_decay": 3.0}
    for share in SHARES:
        _, loss, found = objective(share, **settings)
        figures[f"lambda loss, {share:.0%} of the positions supervised"] = loss
        figures[f"norm of its gradient, {share:.0%} supervised"] = found.norm().item()
    target, _, _ = batch()
    coverage = target.softmax(-1)[..., :DRAFT_VOCABULARY].sum(-1).mean()
    outside = (target.argmax(-1) >= DRAFT_VOCABULARY).float().mean()
    figures["coverage of the draft vocabulary"] = coverage.item()
    figures["share of positions whose target argmax is outside it"] = outside.item()
    reported = objective(**settings)[0]
    figures["acceptance rate, reported"] = reported
    figures["acceptance rate, sum of min(p, q) in float64"] = exact_alpha().mean().item()

    rows = {
        "the draft's probability underflows": ([0.0, 200.0], [1.0, 0.0]),
        "the draft vocabulary has none of the target's mass": ([0.0, 0.0], [0.0, 0.0]),
    }
    for name, (logits, probabilities) in rows.items():
        row = torch.tensor([[logits]], requires_grad=True)
        _, log_rate = compute_acceptance_rate(
            logits=row,
            target_probs=torch.tensor([[probabilities]]),
            position_mask=torch.ones(1, 1, 1),
        )
        (-log_rate).backward()
        figures[f"alpha loss where {name}"] = -log_rate.item() + 0.0
        figures[f"its gradient of two logits, where {name}"] = str(gradient(row).flatten().tolist())
    figures["kl_scale=1.5, a negative weight on total variation"] = outcome(
        lambda: TrainingConfig(lk_loss_type="lambda", kl_scale=1.5)
    )
    return figures


def kl_decay_default() -> Figures:
    from specforge.config.schema import TrainingConfig

    decay, rate = TrainingConfig(lk_loss_type="lambda").kl_decay, exact_alpha().mean().item()
    return {
        "default kl_decay": decay,
        f"weight of KL at an acceptance rate of {rate:.2f}": math.exp(-decay * rate),
    }


# ----------------------------------------------------------------------------- migration


def legacy_lambda() -> Figures:
    """``training.lk_loss_type: lambda`` with the default decay of this patch level."""
    return _legacy("lambda")


def legacy_alpha() -> Figures:
    return _legacy("alpha")


def _legacy(objective_name: str) -> Figures:
    from specforge.config.schema import TrainingConfig

    config = TrainingConfig(lk_loss_type=objective_name)
    settings = {name: getattr(config, name) for name in ("lk_loss_type", "kl_scale", "kl_decay")}
    figures: Figures = {}
    for share in SHARES:
        rate, loss, found = objective(share, **settings)
        figures |= _row(share, loss, found, rate)
    return figures


def registered_lk_lambda() -> Figures:
    return _registered("lk_lambda")


def registered_lk_alpha() -> Figures:
    return _registered("lk_alpha")


def _registered(name: str) -> Figures:
    """``training.loss`` with default options; only where the series is applied as a whole."""
    from specforge.core.target_distribution import TargetDistribution
    from specforge.losses.reduction import reduce_heads

    from specforge_lk.losses import LOSSES

    record = next(record for record in LOSSES if record.name == name)
    loss = record.build(record.options())
    figures: Figures = {}
    for share in SHARES:
        target, logits, mask = batch(share)
        logits.requires_grad_(True)
        mask = mask.squeeze(-1).bool()
        terms = loss.terms(logits, TargetDistribution.from_logits(target, t2d()), mask)
        (head,) = reduce_heads(loss, [terms], [mask])
        head.loss.backward()
        rate = (head.sum("alpha") / mask.sum()).item()
        figures |= _row(share, head.loss.item(), gradient(logits), rate)
    return figures


def _row(share: float, loss: float, found: torch.Tensor, rate: float) -> Figures:
    return {
        f"loss, {share:.0%} supervised": loss,
        f"norm of the gradient, {share:.0%} supervised": found.norm().item(),
        f"acceptance rate, {share:.0%} supervised": rate,
    }
