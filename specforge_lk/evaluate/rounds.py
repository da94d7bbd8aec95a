"""Rounds of decoding along recorded responses: exact τ, survival and intervals.

A response is n tokens that the target sampled. The first comes from the prefill; then rounds of
speculative decoding follow, each a chain of K drafted tokens and one verification step. A round
that begins with t tokens known gets past the next j of them with probability a_0 … a_{j-1} (`past`
of `specforge_lk.evaluate.acceptance`), and the target itself gives the token after these. So

    R(t) = 1 + sum_{j=0}^{K} (prod_{i<j} a_i) (1 - a_j) R(t + j + 1),  R(t) = 0 for t >= n,

with a_K = 0, is the expected number of rounds from there. It has no noise of its own: what varies
is which responses were sampled. Pooled over responses,

    τ = sum (n - 1) / sum R(1).

Rounds begin where the last one failed, so that a mean over all chain starts is something else:
1 + mean sum_j (prod_{i<j} a_i) alpha_j is what a round yields that begins at a start drawn evenly.

The end of a response counts as in decoding: a round in which it ends is one round, and tokens that
would follow the end are none. Engines count rounds in the same way; vLLM also counts as accepted
the drafted tokens behind an end that the round had already passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.intervals import bootstrap_ratio, percentiles, resamples

#: Responses that the recursion takes at once.
RESPONSES = 256


@dataclass(frozen=True)
class Rounds(Arrays):
    """One draft under one rule along responses: what a round meets wherever it may begin.

    Chain starts are ordered by response, then by the number of tokens known, 1 to n - 1.

    Attributes:
        conversation: [C] row of the responses' conversations.
        length: [C] n, tokens of each response.
        alpha: [N, K] acceptance probability of each draft position; 0 behind the response's end.
        past: [N, K] probability to get past the response's token; 0 behind its end.
        coverage: [N] the target's probability of the draft vocabulary, of the token after those
            known.
        off_rule: [N] bool, whether that token has no probability under the rule.
    """

    conversation: np.ndarray
    length: np.ndarray
    alpha: np.ndarray
    past: np.ndarray
    coverage: np.ndarray
    off_rule: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[C] tokens that rounds give: all but the first, which comes from the prefill."""
        return np.maximum(self.length - 1, 0)

    @property
    def whole(self) -> np.ndarray:
        """[N] bool, chain starts that K more tokens follow."""
        left = np.concatenate([np.arange(n, 0, -1) for n in self.tokens])
        return left >= self.alpha.shape[1]

    @cached_property
    def expected(self) -> Expected:
        """What decoding the responses would count."""
        parts = [_expected(*part) for part in self._padded()]
        return Expected(self.tokens, *(np.concatenate(of) for of in zip(*parts, strict=True)))

    @property
    def per_start(self) -> np.ndarray:
        """[N] expected tokens of a round that begins at each start: see the module."""
        survival = np.cumprod(self.past.astype(np.float64), axis=1)
        before = np.concatenate([np.ones_like(survival[:, :1]), survival[:, :-1]], axis=1)
        return 1 + (before * self.alpha).sum(1)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and rounds of every conversation, which is what a bootstrap draws."""
        return self._per_conversation(self.tokens), self._per_conversation(self.expected.rounds)

    @property
    def tau(self) -> float:
        """Σ tokens / Σ R."""
        tokens, rounds = self.sums
        return float(tokens.sum() / rounds.sum()) if rounds.sum() else float("nan")

    @property
    def size(self) -> dict[str, int]:
        """How much was measured, as fields of a `Result` or `Paired`."""
        return {
            "conversations": len(np.unique(self.conversation)),
            "responses": len(self.length),
            "chain_starts": len(self.alpha),
        }

    def figures(self, seed: int) -> dict[str, Any]:
        """Return the fields of a `Result` that are measured."""
        expected, whole = self.expected, self.whole
        reached = expected.reached.sum(0)
        with np.errstate(invalid="ignore"):
            acceptance = expected.accepted.sum(0) / reached
        rounds = float(expected.rounds.sum())
        start = self.per_start[whole]
        return {
            "tau_rounds": self.tau,
            "tau_rounds_ci": bootstrap_ratio(*self.sums, seed),
            "tau_start": float(start.mean()) if len(start) else None,
            "tau_start_ci": self._start_interval(start, whole, seed),
            "alpha_per_head": _figures(_mean(self.alpha[whole])),
            "acceptance_per_head": _figures(acceptance),
            "survival_per_head": _figures(expected.accepted.sum(0) / rounds),
            "rounds": rounds,
            "tokens_per_forward": float(self.length.sum() / (rounds + len(self.length))),
            "coverage": float(self.coverage.mean()),
            "generated_tokens": int(self.length.sum()),
            "off_rule_tokens": int(self.off_rule.sum()),
            **self.size,
        }

    def _start_interval(
        self, start: np.ndarray, whole: np.ndarray, seed: int
    ) -> list[float] | None:
        owner = np.repeat(np.arange(len(self.length)), self.tokens)[whole]
        if not len(start):
            return None
        value, count = (
            self._per_conversation(np.bincount(owner, of, minlength=len(self.length)))
            for of in (start, np.ones_like(start))
        )
        return bootstrap_ratio(value, count, seed)

    def _per_conversation(self, values: np.ndarray) -> np.ndarray:
        """Sum values of responses [C] over those of each conversation."""
        _, owner = np.unique(self.conversation, return_inverse=True)
        return np.bincount(owner, weights=values)

    def _padded(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield tokens [c], alpha and past [c, longest, K] of some responses after the others."""
        ends = self.tokens.cumsum()
        for first in range(0, len(ends), RESPONSES):
            tokens = self.tokens[first : first + RESPONSES]
            longest = int(tokens.max())
            inside = np.arange(longest) < tokens[:, None]
            here = slice(ends[first] - tokens[0], ends[first + len(tokens) - 1])
            alpha, past = np.zeros((2, *inside.shape, self.alpha.shape[1]))
            alpha[inside], past[inside] = self.alpha[here], self.past[here]
            yield tokens, alpha, past


@dataclass(frozen=True)
class Expected:
    """Expected counts of decoding each response.

    Attributes:
        tokens: [C] tokens given by rounds.
        rounds: [C] R(1); 0 where no round is needed.
        reached: [C, K] rounds in which a draft position was reached.
        accepted: [C, K] rounds in which it was accepted.
    """

    tokens: np.ndarray
    rounds: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray


def _expected(
    tokens: np.ndarray, alpha: np.ndarray, past: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return R(1) [c], and how often each draft position is reached and accepted [c, K].

    Args:
        tokens: [c] tokens that rounds give.
        alpha: [c, longest, K], of rounds that begin with 1, 2, … tokens known.
        past: [c, longest, K].
    """
    count, longest, heads = past.shape
    survival = np.cumprod(past, axis=2)
    before = np.concatenate([np.ones((count, longest, 1)), survival[..., :-1]], axis=2)
    # How a round ends: past exactly j tokens, the last case being the whole chain.
    ends = np.concatenate([before - survival, survival[..., -1:]], axis=2)
    position = np.arange(longest)
    inside = position < tokens[:, None]
    # Forward: how many rounds begin at each place. Every response has at most one there.
    begins = np.zeros((count, longest + heads + 1))
    begins[:, 0] = tokens > 0
    for start in range(longest):
        begins[:, start + 1 : start + heads + 2] += begins[:, start, None] * ends[:, start]
    begins = begins[:, :longest] * inside
    exists = position[:, None] + np.arange(heads) < tokens[:, None, None]
    reached = np.einsum("cs,csk->ck", begins, before * exists)
    accepted = np.einsum("cs,csk->ck", begins, before * alpha * exists)
    return begins.sum(1), reached, accepted


def paired_difference(a: Rounds, b: Rounds, seed: int = 0) -> tuple[float, list[float]]:
    """Return τ_a - τ_b over the same responses, and its 95 % interval.

    The bootstrap resamples conversations, the same ones for both: what makes one easy for both does
    not widen the interval.

    Raises:
        ValueError: the two were not measured along the same responses.
    """
    if not (np.array_equal(a.conversation, b.conversation) and np.array_equal(a.length, b.length)):
        raise ValueError(
            "the two drafts were measured along different responses; evaluate both with the same "
            "files, --serving and --max-length"
        )
    weights = resamples(len(a.sums[0]), seed)
    with np.errstate(invalid="ignore"):
        first, second = ((weights @ of.sums[0]) / (weights @ of.sums[1]) for of in (a, b))
    differences = first - second
    return a.tau - b.tau, percentiles(differences[~np.isnan(differences)])


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean [K] of rows [n, K]; NaN without any."""
    return values.mean(0) if len(values) else np.full(values.shape[1], np.nan)


def _figures(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


__all__ = ["Expected", "Rounds", "paired_difference"]
