"""How likely the target accepts what a draft proposes: the definition, exact and per position.

What is computed here is computed from the definitions, with p over the full vocabulary and never
renormalized. Nothing is shared with the training objective, because these figures are the check on
it.

A chain is looked at along a response that the target has sampled. At each of its positions there
are the distributions p and q given the response so far, and the token x that the response has
there. Two probabilities are asked for:

    alpha  that the drafted token is accepted, whichever it is;
    past   that the round of decoding gets past x, given that the response has x there.

With tokens sampled from q and verified one by one (Leviathan et al. 2023), alpha = sum min(p, q),
and past = q(x) min(1, p(x) / q(x)) / p(x) = min(1, q(x) / p(x)). With a greedy draft,
alpha = p(argmax q) and past = 1[x = argmax q].

Block verification (Sun et al. 2024) keeps a running weight w, 1 where a chain begins and
min(1, w p(x) / q(x)) after x. A chain that begins with given tokens is kept that long with
probability w, so that a token more is kept with sum min(w p, q) / w, and

    past = min(w p(x), q(x)) / (w p(x)) = min(1, q(x) / (w p(x))).

A further rule of drafting or of verification is a function here and its row in `RULES`; that
decoding knows it, too, is up to `specforge_lk.decode.speculate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from specforge_lk.decode.sampling import Shape, distribution, probabilities
from specforge_lk.serving import Drafting, Sampling, Serving, Verification


@dataclass(frozen=True)
class TargetRows:
    """Target distributions p of n positions, on the draft vocabulary, under one rule.

    Attributes:
        logits: [m, V_d] the target's logits of these positions and others.
        rows: [n] which of them are meant.
        shape: [n] what its sampling keeps of each row of the full vocabulary.
        sampling: how it samples.
        best: [n] draft index of its likeliest token; -1 where the draft vocabulary lacks it.
        token: [n] draft index of the token x that the response has; -1 where it lacks it.
        token_probability: [n] p(x).
    """

    logits: torch.Tensor
    rows: torch.Tensor
    shape: Shape
    sampling: Sampling
    best: torch.Tensor
    token: torch.Tensor
    token_probability: torch.Tensor

    def __getitem__(self, at: torch.Tensor) -> TargetRows:
        """Return the same of some of the positions."""
        shape = Shape(*(values[at] for values in self.shape))
        vectors = (self.best[at], self.token[at], self.token_probability[at])
        return TargetRows(self.logits, self.rows[at], shape, self.sampling, *vectors)

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """Return p [n] of one draft index each."""
        if self.sampling.temperature == 0:
            return (index == self.best).to(self.logits.dtype)
        logits = self.logits[self.rows, index]
        return probabilities(logits[:, None], self.shape, self.sampling).squeeze(1)

    def all(self) -> torch.Tensor:
        """Return p [n, V_d] above temperature 0."""
        return probabilities(self.logits[self.rows], self.shape, self.sampling)

    @property
    def coverage(self) -> torch.Tensor:
        """[n] the probability of the draft vocabulary."""
        if self.sampling.temperature == 0:
            return (self.best >= 0).to(self.logits.dtype)
        return self.all().sum(-1)


class Accepted(NamedTuple):
    """What is asked for at n positions of chains, [n] each; see the module.

    Attributes:
        alpha: that the drafted token is accepted.
        past: that the round gets past the response's token.
        weight: w of block verification after that token.
    """

    alpha: torch.Tensor
    past: torch.Tensor
    weight: torch.Tensor


#: From p, the draft's logits [n, V_d], how the draft samples and w [n] before these positions.
Rule = Callable[[TargetRows, torch.Tensor, Sampling, torch.Tensor], Accepted]


def likeliest_token(
    p: TargetRows, logits: torch.Tensor, sampling: Sampling, weight: torch.Tensor
) -> Accepted:
    """Return what is asked for where the draft takes its likeliest token: q is one-hot."""
    drafted = logits.argmax(-1)
    return Accepted(p.of(drafted), (drafted == p.token).to(logits.dtype), weight)


def token_by_token(
    p: TargetRows, logits: torch.Tensor, sampling: Sampling, weight: torch.Tensor
) -> Accepted:
    """Return what is asked for where tokens are sampled from q and verified one by one."""
    q = distribution(logits, sampling)
    return Accepted(torch.minimum(p.all(), q).sum(-1), _past(p, q), weight)


def block(
    p: TargetRows, logits: torch.Tensor, sampling: Sampling, weight: torch.Tensor
) -> Accepted:
    """Return what is asked for where tokens are sampled from q and chains verified as a whole."""
    q = distribution(logits, sampling)
    alpha = torch.minimum(weight[:, None] * p.all(), q).sum(-1) / weight
    ratio = p.token_probability / _of_token(p, q)
    # Behind a token that q never proposes no round comes: its weight does not matter.
    following = torch.where(p.token >= 0, weight * ratio, weight).nan_to_num(nan=1.0)
    tiny = torch.finfo(q.dtype).tiny
    return Accepted(alpha, _past(p, q, weight), following.clamp(min=tiny, max=1))


def _of_token(p: TargetRows, q: torch.Tensor) -> torch.Tensor:
    """Return q(x) [n]; 0 where the draft vocabulary lacks x."""
    of_token = q.gather(1, p.token.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(p.token >= 0, of_token, 0.0)


def _past(p: TargetRows, q: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return min(1, q(x) / (w p(x))) [n]; a token of p(x) = 0 is none that the rule gives."""
    of_token = _of_token(p, q)
    return (of_token / (weight * p.token_probability)).clamp(max=1).nan_to_num(nan=0.0)


#: The rules, by how the draft chooses its tokens and how they are verified.
RULES: Mapping[tuple[Drafting, Verification], Rule] = MappingProxyType(
    {
        (Drafting.GREEDY, Verification.TOKEN): likeliest_token,
        (Drafting.PROBABILISTIC, Verification.TOKEN): token_by_token,
        (Drafting.PROBABILISTIC, Verification.BLOCK): block,
    }
)


def rule_of(serving: Serving) -> Rule:
    """Return the function of a serving rule."""
    return RULES[serving.drafting, serving.verification]


__all__ = ["RULES", "Accepted", "Rule", "TargetRows", "rule_of"]
