"""Held-out responses: the exact expected τ, teacher-forced, at every chain start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import DataError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.acceptance import ACCEPTANCE, at_temperature_0
from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.intervals import bootstrap_ratio
from specforge_lk.evaluate.settings import Advance, Settings, silent

#: Rows of [rows, V] float32 that exist at once: 200 MB at V = 49152, 600 MB at 152k.
ROWS = 1024
#: Attention scores per attention head that exist at once: 0.5 GB in float32 with 32 heads.
SCORES = 1 << 22


@dataclass(frozen=True)
class ChainStarts(Arrays):
    """Exact acceptance of one draft at every chain start of the held-out responses.

    Attributes:
        conversation: [N] index of the conversation.
        position: [N] position t of the chain start; draft position i predicts token t + 1 + i.
        alpha: [N, K] acceptance probability of every draft position, teacher-forced.
        coverage: [N, K] Σ_{x∈D} p.
    """

    conversation: np.ndarray
    position: np.ndarray
    alpha: np.ndarray
    coverage: np.ndarray

    @property
    def tau(self) -> np.ndarray:
        """[N] expected tokens per verification step: 1 + Σ_k Π_{i≤k} α_i."""
        return 1 + np.cumprod(self.alpha.astype(np.float64), axis=1).sum(1)

    @property
    def size(self) -> dict[str, int]:
        """How much was measured, as fields of a `Result` or `Paired`."""
        conversations = len(np.unique(self.conversation))
        return {"conversations": conversations, "chain_starts": len(self.position)}

    def figures(self, seed: int) -> dict[str, Any]:
        """Return the fields of a `Result` that are measured on held-out responses."""
        tau, interval = expected_tau(self, seed)
        return {
            "tau_expected": tau,
            "tau_expected_ci": interval,
            "alpha_per_head": [float(alpha) for alpha in self.alpha.mean(0)],
            "coverage": float(self.coverage.mean()),
            **self.size,
        }


def expected_tau(starts: ChainStarts, seed: int) -> tuple[float, list[float]]:
    """Mean expected τ and its 95 % interval by a bootstrap over conversations."""
    interval = bootstrap_ratio(*_per_conversation(starts, starts.tau), seed)
    return float(starts.tau.mean()), interval


def paired_difference(a: ChainStarts, b: ChainStarts, seed: int = 0) -> tuple[float, list[float]]:
    """Mean of τ_a - τ_b over the same chain starts, and its 95 % interval.

    The bootstrap resamples conversations, since chain starts within one are dependent.

    Raises:
        ValueError: the two were not measured at the same chain starts.
    """
    if not (
        np.array_equal(a.conversation, b.conversation) and np.array_equal(a.position, b.position)
    ):
        raise ValueError(
            "the two drafts were measured at different chain starts; evaluate both with the same "
            "held-out file, --heads and --max-length"
        )
    difference = a.tau - b.tau
    interval = bootstrap_ratio(*_per_conversation(a, difference), seed)
    return float(difference.mean()), interval


def _per_conversation(starts: ChainStarts, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of per-chain-start values in every conversation that has any."""
    _, cluster = np.unique(starts.conversation, return_inverse=True)
    return np.bincount(cluster, weights=values), np.bincount(cluster)


def chain_starts(response: torch.Tensor, heads: int) -> torch.Tensor:
    """Positions t where a chain of K draft positions is supervised throughout: [B, L] bool.

    At a chain start the target has just generated token t + 1, and draft position i predicts
    t + 1 + i; all of t + 1 … t + 1 + K must be response tokens. These are the starts that decoding
    can meet.

    Args:
        response: [B, L] bool, tokens of the responses.
        heads: number of draft positions K.
    """
    length = response.shape[1]
    starts = torch.zeros_like(response)
    if length > heads + 1:
        starts[:, : length - heads - 1] = response[:, 1:].unfold(1, heads + 1, 1).all(-1)
    return starts


@torch.inference_mode()
def measure_held_out(
    target: Target,
    wanted: Sequence[tuple[Draft, Sequence[float]]],
    conversations: Sequence[Tokens],
    settings: Settings,
    advance: Advance = silent,
) -> list[dict[float, ChainStarts]]:
    """Measure the exact acceptance at all chain starts of tokenized conversations.

    The target runs once per batch, whatever the number of drafts and temperatures.

    Args:
        target: the target model.
        wanted: drafts, each with the temperatures to measure it at.
        conversations: tokenized held-out responses.
        settings: see `Settings`.
        advance: see `Advance`; the total is that of the conversations' tokens.

    Returns:
        For every entry of ``wanted``, the measurement at each of its temperatures.

    Raises:
        DataError: no chain of that many draft positions fits into a response.
    """
    parts: list[dict[float, list[ChainStarts]]] = [{t: [] for t in ts} for _, ts in wanted]
    layers = tuple(sorted({layer for draft, _ in wanted for layer in draft.capture_layers}))
    for batch in _batches(conversations, settings.batch_size):
        tokens, response, mask = _pad([conversations[i] for i in batch], target.device)
        starts = chain_starts(response, settings.heads)
        where = starts.nonzero().cpu().numpy()
        if len(where):
            output = target.forward(tokens, mask, layers=layers)
            captured = dict(zip(layers, output.features.chunk(len(layers), -1), strict=True))
            states = _TargetAtStarts(target, output.hidden, starts, settings.heads)
            numbering = np.array(batch)[where[:, 0]]
            for (draft, temperatures), part in zip(wanted, parts, strict=True):
                features = torch.cat([captured[layer] for layer in draft.capture_layers], -1)
                logits = draft.teacher_forced(tokens, features, starts, settings.heads)
                measured = _measure(states, logits, draft.draft_ids, temperatures, settings)
                for temperature, (alpha, coverage) in measured.items():
                    found = ChainStarts(numbering, where[:, 1], alpha, coverage)
                    part[temperature].append(found)
        count = int(mask.sum())
        advance(count, count)
    if not any(part for by_temperature in parts for part in by_temperature.values()):
        raise DataError(
            f"no held-out response is longer than {settings.heads + 1} tokens, so no chain of "
            f"{settings.heads} draft positions can start; lower --heads or give longer responses"
        )
    return [{t: _concatenate(found) for t, found in part.items()} for part in parts]


def _batches(conversations: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Batches of conversations, shortest first, of bounded attention scores.

    Teacher forcing holds scores [B, attention heads, L, L] at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(conversations)), key=lambda i: len(conversations[i].input_ids)):
        scores = (len(batch) + 1) * len(conversations[index].input_ids) ** 2
        if batch and (scores > SCORES or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(
    conversations: list[Tokens], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return right-padded tokens, response mask and attention mask, each [B, L]."""

    def pad(rows: Iterable[list[int]], dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    tokens = pad((c.input_ids for c in conversations), torch.long)
    response = pad((c.loss_mask for c in conversations), torch.bool)
    mask = pad(([1] * len(c.input_ids) for c in conversations), torch.bool)
    return tokens.to(device), response.to(device), mask.to(device)


def _concatenate(parts: list[ChainStarts]) -> ChainStarts:
    """Join batches, in the order of the conversations."""
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(ChainStarts)
    }
    order = np.lexsort((joined["position"], joined["conversation"]))
    return ChainStarts(**{name: values[order] for name, values in joined.items()})


class _TargetAtStarts:
    """Target distributions at the positions that the chains of a batch predict from.

    Attributes:
        rows: for each of the K draft positions, [N] where `on` has the target's logits that it is
            compared with, of every chain start.
    """

    def __init__(
        self, target: Target, hidden: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> None:
        self._target = target
        needed = torch.zeros_like(starts)
        for head in range(1, heads + 1):
            needed[:, head:] |= starts[:, :-head]
        self._hidden = hidden[needed]
        row = needed.flatten().cumsum(0).view_as(needed) - 1
        batch, position = starts.nonzero(as_tuple=True)
        self.rows = [row[batch, position + head] for head in range(1, heads + 1)]
        #: Draft vocabularies with the logits on each.
        self._known: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self._normalizers: dict[float, torch.Tensor] = {}
        self._best = torch.empty(0, dtype=torch.long)

    def on(
        self, ids: torch.Tensor | None, temperatures: Sequence[float]
    ) -> tuple[torch.Tensor, dict[float, torch.Tensor], torch.Tensor]:
        """Logits on a draft vocabulary, log normalizers by temperature, and argmax tokens.

        One pass of the LM head serves all temperatures, and all drafts with this vocabulary.

        Returns:
            [M, V_d] target logits; per temperature above 0, [M] log normalizers of logits / T over
            the FULL vocabulary; [M] argmax over it.
        """
        hot = {t for t in temperatures if t > 0}
        for known, logits in self._known:
            if _same(known, ids) and hot <= self._normalizers.keys():
                return logits, self._normalizers, self._best
        on_draft, best = [], []
        normalizers: dict[float, list[torch.Tensor]] = {t: [] for t in hot}
        for hidden in self._hidden.split(ROWS):
            logits = self._target.logits(hidden)
            on_draft.append(logits if ids is None else logits[:, ids])
            best.append(logits.argmax(-1))
            for temperature, parts in normalizers.items():
                parts.append(torch.logsumexp(logits / temperature, -1))
        self._best = torch.cat(best)
        self._normalizers |= {t: torch.cat(parts) for t, parts in normalizers.items()}
        self._known.append((ids, torch.cat(on_draft)))
        return self._known[-1][1], self._normalizers, self._best


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two draft vocabularies are the same; None is the whole vocabulary."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _measure(
    states: _TargetAtStarts,
    draft_logits: Iterable[torch.Tensor],
    ids: torch.Tensor | None,
    temperatures: Sequence[float],
    settings: Settings,
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Return α and coverage [N, K] of one draft at the chain starts of a batch, by temperature.

    Args:
        states: the target at the chain starts.
        draft_logits: K times [N, V_d], the draft's.
        ids: [V_d] target id of every draft index; None when V_d = V.
        temperatures: of target and draft.
        settings: see `Settings`.
    """
    probability = ACCEPTANCE[settings.draft_sampling].probability
    logits, normalizers, best = states.on(ids, temperatures)
    found: dict[float, tuple[list, list]] = {t: ([], []) for t in temperatures}
    for rows, q_logits in zip(states.rows, draft_logits, strict=True):
        for temperature, (alphas, coverages) in found.items():
            if temperature == 0:
                alpha, coverage = at_temperature_0(best[rows], q_logits, ids)
            else:
                parts = []
                for row, q_part in zip(rows.split(ROWS), q_logits.split(ROWS), strict=True):
                    z = normalizers[temperature][row, None]
                    p = torch.exp(logits[row] / temperature - z)
                    parts.append((probability(p, q_part, temperature), p.sum(-1)))
                alpha, coverage = (torch.cat(part) for part in zip(*parts, strict=True))
            alphas.append(alpha.float().cpu().numpy())
            coverages.append(coverage.float().cpu().numpy())
    return {t: (np.stack(a, 1), np.stack(c, 1)) for t, (a, c) in found.items()}


__all__ = [
    "ChainStarts",
    "chain_starts",
    "expected_tau",
    "measure_held_out",
    "paired_difference",
]
