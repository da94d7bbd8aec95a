"""Speculative generation with a Hugging Face target, batched over prompts of any length.

Rows accept different numbers of tokens, but a transformers cache is rectangular. So every forward
pass of the target appends the same number of slots to every row, and the rejected ones are masked
out for good: a 2D attention mask with holes and explicit position ids keep the target's attention
exact, and the cache needs no per-row surgery. Now and then the holes, and the rows that have
finished, are compacted away.

A verification step judges one chain of K drafted tokens. It may take several forward passes of
``block`` tokens, each row going on with its chain until it is rejected or complete. That changes
nothing in what is accepted, only how much the target computes in vain behind a rejection: on a
CPU, where passes cost by the token, short blocks are much faster; on a GPU one pass of K + 1 is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specforge_lk.decode.draft import Draft, Proposal
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.sampling import (
    Verdict,
    choose,
    distribution,
    verify,
    verify_block,
    verify_greedy,
)
from specforge_lk.decode.target import Target
from specforge_lk.serving import Serving, Verification


@dataclass
class Generation:
    """One prompt's response and its acceptance record.

    A draft position is reached in a verification step when all before it were accepted. Drafted
    tokens behind an accepted end-of-sequence token count neither as drafted nor as accepted: an
    engine has stopped there.

    Attributes:
        tokens: response, the end-of-sequence token included.
        rounds: verification steps that began before the response was complete.
        drafted: drafted tokens over all verification steps.
        accepted: accepted ones among them.
        reached: [K] steps in which each draft position was reached.
        accepted_at: [K] steps in which it was reached and accepted.
        alpha: [K] sum over the steps that reached it of the exact acceptance probability.
        coverage: [K] sum over these of the target's mass on the draft vocabulary.
    """

    tokens: list[int]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    reached: np.ndarray = field(default_factory=lambda: np.zeros(0))
    accepted_at: np.ndarray = field(default_factory=lambda: np.zeros(0))
    alpha: np.ndarray = field(default_factory=lambda: np.zeros(0))
    coverage: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass
class _Chains:
    """The drafted chain of every row, and how much of it has been verified.

    Attributes:
        tokens: [B, K + 1] the last known token and the K drafted ones, target vocabulary.
        index: [B, K] the drafted ones as draft indices.
        logits: [B, K, V_d] draft logits they were chosen from.
        offset: [B] drafted tokens accepted in earlier passes.
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
def speculate(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    *,
    heads: int,
    rule: Serving,
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
        rule: how target and draft sample, and what is accepted.
        max_new_tokens: longest response.
        block: tokens per row and forward pass, at most K + 1; None chooses by device. Block
            verification always has the whole chain in one.
        prefills: where the target's states of these prompts may already be.
        generator: source of all randomness, on the target's device.
        advance: called with the tokens a pass produced, and with them plus those that responses
            it ended will not need: a whole batch adds up to prompts * max_new_tokens.
    """
    device = target.device
    width = min(block or (2 if device.type == "cpu" else heads + 1), heads + 1)
    if rule.verification is Verification.BLOCK:
        width = heads + 1
    responses = _Responses(len(prompts), heads, target, max_new_tokens)

    prefill = (prefills or Prefills(target, draft.capture_layers, limit=0)).of(prompts)
    cache, mask, features = prefill.cache(), prefill.mask, prefill.features_of(draft.capture_layers)
    last = choose(prefill.logits, rule.target, generator)
    draft.start(len(prompts), mask.shape[1] + max_new_tokens + 2 * heads + 2)
    following = torch.cat([prefill.ids[:, 1:], last[:, None]], 1)
    draft.observe(following, features, prefill.positions, mask)
    chains = _Chains.begin(last, draft.propose(heads, rule.draft, generator))

    lengths = mask.sum(1)  # position of the next token to run the target on
    slots = torch.arange(width, device=device)
    done = responses.append(last[:, None], torch.ones_like(last))
    while True:
        advance(*responses.progress(done))
        if done.all():
            return responses.results
        if done.any() or mask.shape[1] > 2 * int(lengths.max()):
            keep = (~done).nonzero().squeeze(1)
            mask = _compact(cache, mask, keep)
            draft.keep_rows(keep)
            responses.keep_rows(keep)
            lengths, chains = lengths[keep], chains.keep_rows(keep)

        # The target reads chain tokens offset … offset + width - 1 and so judges the drafted
        # tokens one further on; what lies beyond the chain's end is filler that is never valid.
        reads = chains.offset[:, None] + slots
        inputs = chains.tokens.gather(1, reads.clamp(max=heads))
        positions = lengths[:, None] + slots
        mask = torch.cat([mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
        output = target.forward(inputs, mask, positions, cache, draft.capture_layers)
        logits = target.logits(output.hidden)
        judged = _judge(logits, chains, draft.draft_ids, rule, generator)
        accepted = judged.verified.accepted
        ended = accepted < width
        valid = slots <= accepted[:, None]
        mask[:, -width:] = valid
        new = chains.tokens.gather(1, (reads + 1).clamp(max=heads))
        new = torch.where(slots == accepted[:, None], judged.verified.next_token[:, None], new)
        draft.observe(new, output.features, positions, valid)
        gained = valid.sum(1)
        lengths = lengths + gained
        complete = responses.append(new, gained)
        over = responses.record(new, chains.offset, judged, ended)
        # A response cut off by its length still has its last chain judged to the end.
        done = complete & (ended | over)
        fresh = _Chains.begin(
            judged.verified.next_token, draft.propose(heads, rule.draft, generator)
        )
        chains = chains.advance(width, ended, fresh)


@dataclass(frozen=True)
class _Judged:
    """One forward pass of the target over n slots of every chain.

    Attributes:
        count: [B] drafted tokens among the slots.
        verified: how many of them are accepted, and the token after these.
        alpha: [B, n] exact acceptance probability of every drafted token.
        coverage: [B, n] the target's mass on the draft vocabulary.
    """

    count: torch.Tensor
    verified: Verdict
    alpha: torch.Tensor
    coverage: torch.Tensor


def _judge(
    logits: torch.Tensor,
    chains: _Chains,
    ids: torch.Tensor | None,
    rule: Serving,
    generator: torch.Generator | None,
) -> _Judged:
    """Verify the next slots of every chain.

    Args:
        logits: [B, n, V] the target's, after the tokens of these slots.
        chains: the chains.
        ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
        rule: how tokens are drawn and accepted.
        generator: source of all randomness.
    """
    batch, width, _ = logits.shape
    heads = chains.index.shape[1]
    slots = torch.arange(width, device=logits.device)
    at = (chains.offset[:, None] + slots).clamp(max=heads - 1)
    drafted = chains.index.gather(1, at)
    count = (heads - chains.offset).clamp(max=width)
    if rule.temperature == 0:
        best = logits.argmax(-1)
        tokens = drafted if ids is None else ids[drafted]
        alpha = (tokens == best).float()
        covered = torch.ones_like(alpha) if ids is None else torch.isin(best, ids).float()
        return _Judged(count, verify_greedy(tokens, count, best), alpha, covered)
    p = distribution(logits, rule.target)
    p_draft = p if ids is None else p[..., ids]
    coverage = p_draft.sum(-1)
    if rule.greedy_draft:
        alpha = p_draft.gather(2, drafted[..., None]).squeeze(2)
        verified = verify(drafted, count, p, None, draft_ids=ids, generator=generator)
        return _Judged(count, verified, alpha, coverage)
    rows = torch.arange(batch, device=logits.device)[:, None]
    q = distribution(chains.logits[rows, at], rule.draft)
    if rule.verification is Verification.TOKEN:
        alpha = torch.minimum(p_draft, q).sum(-1)
        verified = verify(drafted, count, p, q, draft_ids=ids, generator=generator)
        return _Judged(count, verified, alpha, coverage)
    verified, alpha = verify_block(drafted, p, q, draft_ids=ids, generator=generator)
    return _Judged(count, verified, alpha, coverage)


class _Responses:
    """The responses of a batch, and which of them its rows are.

    Args:
        count: number of prompts.
        heads: drafted tokens per chain, K.
        target: ends responses.
        max_new_tokens: longest response.
    """

    def __init__(self, count: int, heads: int, target: Target, max_new_tokens: int) -> None:
        self.results = [
            Generation([], 0, 0, 0, *(np.zeros(heads) for _ in range(4))) for _ in range(count)
        ]
        self._rows = list(range(count))
        self._heads = heads
        self._ends = target.eos_ids
        self._longest = max_new_tokens
        self._total = 0

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows of the batch only."""
        self._rows = [self._rows[row] for row in rows.tolist()]

    def progress(self, done: torch.Tensor) -> tuple[int, int]:
        """Return new tokens, and these plus those that the rows ``done`` [B] will not need."""
        produced = sum(len(result.tokens) for result in self.results) - self._total
        self._total += produced
        ended = [row for row, finished in zip(self._rows, done.tolist(), strict=True) if finished]
        spared = sum(self._longest - len(self.results[row].tokens) for row in ended)
        return produced, produced + spared

    def append(self, new: torch.Tensor, gained: torch.Tensor) -> torch.Tensor:
        """Extend the responses by the first ``gained`` new tokens; [B] bool, which are complete."""
        done = []
        for row, candidates, count in zip(self._rows, new.tolist(), gained.tolist(), strict=True):
            tokens = self.results[row].tokens
            for token in candidates[:count]:
                if len(tokens) < self._longest and not (tokens and tokens[-1] in self._ends):
                    tokens.append(token)
            done.append(tokens[-1] in self._ends or len(tokens) >= self._longest)
        return torch.tensor(done, device=new.device)

    def record(
        self, new: torch.Tensor, offset: torch.Tensor, judged: _Judged, ended: torch.Tensor
    ) -> torch.Tensor:
        """Add one pass to the acceptance records.

        A chain enters ``drafted`` when it ends: with all its K tokens, or with those up to an
        accepted end of sequence.

        Args:
            new: [B, n] tokens after the slots.
            offset: [B] drafted tokens accepted in earlier passes.
            judged: the pass.
            ended: [B] bool, whether the chain has ended.

        Returns:
            [B] bool, where an accepted token ends the response.
        """
        accepted, alpha = judged.verified.accepted, judged.alpha
        slot = torch.arange(alpha.shape[1], device=alpha.device)
        hit = slot < accepted[:, None]
        eos = torch.tensor(sorted(self._ends), dtype=torch.long, device=new.device)
        stop = (hit & torch.isin(new, eos)).long()
        counted = (stop.cumsum(1) - stop) == 0
        over = stop.any(1)
        reached = (slot <= accepted[:, None]) & (slot < judged.count[:, None]) & counted
        hit = hit & counted
        drafted = torch.where(over, offset + hit.sum(1), torch.where(ended, self._heads, 0))
        rounds = (ended | over).long()
        columns = (rounds, offset, drafted, reached, hit, alpha.double(), judged.coverage.double())
        for row, round_, first, total, r, h, a, c in zip(
            self._rows, *(column.cpu().numpy() for column in columns), strict=True
        ):
            result = self.results[row]
            result.rounds += int(round_)
            result.drafted += int(total)
            result.accepted += int(h.sum())
            here = slice(first, first + int(r.sum()))
            result.reached[here] += 1
            result.accepted_at[here] += h[r]
            result.alpha[here] += a[r]
            result.coverage[here] += c[r]
        return over


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
