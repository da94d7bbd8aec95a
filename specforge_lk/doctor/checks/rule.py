"""The rule that the engine decodes by, and how long its sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specforge_lk.data.conversations import Tokens
from specforge_lk.doctor.case import Case
from specforge_lk.doctor.findings import Finding, Weight
from specforge_lk.doctor.measure import SERVED, Measured, cost
from specforge_lk.serving import Drafting

#: Default of SpecForge's data.max_length.
_MAX_LENGTH = 2048
_SHORT = "responses as long as in training"

_ENABLE = {
    Drafting.PROBABILISTIC: 'vLLM: speculative_config={"draft_sample_method": "probabilistic"}; '
    "SGLang: --speculative-use-rejection-sampling",
    Drafting.GREEDY: "leave the engine's default, greedy drafting",
}


def samples(case: Case) -> str:
    """Return why there is nothing to choose; empty where the target samples."""
    return "" if case.rule.temperature > 0 else "at temperature 0 everything is greedy"


def drafting(case: Case) -> Sequence[Finding]:
    """Measure the other way to draft."""
    other = Drafting.PROBABILISTIC if case.rule.greedy_draft else Drafting.GREEDY
    condition = replace(case.served, rule=replace(case.rule, drafting=other))
    if case.better({other: condition}) is None:
        return []
    return [
        case.judged(
            f"{case.rule.drafting} drafting accepts less than {other} drafting",
            trained=f"{other} drafting fits the draft",
            served=str(case.rule.drafting),
            remedy=_ENABLE[other],
            remedied=condition,
        )
    ]


def truncates(case: Case) -> str:
    """Return why drafting ignores nothing; empty where it does."""
    if not case.rule.target.truncates:
        return "the target samples without top-k and top-p"
    if case.rule.greedy_draft:
        return "a greedy draft has no distribution that top-k and top-p would change"
    return ""


def draft_truncation(case: Case) -> Sequence[Finding]:
    """Measure drafting within the target's top-k and top-p."""
    rule = case.rule
    if (rule.draft_top_k, rule.draft_top_p) == (rule.top_k, rule.top_p):
        return []
    within = replace(rule, draft_top_k=rule.top_k, draft_top_p=rule.top_p)
    condition = replace(case.served, rule=within)
    if case.better({"within": condition}) is None:
        return []
    return [
        case.judged(
            "drafting ignores the target's top-k and top-p",
            trained=f"drafting by {within.draft}",
            served=f"drafting by {rule.draft}",
            remedy="an engine that drafts within them; vLLM 0.33 and SGLang 0.5.23 do not",
            remedied=condition,
        )
    ]


# -------------------------------------------------------------------------- length


def length(case: Case) -> Sequence[Finding]:
    """Compare τ within the length that the draft was trained on with τ beyond it."""
    assert case.bench is not None
    trained, source = _trained_length(case)
    responses = case.bench.responses[SERVED]
    longest = max(len(tokens.input_ids) for tokens in responses)
    room = case.config.get("max_position_embeddings")
    found = []
    if room and longest > int(room):
        found.append(
            Finding(
                "responses are longer than the draft was configured for",
                f"max_position_embeddings {room}",
                f"up to {longest} tokens",
                "serve with a shorter limit, or train a draft of the target's length",
                Weight.UNKNOWN,
                caveat="engines may refuse or cut; τ beyond it is in the expected one",
            )
        )
    if trained is None or longest <= trained:
        return found
    short = [_cut(tokens, trained) for tokens in responses]
    kept = [index for index, tokens in enumerate(short) if sum(tokens.loss_mask) > 1]
    if not kept:
        return found
    case.bench.responses[_SHORT] = [short[index] for index in kept]
    whole = case.bench.measure(case.served)
    within = case.bench.measure(replace(case.served, responses=_SHORT))
    tokens, rounds = whole.tokens[kept] - within.tokens, whole.rounds[kept] - within.rounds
    if rounds.sum() <= 0:
        return found
    beyond = Measured(tokens, rounds)
    measured = cost(within, beyond)
    if not measured.exceeds(case.tolerance):
        return found
    found.append(
        Finding(
            "τ falls beyond the length that the draft was trained on",
            f"{source} {trained} tokens",
            f"responses of up to {longest} tokens",
            "train on longer samples",
            Weight.COSTS,
            measured,
            "τ of verification steps within that length, less τ of those beyond",
        )
    )
    return found


def _trained_length(case: Case) -> tuple[int | None, str]:
    named: Any = case.features.manifest.get("max_length") if case.features else None
    if named:
        return int(named), "captured with data.max_length"
    if case.run:
        return int(case.run.get("data", "max_length", _MAX_LENGTH)), "data.max_length"
    return None, ""


def _cut(tokens: Tokens, longest: int) -> Tokens:
    return Tokens(tokens.input_ids[:longest], tokens.loss_mask[:longest])
