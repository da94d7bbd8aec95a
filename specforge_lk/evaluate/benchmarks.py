"""Benchmarks: τ of speculative decoding with sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specforge_lk.data.conversations import Message, prompt_ids
from specforge_lk.data.prompts import DataError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import Generation, speculate
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.acceptance import ACCEPTANCE
from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.intervals import bootstrap_ratio, percentiles, resamples
from specforge_lk.evaluate.settings import Advance, Settings, silent


def pooled_tau(accepted: int, drafted: int, heads: int) -> float:
    """τ = K · accepted / drafted + 1, pooled over all drafted tokens."""
    return heads * accepted / drafted + 1


@dataclass(frozen=True)
class Drafted(Arrays):
    """What one draft proposed in every prompt of a benchmark.

    Attributes:
        prompt: [N] row of the prompt.
        drafted: [N] drafted tokens.
        accepted: [N] accepted ones among them.
    """

    prompt: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray

    @property
    def size(self) -> dict[str, int]:
        """How much was measured, as fields of a `Result` or `Paired`."""
        return {"prompts": len(self.prompt)}

    def resampled_tau(self, heads: int, weights: np.ndarray) -> np.ndarray:
        """Pooled τ of every resample of the prompts; NaN where nothing was drafted."""
        with np.errstate(invalid="ignore"):
            return heads * (weights @ self.accepted) / (weights @ self.drafted) + 1


def paired_benchmark_difference(
    a: Drafted, b: Drafted, heads: int, seed: int = 0
) -> tuple[float, list[float]]:
    """Pooled τ_a - τ_b over the same prompts, and its 95 % interval.

    The bootstrap resamples prompts, the same ones for both drafts: what makes a prompt easy for
    both does not widen the interval.

    Raises:
        ValueError: the two did not draft for the same prompts.
    """
    if not np.array_equal(a.prompt, b.prompt):
        raise ValueError(
            "the two drafts were measured on different prompts; evaluate both with the same "
            "benchmark file, --limit and --max-length"
        )
    everything = np.ones((1, len(a.prompt)))
    (difference,) = a.resampled_tau(heads, everything) - b.resampled_tau(heads, everything)
    weights = resamples(len(a.prompt), seed)
    differences = a.resampled_tau(heads, weights) - b.resampled_tau(heads, weights)
    return float(difference), percentiles(differences[~np.isnan(differences)])


def measure_benchmark(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[str]],
    temperature: float,
    settings: Settings,
    prefills: Prefills | None = None,
    advance: Advance = silent,
) -> tuple[dict[str, Any], Drafted]:
    """Decode benchmark prompts speculatively and count what is accepted.

    Args:
        target: the target model.
        draft: the draft model.
        prompts: user turns of every prompt.
        temperature: of target and draft.
        settings: see `Settings`.
        prefills: target states of the prompts' first turns, shared between measurements.
        advance: see `Advance`; all prompts and turns stand for max_new_tokens each.

    Returns:
        The fields of a `Result` that it measures, and the counts of every prompt.

    Raises:
        DataError: no token was drafted.
        ValueError: decoding does not know this way of drafting.
    """
    greedy_draft = ACCEPTANCE[settings.draft_sampling].greedy_draft
    if greedy_draft is None:
        raise ValueError(
            f"--draft-sampling {settings.draft_sampling} cannot be decoded, so no --benchmark can "
            "be measured with it; measure --held-out, or choose another one"
        )
    generator = torch.Generator(target.device).manual_seed(settings.seed)
    longest = target.max_positions - settings.max_new_tokens - settings.heads - 1
    longest = min(longest, settings.max_length)
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
                temperature=temperature,
                greedy_draft=greedy_draft,
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
        self.ids = prompt_ids(target.tokenizer, self.messages)

    def answer(self, target: Target, response: Generation) -> None:
        """Add the target's response."""
        self.responses.append(response)
        text = target.tokenizer.decode(
            response.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
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
) -> tuple[dict[str, Any], Drafted]:
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
            "--max-length or --max-new-tokens"
        )
    counts = Drafted(
        np.array([index for index, gs in enumerate(responses) if gs]),
        np.array([sum(g.drafted for g in gs) for gs in responses if gs]),
        np.array([sum(g.accepted for g in gs) for gs in responses if gs]),
    )
    low, high = bootstrap_ratio(counts.accepted, counts.drafted, settings.seed)
    none = np.zeros(settings.heads)
    reached = sum((g.reached for g in flat), none)
    with np.errstate(invalid="ignore"):
        alpha = sum((g.alpha for g in flat), none) / reached
        empirical = sum((g.accepted_at for g in flat), none) / reached
    fields = {
        "tau": pooled_tau(accepted, drafted, settings.heads),
        "tau_ci": [settings.heads * low + 1, settings.heads * high + 1],
        "alpha_per_head": _nullable(alpha),
        "alpha_per_head_empirical": _nullable(empirical),
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


__all__ = ["Drafted", "measure_benchmark", "paired_benchmark_difference", "pooled_tau"]
