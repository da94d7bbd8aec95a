"""``training.loss_fused_head``: every loss of every algorithm, without logits, is what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded_steps
import torch
from sharded_steps import ALGORITHMS, Case, assemble, batch_of, prepare, strategy_of

from specforge_lk.drafts.medusa import MedusaModel
from specforge_lk.drafts.model import HeadDraftModel
from specforge_lk.drafts.training import HeadModel
from specforge_lk.losses import LOSSES

pytestmark = pytest.mark.slow

#: Every loss as it is, and what makes more than the overlap terms of the draft's own logits.
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((record.name, {}) for record in LOSSES),
    ("tau", {"serving": "temperature=0.7,top_p=0.9"}),
    ("lk_lambda", {"serving": "temperature=0.8,top_k=20,drafting=greedy"}),
    ("tv", {"serving": "draft_temperature=0.5,draft_top_k=20"}),
    ("lk_lambda", {"chain_weight": "dpace", "lambda_scope": "schedule"}),
    ("kl", {"chain_weight": "auf", "kl_term": "restricted"}),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused")
    prepare(path)
    return path


def step(algorithm: Any, bundle: Any, case: Case) -> dict[str, Any]:
    """All that a training step gives: loss, metrics and gradients."""
    strategy = strategy_of(algorithm, bundle, bundle.model)
    out = strategy.forward_loss(batch_of(algorithm, case))
    out.loss.backward()
    parameters = bundle.model.draft_model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    bundle.model.zero_grad()
    return {"loss": out.loss, **out.metrics, **out.ratio_metrics, "gradients": gradients}


def leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        for name in sorted(value):
            yield from leaves(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield torch.as_tensor(value).detach().float()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_loss_is_that_of_logits(algorithm: str, root: Path, monkeypatch) -> None:
    """Loss, every metric and every gradient; five rows of the target to a chunk.

    In float32. Logits are up to 60, and every one is a sum of 32 products that is rounded in
    another way: log p and log q are off by some units of 60, 7e-6 each.
    """
    monkeypatch.setattr("specforge.losses.fused_head._CPU_CHUNK_BYTES", 5 * 264 * 4)
    case = Case(algorithm, "float32", "float32")
    registered, held = assemble(case, root)
    _, fused = assemble(case._replace(fused=True), root)
    records = {record.name: record for record in LOSSES}
    for name, options in SETTINGS:
        for bundle in (held, fused):
            loss = records[name].build(records[name].options(**options))
            if hasattr(loss, "begin_step"):
                loss.begin_step(0.25)
            bundle.model.loss = loss
        expected, found = (step(registered, bundle, case) for bundle in (held, fused))
        assert expected.keys() == found.keys()
        for key in expected:
            for actual, exact in zip(leaves(found[key]), leaves(expected[key]), strict=True):
                furthest = float((actual - exact).abs().max())
                allowed = 5e-5 * float(exact.abs().max()) + 1e-6
                assert furthest <= allowed, (name, options, key, furthest)


def test_a_draft_without_projections_is_refused_by_name() -> None:
    class Own(MedusaModel):
        head_projections = HeadDraftModel.head_projections

    draft = Own(MedusaModel.config_class(hidden_size=8, vocab_size=16, num_heads=1))
    with pytest.raises(ValueError, match="Own implements no head_projections"):
        HeadModel(draft, 1, sharded_steps.Recorder(None), loss_fused_head=True)
    HeadModel(draft, 1, sharded_steps.Recorder(None))
