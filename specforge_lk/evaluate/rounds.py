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
from specforge_lk.evaluate.intervals import bounds, pooled, resampled

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
    def ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By field of a `Result`, numerator and denominator of every conversation: [C'] or [C', K].

        A figure is the ratio of their sums, so that one bootstrap over conversations serves all.
        """
        expected, ones = self.expected, np.ones(len(self.length))
        whole = self.whole.astype(float)
        starts = np.ones(len(whole))

        def of_starts(values: np.ndarray) -> np.ndarray:
            """Sum values of chain starts [N, ...] over those of each response."""
            ends = np.concatenate([[0], self.tokens.cumsum()])
            total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(0)])
            return total[ends[1:]] - total[ends[:-1]]

        alpha = whole[:, None] * self.alpha
        parts = {
            "tau_rounds": (self.tokens, expected.rounds),
            "tokens_per_forward": (self.length, expected.rounds + ones),
            "tau_start": (of_starts(whole * self.per_start), of_starts(whole)),
            "alpha_per_head": (of_starts(alpha), of_starts(np.ones_like(alpha) * whole[:, None])),
            "acceptance_per_head": (expected.accepted, expected.reached),
            "survival_per_head": (
                expected.accepted,
                np.repeat(expected.rounds[:, None], self.alpha.shape[1], axis=1),
            ),
            "coverage": (of_starts(self.coverage.astype(np.float64)), of_starts(starts)),
        }
        return {
            name: (self._per_conversation(top), self._per_conversation(bottom))
            for name, (top, bottom) in parts.items()
        }

    @property
    def tau(self) -> float:
        """Σ tokens / Σ R; NaN where no response needs a round."""
        return float(pooled(*self.ratios["tau_rounds"]))

    @property
    def size(self) -> dict[str, int]:
        """How much was measured, as fields of a `Result` or `Paired`."""
        return {
            "conversations": len(np.unique(self.conversation)),
            "responses": len(self.length),
            "chain_starts": len(self.alpha),
        }

    def figures(self, seed: int) -> dict[str, Any]:
        """Return the fields of a `Result` that are measured, intervals in ``<name>_ci``."""
        found: dict[str, Any] = {
            "rounds": float(self.expected.rounds.sum()),
            "generated_tokens": int(self.length.sum()),
            "off_rule_tokens": int(self.off_rule.sum()),
            **self.size,
        }
        for name, of in self.ratios.items():
            figure, drawn = pooled(*of), resampled(*of, seed)
            if figure.ndim:
                found[name] = [_number(value) for value in figure]
                found[f"{name}_ci"] = [bounds(values) for values in drawn.T]
            else:
                found[name], found[f"{name}_ci"] = _number(figure), bounds(drawn)
        return found

    def _per_conversation(self, values: np.ndarray) -> np.ndarray:
        """Sum values of responses [C, ...] over those of each conversation."""
        conversations, owner = np.unique(self.conversation, return_inverse=True)
        total = np.zeros((len(conversations), *values.shape[1:]))
        np.add.at(total, owner, values)
        return total

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


@dataclass(frozen=True)
class Difference:
    """A figure of one draft minus that of another.

    Attributes:
        value: per draft position, or one; None where one of the two has none.
        ci: its 95 % intervals.
    """

    value: list[float | None]
    ci: list[list[float] | None]


def paired_differences(a: Rounds, b: Rounds, seed: int = 0) -> dict[str, Difference]:
    """Return a's figures minus b's along the same responses, with intervals.

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
    found = {}
    for name, of_a in a.ratios.items():
        of_b = b.ratios[name]
        figure = np.atleast_1d(pooled(*of_a) - pooled(*of_b))
        drawn = resampled(*of_a, seed) - resampled(*of_b, seed)
        drawn = drawn.reshape(len(drawn), -1)
        found[name] = Difference(
            [_number(value) for value in figure], [bounds(values) for values in drawn.T]
        )
    return found


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


__all__ = ["Difference", "Expected", "Rounds", "paired_differences"]
