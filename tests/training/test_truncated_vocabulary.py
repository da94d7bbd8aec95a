"""The α that training reports is Σ min(p, q) over the target's whole vocabulary.

Drafts with a truncated vocabulary, in SpecForge's own training forward: every supervised position
of every head, in float64, with q zero on tokens outside the draft vocabulary and p as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from rounding import rounding
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from specforge.algorithms.peagle.model import OnlinePEagleModel
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.draft.peagle import PEagleDraftModel
from specforge_forward import recorded_logits, sampled_chains
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, draft_config
from transformers import LlamaConfig

from specforge_lk.losses import LOSSES

LENGTH, HEADS, DRAFT_VOCAB = 23, 3, 40
RECORDS = {record.name: record for record in LOSSES}


@dataclass(frozen=True)
class Trained:
    """A training forward: what it was given, what the draft computed, what was reported.

    Attributes:
        target: [L, V] target logits.
        mask: [L] at position t, whether token t + 1 is the response's.
        t2d: [V] the draft vocabulary.
        heads: per head, draft logits [n, V_d] and the target positions [n] they are compared with.
        metrics: numerators and denominators by name, each [heads].
    """

    target: torch.Tensor
    mask: torch.Tensor
    t2d: torch.Tensor
    heads: list[tuple[torch.Tensor, torch.Tensor]]
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def definitions(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """α and coverage [n] of the supervised positions of every head."""
        full = torch.softmax(self.target.double(), -1)
        for head, (logits, positions) in enumerate(self.heads):
            # Position t of a head: tokens t + 1 to t + 2 + head are all the response's.
            chains = [self.mask[p - head : p + 2] for p in positions.tolist()]
            kept = torch.tensor([len(c) == head + 2 and bool(c.all()) for c in chains])
            p = full[positions[kept]]
            q = torch.zeros_like(p)
            q[:, self.t2d] = torch.softmax(logits[kept].double(), -1)
            yield torch.minimum(p, q).sum(-1), p[:, self.t2d].sum(-1)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, [0, 1, 9, LENGTH - 1]] = 0
    return {
        "input_ids": torch.randint(VOCAB_SIZE, (1, LENGTH), generator=generator),
        "attention_mask": torch.ones(1, LENGTH, dtype=torch.long),
        "target": 3 * torch.randn(1, LENGTH, VOCAB_SIZE, generator=generator),
        "loss_mask": mask,
        "hidden_states": torch.randn(1, LENGTH, 3 * HIDDEN_SIZE, generator=generator),
    }


def build_draft(kind: type, config: dict) -> torch.nn.Module:
    """A random draft with a truncated vocabulary."""
    torch.manual_seed(0)
    draft = kind(LlamaConfig.from_dict(config))
    for name, parameter in draft.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    ids = torch.randperm(VOCAB_SIZE)[:DRAFT_VOCAB].sort().values
    draft.d2t.copy_(ids - torch.arange(DRAFT_VOCAB))
    draft.t2d.zero_()[ids] = True
    return draft


def train_eagle3(loss: str) -> Trained:
    draft = build_draft(LlamaForCausalLMEagle3, draft_config(DRAFT_VOCAB))
    built = RECORDS[loss].build(RECORDS[loss].options())
    model = OnlineEagle3Model(draft, HEADS, attention_backend="sdpa", loss=built)
    batch = inputs()
    with recorded_logits(draft) as logits:
        output = model(**{**batch, "loss_mask": batch["loss_mask"][..., None]})
    # Head k of position t is compared with the target at t + k.
    at = torch.arange(LENGTH)
    heads = [(part[0, : LENGTH - k], at[k:]) for k, part in enumerate(logits)]
    return Trained(batch["target"][0], batch["loss_mask"][0], draft.t2d, heads, output[-1])


def train_peagle(loss: str) -> Trained:
    draft = build_draft(PEagleDraftModel, draft_config(DRAFT_VOCAB, "peagle"))
    built = RECORDS[loss].build(RECORDS[loss].options())
    model = OnlinePEagleModel(
        draft, mask_token_id=0, num_depths=HEADS, attention_backend="sdpa", loss=built
    )
    batch = inputs()
    with recorded_logits(draft) as logits, sampled_chains() as samples:
        _, metrics = model(**batch)
    ((anchors, depth),) = samples
    heads = [(logits[0][0, depth == k], (anchors + k)[depth == k]) for k in range(HEADS)]
    return Trained(
        batch["target"][0], batch["loss_mask"][0], draft.t2d, heads, metrics["ratio_metrics"]
    )


@pytest.mark.parametrize("train", [train_eagle3, train_peagle])
@pytest.mark.parametrize("loss", ["kl", "lk_alpha", "lk_lambda"])
def test_reported_alpha_is_the_overlap_with_the_whole_target(train, loss):
    with torch.compiler.set_stance("force_eager"):
        trained = train(loss)
    assert len(trained.heads) == HEADS
    # log p is a difference of logits, and p is off by the rounding of those.
    close = rounding(trained.target, torch.float32, 1)["atol"]
    for head, (alpha, coverage) in enumerate(trained.definitions()):
        for name, expected in (("alpha", alpha), ("coverage", coverage)):
            numerator, count = (part[head] for part in trained.metrics[name])
            assert int(count) == len(expected) > 5 - head
            assert float(numerator) == pytest.approx(float(expected.sum()), rel=close)
        # The vocabulary is truncated in earnest, and positions whose likeliest token is
        # outside it are among those that count.
        assert coverage.max() < 0.8
    best = trained.target.argmax(-1)[trained.mask.bool()]
    assert not trained.t2d[best].all()
