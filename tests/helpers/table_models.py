"""Autoregressive models written down as tables, small enough to enumerate all of decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import torch

from specforge_lk.decode.sampling import distribution
from specforge_lk.serving import Serving, Verification

Prefix = tuple[int, ...]


class TableTarget:
    """Logits of every prefix of tokens; token 0 ends a response.

    It has what `specforge_lk.evaluate.teacher_forced` asks of a `Target`: a hidden state is the
    number of the prefix, and logits are looked up by it.
    """

    device = torch.device("cpu")

    def __init__(self, vocab: int, longest: int, seed: int) -> None:
        self.vocab_size, self.longest = vocab, longest
        generator = torch.Generator().manual_seed(seed)
        prefixes = [
            p for n in range(longest + 1) for p in itertools.product(range(vocab), repeat=n)
        ]
        self.number = {prefix: i for i, prefix in enumerate(prefixes)}
        self.table = 1.5 * torch.randn(
            len(prefixes), vocab, generator=generator, dtype=torch.float64
        )
        self.table[:, 0] -= 1  # few responses are short

    def forward(self, tokens, mask, layers=()):
        hidden = torch.zeros(*tokens.shape, 1, dtype=torch.long)
        for row, sequence in enumerate(tokens.tolist()):
            for end in range(len(sequence)):
                hidden[row, end, 0] = self.number.get(tuple(sequence[1 : end + 1]), 0)
        return SimpleNamespace(hidden=hidden, features=hidden.double())

    def logits(self, hidden):
        return self.table[hidden[..., 0]]

    def complete(self, response: Prefix) -> bool:
        return len(response) == self.longest or (bool(response) and response[-1] == 0)

    def p(self, response: Prefix, rule: Serving) -> list[float]:
        return distribution(self.table[self.number[response]], rule.target).tolist()

    def responses(self, rule: Serving, response: Prefix = ()) -> Iterator[tuple[Prefix, float]]:
        """Yield every complete response with its probability."""
        if self.complete(response):
            yield response, 1.0
            return
        for token, p in enumerate(self.p(response, rule)):
            if p > 0:
                for longer, rest in self.responses(rule, (*response, token)):
                    yield longer, p * rest


class TableDraft:
    """Logits of every chain of tokens behind every prefix, on some of the target's tokens."""

    capture_layers = (0,)

    def __init__(self, target: TableTarget, ids: list[int] | None, heads: int, seed: int) -> None:
        self.target, self.heads = target, heads
        self.draft_ids = None if ids is None else torch.tensor(ids)
        self.ids = list(range(target.vocab_size)) if ids is None else ids
        self._seed, self._rows = seed, {}

    def row(self, known: Prefix, drafted: Prefix) -> torch.Tensor:
        """Logits [V_d]: those of the target, if known, and noise that grows along the chain."""
        key = known, drafted
        if key not in self._rows:
            generator = torch.Generator().manual_seed(
                hash((self._seed, *known, -1, *drafted)) % 2**31
            )
            noise = torch.randn(len(self.ids), generator=generator, dtype=torch.float64)
            row = self.target.number.get((*known, *drafted), 0)
            self._rows[key] = self.target.table[row, self.ids] + (1 + len(drafted)) * noise
        return self._rows[key]

    def teacher_forced(self, tokens, features, starts, heads):
        for head in range(heads):
            yield torch.stack(
                [
                    self.row(
                        tuple(tokens[b, 1 : t + 2].tolist()),
                        tuple(tokens[b, t + 2 : t + 2 + head].tolist()),
                    )
                    for b, t in starts.nonzero().tolist()
                ]
            )


class Enumeration:
    """All of decoding a target with a draft under a rule, from the definition of its sampling."""

    def __init__(self, target: TableTarget, draft: TableDraft, rule: Serving) -> None:
        self.target, self.draft, self.rule = target, draft, rule
        self._counts: dict[Prefix, np.ndarray] = {}

    def q(self, known: Prefix, drafted: Prefix) -> list[float]:
        """Return the distribution that the next token is drafted from, on the whole vocabulary."""
        q = [0.0] * self.target.vocab_size
        row = distribution(self.draft.row(known, drafted), self.rule.draft)
        for token, value in zip(self.draft.ids, row.tolist(), strict=True):
            q[token] = value
        return q

    def p(self, response: Prefix) -> list[float]:
        """Return the target's distribution; anything at all behind a response's end."""
        if response not in self.target.number:
            return self.target.p((), self.rule)
        return self.target.p(response, self.rule)

    def chains(self, known: Prefix, drafted: Prefix = ()) -> Iterator[tuple[Prefix, float]]:
        if len(drafted) == self.draft.heads:
            yield drafted, 1.0
            return
        for token, q in enumerate(self.q(known, drafted)):
            if q > 0:
                for chain, rest in self.chains(known, (*drafted, token)):
                    yield chain, q * rest

    def outcomes(self, known: Prefix, chain: Prefix) -> Iterator[tuple[int, float, list[float]]]:
        """Yield how many of a chain are accepted, how likely, and the weights of the next token."""
        of_target = [self.p((*known, *chain[:i])) for i in range(len(chain) + 1)]
        of_draft = [self.q(known, chain[:i]) for i in range(len(chain))]
        if self.rule.verification is Verification.BLOCK:
            yield from _block_outcomes(of_target, of_draft, chain)
            return
        reached = 1.0
        for i, token in enumerate(chain):
            p, q = of_target[i], of_draft[i]
            accept = min(1.0, p[token] / q[token])
            if accept < 1:
                yield i, reached * (1 - accept), _positive(p, q, 1.0)
            reached *= accept
        if reached > 0:
            yield len(chain), reached, of_target[-1]

    def counts(self, known: Prefix) -> np.ndarray:
        """Return [1 + K]: expected rounds until the response is complete, and tokens accepted in
        each draft position, those behind an end not counted."""
        if self.target.complete(known):
            return np.zeros(1 + self.draft.heads)
        if known not in self._counts:
            total = np.zeros(1 + self.draft.heads)
            total[0] = 1
            for chain, q in self.chains(known):
                for accepted, chance, weights in self.outcomes(known, chain):
                    response = known
                    for position, token in enumerate(chain[:accepted]):
                        if not self.target.complete(response):
                            response = (*response, token)
                            total[1 + position] += q * chance
                    if self.target.complete(response) or q * chance == 0:
                        continue
                    for token, weight in enumerate(weights):
                        if weight > 0:
                            share = q * chance * weight / sum(weights)
                            total += share * self.counts((*response, token))
            self._counts[known] = total
        return self._counts[known]

    @cached_property
    def expected(self) -> np.ndarray:
        """`counts` of a response, whatever its first token."""
        first = enumerate(self.target.p((), self.rule))
        return sum(p * self.counts((token,)) for token, p in first if p > 0)

    @cached_property
    def tau(self) -> float:
        """Expected tokens over expected rounds, both behind the first token."""
        responses = self.target.responses(self.rule)
        return sum(p * (len(response) - 1) for response, p in responses) / self.expected[0]

    def yielded(self, known: Prefix) -> float:
        """Return the expected tokens of a round, those behind an end included."""
        return sum(
            q * chance * (accepted + 1)
            for chain, q in self.chains(known)
            for accepted, chance, _ in self.outcomes(known, chain)
        )


def _positive(p: list[float], q: list[float], weight: float) -> list[float]:
    return [max(weight * a - b, 0.0) for a, b in zip(p, q, strict=True)]


def _block_outcomes(
    of_target: list[list[float]], of_draft: list[list[float]], chain: Prefix
) -> Iterator[tuple[int, float, list[float]]]:
    """Sun et al. 2024, Algorithm 2: the last position whose own test succeeds."""
    weights = [1.0]
    for p, q, token in zip(of_target, of_draft, chain, strict=False):
        weights.append(min(1.0, weights[-1] * p[token] / q[token]))
    chances = []
    for i, weight in enumerate(weights[:-1]):
        left = sum(_positive(of_target[i], of_draft[i], weight))
        chances.append(left / (left + 1 - weight) if left else 0.0)
    chances.append(weights[-1])
    rest = 1.0  # that no later test has succeeded
    for i in range(len(chain), -1, -1):
        chance = rest * (chances[i] if i else 1.0)
        last = i == len(chain)
        yield i, chance, of_target[i] if last else _positive(of_target[i], of_draft[i], weights[i])
        rest -= chance
