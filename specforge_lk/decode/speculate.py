"""Speculative generation with a Hugging Face target, batched over prompts of any length.

Rows accept different numbers of tokens, but a transformers cache is rectangular. So every target
step appends the same number of slots to every row, and the rejected ones are masked out for good:
a 2D attention mask with holes and explicit position ids keep the target's attention exact, and the
cache needs no per-row surgery. Now and then the holes, and the rows that have finished, are
compacted away.

A chain of K drafted tokens may be verified in several target steps of ``block`` tokens, each row
going on with its chain until it is rejected or complete. That changes nothing in what is accepted,
only how much the target computes in vain behind a rejection: on a CPU, where target steps cost
by the token, short blocks are much faster; on a GPU one step of K + 1 is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specforge_lk.decode.draft import Draft, Proposal
from specforge_lk.decode.sampling import (
    Verification,
    choose,
    distribution,
    verify,
    verify_greedy,
)
from specforge_lk.decode.target import Target


@dataclass
class Generation:
    """One prompt's response and its acceptance record.

    A head (draft position) is reached in a cycle when all heads before it were accepted.
    Drafted tokens behind an accepted end-of-sequence token count neither as drafted nor as
    accepted: an engine has stopped there.

    Attributes:
        tokens: response, the end-of-sequence token included.
        drafted: drafted tokens over all cycles.
        accepted: accepted ones among them.
        reached: [K] cycles in which each head was reached.
        accepted_at: [K] cycles in which it was reached and accepted.
        alpha: [K] sum over the reached cycles of the exact acceptance probability.
        coverage: [K] sum over the reached cycles of the target's mass on the draft vocabulary.
    """

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    reached: np.ndarray = field(default_factory=lambda: np.zeros(0))
    accepted_at: np.ndarray = field(default_factory=lambda: np.zeros(0))
    alpha: np.ndarray = field(default_factory=lambda: np.zeros(0))
    coverage: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Prefill:
    """The target's states of one batch of prompts, padded on the left to P tokens.

    Attributes:
        ids: [B, P] prompt tokens.
        mask: [B, P] bool, where they are.
        positions: [B, P].
        logits: [B, V] after the last token of every prompt.
        features: by captured layer, [B, P, H].
        states: by decoder layer, keys and values.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    features: dict[int, torch.Tensor]
    states: list[tuple[torch.Tensor, torch.Tensor]]

    def cache(self) -> Any:
        """A transformers cache holding the prompts; extending it leaves these states alone."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.states):
            cache.update(keys, values, layer)
        return cache

    def features_of(self, layers: tuple[int, ...]) -> torch.Tensor:
        """[B, P, len(layers) * H] for a draft that captures these layers."""
        return torch.cat([self.features[layer] for layer in layers], -1)

    @property
    def size(self) -> int:
        """Bytes held."""
        tensors = [self.logits, *self.features.values(), *(t for pair in self.states for t in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Prefills:
    """Prefills of batches, kept so that several drafts and temperatures share them.

    On a CPU the prompts take longer than the responses of a short benchmark.

    Args:
        target: the target model.
        layers: decoder layers to capture, for all drafts that will be asked about.
        limit: bytes to keep at most; what does not fit is computed anew each time.
    """

    def __init__(self, target: Target, layers: Iterable[int], limit: int = 1 << 30) -> None:
        self._target = target
        self._layers = tuple(sorted(set(layers)))
        self._left = limit
        self._kept: dict[tuple[tuple[int, ...], ...], Prefill] = {}

    def of(self, prompts: Sequence[Sequence[int]]) -> Prefill:
        """The prefill of a batch of prompts."""
        key = tuple(map(tuple, prompts))
        if key in self._kept:
            return self._kept[key]
        prefill = self._compute(prompts)
        if prefill.size <= self._left:
            self._left -= prefill.size
            self._kept[key] = prefill
        return prefill

    @torch.inference_mode()
    def _compute(self, prompts: Sequence[Sequence[int]]) -> Prefill:
        from transformers import DynamicCache

        target, longest = self._target, max(map(len, prompts))
        # Padded on the left, so that the last column is the last token of every prompt.
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=target.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=target.device)
            mask[row, longest - len(prompt) :] = True
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        output = target.forward(ids, mask, positions, cache, self._layers)
        parts = output.features.chunk(len(self._layers), -1)
        return Prefill(
            ids,
            mask,
            positions,
            target.logits(output.hidden[:, -1]),
            dict(zip(self._layers, parts, strict=True)),
            [(layer.keys, layer.values) for layer in cache.layers],
        )


@dataclass
class _Chains:
    """The drafted chain of every row, and how much of it has been verified.

    Attributes:
        tokens: [B, K + 1] the last known token and the K drafted ones, target vocabulary.
        index: [B, K] the drafted ones as draft indices.
        logits: [B, K, V_d] draft logits they were chosen from.
        offset: [B] drafted tokens accepted in earlier steps.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    logits: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def begin(cls, last: torch.Tensor, proposal: Proposal) -> _Chains:
        tokens = torch.cat([last[:, None], proposal.tokens], 1)
        return cls(tokens, proposal.index, proposal.logits, torch.zeros_like(last))

    def advance(self, count: int, ended: torch.Tensor, fresh: _Chains) -> _Chains:
        """Go on by ``count`` tokens, or with the fresh chain where this one has ended."""
        return _Chains(
            torch.where(ended[:, None], fresh.tokens, self.tokens),
            torch.where(ended[:, None], fresh.index, self.index),
            torch.where(ended[:, None, None], fresh.logits, self.logits),
            torch.where(ended, 0, self.offset + count),
        )

    def keep_rows(self, rows: torch.Tensor) -> _Chains:
        return _Chains(self.tokens[rows], self.index[rows], self.logits[rows], self.offset[rows])


@torch.inference_mode()
def generate(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    *,
    heads: int,
    temperature: float,
    greedy_draft: bool,
    max_new_tokens: int,
    block: int | None = None,
    prefills: Prefills | None = None,
    generator: torch.Generator | None = None,
    advance: Callable[[int, int], None] = lambda tokens, work: None,
) -> list[Generation]:
    """Generate a response to every prompt of one batch by speculative decoding.

    Args:
        target: the target model.
        draft: the draft model.
        prompts: token ids, at least one each.
        heads: drafted tokens per chain, K.
        temperature: of target and draft; 0 is greedy decoding.
        greedy_draft: draft the argmax of q even above temperature 0.
        max_new_tokens: longest response.
        block: tokens per row and target step, at most K + 1; None chooses by device.
        prefills: where the target's states of these prompts may already be.
        generator: source of all randomness, on the target's device.
        advance: called with the tokens a step produced, and with them plus those that responses
            it ended will not need: a whole batch adds up to prompts * max_new_tokens.
    """
    device = target.device
    width = min(block or (2 if device.type == "cpu" else heads + 1), heads + 1)
    eos = torch.tensor(sorted(target.eos_ids), dtype=torch.long, device=device)
    results = [
        Generation([], 0, 0, *(np.zeros(heads) for _ in range(4))) for _ in range(len(prompts))
    ]

    prefill = (prefills or Prefills(target, draft.capture_layers, limit=0)).of(prompts)
    cache, mask, features = prefill.cache(), prefill.mask, prefill.features_of(draft.capture_layers)
    last = choose(prefill.logits, temperature, False, generator)
    draft.start(len(prompts), mask.shape[1] + max_new_tokens + 2 * heads + 2)
    following = torch.cat([prefill.ids[:, 1:], last[:, None]], 1)
    draft.observe(following, features, prefill.positions, mask)
    chains = _Chains.begin(last, draft.propose(heads, temperature, greedy_draft, generator))

    rows = torch.arange(len(prompts), device=device)  # prompt of every row of the batch
    lengths = mask.sum(1)  # position of the next token to run the target on
    slots = torch.arange(width, device=device)
    done = _append(results, rows, last[:, None], torch.ones_like(last), eos, max_new_tokens)
    total = 0
    while True:
        produced = sum(len(result.tokens) for result in results) - total
        total += produced
        spared = sum(max_new_tokens - len(results[row].tokens) for row in rows[done].tolist())
        advance(produced, produced + spared)
        if done.all():
            return results
        if done.any() or mask.shape[1] > 2 * int(lengths.max()):
            keep = (~done).nonzero().squeeze(1)
            mask = _compact(cache, mask, keep)
            draft.keep_rows(keep)
            rows, lengths, chains = rows[keep], lengths[keep], chains.keep_rows(keep)

        # The target reads chain tokens offset … offset + width - 1 and so judges the drafted
        # tokens one further on; what lies beyond the chain's end is filler that is never valid.
        heads_here = chains.offset[:, None] + slots
        at = heads_here.clamp(max=heads - 1)
        inputs = chains.tokens.gather(1, heads_here.clamp(max=heads))
        positions = lengths[:, None] + slots
        mask = torch.cat([mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
        output = target.forward(inputs, mask, positions, cache, draft.capture_layers)
        index = chains.index.gather(1, at)
        count = (heads - chains.offset).clamp(max=width)
        verified, alpha, coverage = _verify(
            target.logits(output.hidden),
            index,
            chains.logits[torch.arange(len(rows), device=device)[:, None], at],
            count,
            draft.draft_ids,
            temperature,
            greedy_draft,
            generator,
        )
        accepted = verified.accepted
        ended = accepted < width
        valid = slots <= accepted[:, None]
        mask[:, -width:] = valid
        new = chains.tokens.gather(1, (heads_here + 1).clamp(max=heads))
        new = torch.where(slots == accepted[:, None], verified.next_token[:, None], new)
        draft.observe(new, output.features, positions, valid)
        gained = valid.sum(1)
        lengths = lengths + gained
        complete = _append(results, rows, new, gained, eos, max_new_tokens)
        over = _record(
            results, rows, new, chains.offset, count, accepted, ended, eos, alpha, coverage
        )
        # A response cut off by its length still has its last chain judged to the end.
        done = complete & (ended | over)
        fresh = draft.propose(heads, temperature, greedy_draft, generator)
        chains = chains.advance(width, ended, _Chains.begin(verified.next_token, fresh))


def _verify(
    logits: torch.Tensor,
    drafted: torch.Tensor,
    draft_logits: torch.Tensor,
    count: torch.Tensor,
    ids: torch.Tensor | None,
    temperature: float,
    greedy_draft: bool,
    generator: torch.Generator | None,
) -> tuple[Verification, torch.Tensor, torch.Tensor]:
    """Verification of one block, and the exact α and coverage [B, n] of its drafted positions."""
    if temperature == 0:
        best = logits.argmax(-1)
        tokens = drafted if ids is None else ids[drafted]
        alpha = (tokens == best).float()
        covered = torch.ones_like(alpha) if ids is None else torch.isin(best, ids).float()
        return verify_greedy(tokens, count, best), alpha, covered
    p = distribution(logits, temperature)
    p_draft = p if ids is None else p[..., ids]
    coverage = p_draft.sum(-1)
    if greedy_draft:
        alpha = p_draft.gather(2, drafted[..., None]).squeeze(2)
        q = None
    else:
        q = distribution(draft_logits, temperature)
        alpha = torch.minimum(p_draft, q).sum(-1)
    verified = verify(drafted, count, p, q, draft_ids=ids, generator=generator)
    return verified, alpha, coverage


def _record(
    results: list[Generation],
    rows: torch.Tensor,
    new: torch.Tensor,
    offset: torch.Tensor,
    count: torch.Tensor,
    accepted: torch.Tensor,
    ended: torch.Tensor,
    eos: torch.Tensor,
    alpha: torch.Tensor,
    coverage: torch.Tensor,
) -> torch.Tensor:
    """Add one step to the acceptance records; [B] bool, where an accepted token ends the response.

    A chain enters ``drafted`` when it ends: with all its K tokens, or with those up to an
    accepted end of sequence.
    """
    slot = torch.arange(alpha.shape[1], device=alpha.device)
    hit = slot < accepted[:, None]
    stop = (hit & torch.isin(new, eos)).long()
    counted = (stop.cumsum(1) - stop) == 0
    over = stop.any(1)
    reached = (slot <= accepted[:, None]) & (slot < count[:, None]) & counted
    hit = hit & counted
    heads = len(results[0].reached)
    drafted = torch.where(over, offset + hit.sum(1), torch.where(ended, heads, 0))
    columns = (offset, drafted, reached, hit, alpha.double(), coverage.double())
    for row, first, total, r, h, a, c in zip(
        rows.tolist(), *(column.cpu().numpy() for column in columns), strict=True
    ):
        result = results[row]
        result.drafted += int(total)
        result.accepted += int(h.sum())
        here = slice(first, first + int(r.sum()))
        result.reached[here] += 1
        result.accepted_at[here] += h[r]
        result.alpha[here] += a[r]
        result.coverage[here] += c[r]
    return over


def _append(
    results: list[Generation],
    rows: torch.Tensor,
    new: torch.Tensor,
    gained: torch.Tensor,
    eos: torch.Tensor,
    max_new_tokens: int,
) -> torch.Tensor:
    """Extend the responses by the first ``gained`` new tokens; [B] bool, which are complete."""
    ends = set(eos.tolist())
    done = []
    for row, candidates, count in zip(rows.tolist(), new.tolist(), gained.tolist(), strict=True):
        tokens = results[row].tokens
        for token in candidates[:count]:
            if len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
                tokens.append(token)
        done.append(tokens[-1] in ends or len(tokens) >= max_new_tokens)
    return torch.tensor(done, device=rows.device)


def _compact(cache: Any, mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Keep some rows of a DynamicCache and move their valid slots together, in order.

    Args:
        cache: extended in place.
        mask: [B, S] bool, valid slots.
        keep: [R] rows to keep.

    Returns:
        [R, n] mask of the compacted slots, n the largest number of valid slots in a row.
    """
    mask = mask[keep]
    width = int(mask.sum(1).max())
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name).transpose(1, 2)[keep[:, None], order]
            setattr(layer, name, states.transpose(1, 2))
    return mask.gather(1, order)
