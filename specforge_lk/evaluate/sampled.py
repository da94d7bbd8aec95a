"""Speculative decoding with sampled tokens: the check on what is computed along responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specforge_lk.data.conversations import Message, response_text
from specforge_lk.data.prompts import DataError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import Generation, speculate
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.intervals import bootstrap_ratio, percentiles, resamples
from specforge_lk.evaluate.settings import Advance, Settings, silent
from specforge_lk.serving import Serving


@dataclass(frozen=True)
class Decoded(Arrays):
    """What one draft did in every prompt of a benchmark.

    Attributes:
        prompt: [N] row of the prompt.
        tokens: [N] tokens behind the first of each response.
        rounds: [N] rounds that they took.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    rounds: np.ndarray

    @property
    def size(self) -> dict[str, int]:
        """How much was measured, as fields of a `Result` or `Paired`."""
        return {"prompts": len(self.prompt)}

    def tau(self, weights: np.ndarray) -> np.ndarray:
        """Return τ of every resample of the prompts; NaN where there was no round."""
        with np.errstate(invalid="ignore"):
            return (weights @ self.tokens) / (weights @ self.rounds)


def paired_decoded_difference(a: Decoded, b: Decoded, seed: int = 0) -> tuple[float, list[float]]:
    """Return τ_a - τ_b over the same prompts, and its 95 % interval.

    The bootstrap resamples prompts, the same ones for both drafts.

    Raises:
        ValueError: the two did not decode the same prompts.
    """
    if not np.array_equal(a.prompt, b.prompt):
        raise ValueError(
            "the two drafts were measured on different prompts; evaluate both with the same "
            "benchmark file, --limit and --max-length"
        )
    everything = np.ones((1, len(a.prompt)))
    (difference,) = a.tau(everything) - b.tau(everything)
    weights = resamples(len(a.prompt), seed)
    differences = a.tau(weights) - b.tau(weights)
    return float(difference), percentiles(differences[~np.isnan(differences)])


def decode_benchmark(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[str]],
    rule: Serving,
    settings: Settings,
    prefills: Prefills | None = None,
    advance: Advance = silent,
) -> tuple[dict[str, Any], Decoded]:
    """Decode benchmark prompts speculatively and count what is accepted.

    Args:
        target: the target model.
        draft: the draft model.
        prompts: user turns of every prompt.
        rule: the serving rule.
        settings: see `Settings`.
        prefills: target states of the prompts' first turns, shared between measurements.
        advance: see `Advance`; all prompts and turns stand for max_new_tokens each.

    Returns:
        The fields of a `Result` that it measures, and the counts of every prompt.

    Raises:
        DataError: no token was drafted.
    """
    generator = torch.Generator(target.device).manual_seed(settings.seed)
    longest = settings.longest_prompt(target.max_positions)
    chats = [_Chat(list(turns)) for turns in prompts]
    skipped = 0
    for turn in range(settings.turns):
        # What was too long once stays without an answer, and without further questions.
        asked = [chat for chat in chats if turn < len(chat.turns) and len(chat.responses) == turn]
        for chat in asked:
            chat.ask(target)
        usable = [chat for chat in asked if len(chat.ids) <= longest]
        skipped += len(asked) - len(usable)
        advance(0, (len(asked) - len(usable)) * settings.max_new_tokens)
        for batch in _even_batches(usable, settings.batch_size):
            responses = speculate(
                target,
                draft,
                [chat.ids for chat in batch],
                heads=settings.heads,
                rule=rule,
                max_new_tokens=settings.max_new_tokens,
                prefills=None if turn else prefills,
                generator=generator,
                advance=advance,
            )
            for chat, response in zip(batch, responses, strict=True):
                chat.answer(target, response)
    return _count([chat.responses for chat in chats], skipped, settings)


@dataclass
class _Chat:
    """The conversation about one prompt.

    Attributes:
        turns: what the user says.
        messages: what was said so far.
        ids: token ids of that, up to where the next response begins.
        responses: the target's, one per answered turn.
    """

    turns: list[str]
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    responses: list[Generation] = field(default_factory=list)

    def ask(self, target: Target) -> None:
        """Add the next turn of the user."""
        self.messages.append({"role": "user", "content": self.turns[len(self.responses)]})
        self.ids = target.chat.prompt_ids(self.messages)

    def answer(self, target: Target, response: Generation) -> None:
        """Add the target's response."""
        self.responses.append(response)
        finished = response.tokens[-1] in target.eos_ids
        text = response_text(target.tokenizer, response.tokens, finished)
        self.messages.append({"role": "assistant", "content": text})


def _even_batches(chats: list[_Chat], batch_size: int) -> list[list[_Chat]]:
    """Batches of nearly equal size, shortest prompts first, none above the batch size."""
    if not chats:
        return []
    order = sorted(chats, key=lambda chat: len(chat.ids))
    parts = np.array_split(np.arange(len(order)), -(-len(order) // batch_size))
    return [[order[index] for index in part] for part in parts]


def _count(
    responses: Sequence[Sequence[Generation]], skipped: int, settings: Settings
) -> tuple[dict[str, Any], Decoded]:
    """Return the fields of a `Result` and the counts of every prompt that has a response.

    Args:
        responses: of every prompt, one per turn.
        skipped: turns that were too long.
        settings: see `Settings`.
    """
    flat = [response for of_prompt in responses for response in of_prompt]
    drafted = sum(g.drafted for g in flat)
    accepted = sum(g.accepted for g in flat)
    if not drafted:
        raise DataError(
            f"no token was drafted in {len(responses)} prompts ({skipped} too long); raise "
            "--max-length, or change --max-new-tokens"
        )
    counts = Decoded(
        np.array([index for index, gs in enumerate(responses) if gs]),
        np.array([sum(len(g.tokens) - 1 for g in gs) for gs in responses if gs]),
        np.array([sum(g.rounds for g in gs) for gs in responses if gs]),
    )
    by_prompt = np.array(
        [[sum(g.accepted for g in gs), sum(g.drafted for g in gs)] for gs in responses if gs]
    )
    low, high = bootstrap_ratio(by_prompt[:, 0], by_prompt[:, 1], settings.seed)
    rounds = int(counts.rounds.sum())
    none = np.zeros(settings.heads)
    reached = sum((g.reached for g in flat), none)
    with np.errstate(invalid="ignore"):
        alpha = sum((g.alpha for g in flat), none) / reached
        empirical = sum((g.accepted_at for g in flat), none) / reached
    fields = {
        "tau_rounds": float(counts.tokens.sum() / rounds),
        "tau_rounds_ci": bootstrap_ratio(counts.tokens, counts.rounds, settings.seed),
        "rounds": rounds,
        "tau": settings.heads * accepted / drafted + 1,
        "tau_ci": [settings.heads * low + 1, settings.heads * high + 1],
        "alpha_per_head": _nullable(alpha),
        "alpha_per_head_empirical": _nullable(empirical),
        "survival_per_head": _nullable(sum((g.accepted_at for g in flat), none) / rounds),
        "coverage": float(sum(g.coverage.sum() for g in flat) / reached.sum()),
        "drafted": drafted,
        "accepted": accepted,
        "skipped": skipped,
        "generated_tokens": sum(len(g.tokens) for g in flat),
        **counts.size,
    }
    return fields, counts


def _nullable(values: Iterable[float]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


__all__ = ["Decoded", "decode_benchmark", "paired_decoded_difference"]
