"""What the target computes, in training and in serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specforge_lk.doctor import edits
from specforge_lk.doctor.case import Case
from specforge_lk.doctor.findings import Finding
from specforge_lk.doctor.reading import BLOCK

#: SpecForge's default of model.target_head_dtype.
_DEFAULT = "bfloat16"


def head_dtype(case: Case) -> Sequence[Finding]:
    """Measure the draft beside the target with its LM head in the training's dtype."""
    assert case.run is not None
    trained = case.run.get("model", "target_head_dtype", _DEFAULT)
    if trained == case.dtype:
        return []
    condition = case.served.beside(edits.head_in(trained))
    if case.better({trained: condition}) is None:
        return []
    return [
        case.judged(
            "the draft fits the target's distribution as training computed it, in another dtype",
            trained=f"LM head in {trained}",
            served=case.dtype,
            remedy=f"train with model.target_head_dtype={case.dtype}",
            remedied=condition,
        )
    ]


def transforms_logits(case: Case) -> str:
    """Return why there is no transform of the target's logits; empty where there is one."""
    target = case.target
    generator = torch.Generator().manual_seed(0)
    width = target.head.weight.shape[1]
    states = torch.randn(4, width, generator=generator).to(target.head.weight)
    with torch.inference_mode():
        whole, lent = target.head_logits(states).float(), target.lent_logits(states).float()
    apart = float((whole - lent).abs().max() / lent.abs().max())
    rounding = 16 * torch.finfo(target.head.weight.dtype).eps
    if apart > rounding:
        return ""
    return "the target's logits are those of its LM head, without scale, cap or bias"


def transform(case: Case) -> Sequence[Finding]:
    """Measure the draft as if it knew, or the target had not, what the target does to logits."""
    found = []
    if case.kind.name in (*BLOCK, "mtp"):
        knowing = case.served.but(edits.TRANSFORM_LENT)
        if case.better({"knowing": knowing}):
            found.append(
                case.judged(
                    "the LM head that the target lends lacks what the target does to its logits",
                    trained="logits with the target's scale, cap or bias",
                    served="hidden · Wᵀ alone, as engines lend it",
                    remedy="train with the LM head as it is lent; SpecForge with patch 0003 does",
                    remedied=knowing,
                )
            )
    plain = case.served.beside(edits.PLAIN_LOGITS)
    if case.better({"plain": plain}):
        found.append(
            case.judged(
                "the draft fits the target's logits before their scale, cap or bias",
                trained="without it",
                served="with it, as the target samples",
                remedy="train with patch 0003, whose teacher has them",
                remedied=plain,
                caveat="τ beside a target without them: a draft of the whole logits may reach it",
            )
        )
    return found


def is_mtp(case: Case) -> str:
    """Return why no embedding is zeroed; empty where engines do it."""
    return "" if case.kind.name == "mtp" else f"{case.kind.title}: engines zero no embedding"


def zeroed_embedding(case: Case) -> Sequence[Finding]:
    """Measure an MTP module with and without the embedding at position 0."""
    if "vllm" not in case.engines:
        return []
    kept = case.served.without("embedding at position 0")
    zeroed = kept.but(edits.ZERO_FIRST)
    if case.bench is None or not case.bench.cost(kept, zeroed).exceeds(case.tolerance):
        return []
    return [
        case.judged(
            "vLLM zeroes the embedding at position 0 of an MTP module (SGLang does for MiMo)",
            trained="the embedding of the token",
            served="zero",
            remedy="none in this engine; a prompt that is longer than a few tokens hides it",
            remedied=kept,
            as_served=zeroed,
        )
    ]
