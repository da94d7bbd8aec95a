"""How likely the target accepts what a draft proposes: the definition, exact and per position.

The acceptance rates here are computed from the definition α = Σ_{x∈D} min(p(x), q(x)), with p over
the full vocabulary and never renormalized. Nothing is shared with the training objective, because
these figures are the check on it.

A further rule of drafting or of verification is a function here, its name in `DraftSampling` and
its row in `ACCEPTANCE`. The row also says how benchmarks are decoded. A rule that
`specforge_lk.decode.speculate` cannot decode is measured on held-out responses only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from specforge_lk.decode.sampling import distribution
from specforge_lk.evaluate.settings import DraftSampling

#: From the target distribution p on the draft vocabulary [n, V_d], the draft's logits [n, V_d] and
#: the temperature, above 0, to the probability [n] that the drafted token is accepted.
Probability = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A way to draft above temperature 0.

    Attributes:
        probability: of the acceptance of a drafted token.
        greedy_draft: whether `speculate` drafts greedily; None where it cannot decode by this rule.
    """

    probability: Probability
    greedy_draft: bool | None


def of_sampled_token(p: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """α = Σ min(p, q), where the token is sampled from q and verified by rejection sampling."""
    return torch.minimum(p, distribution(logits, temperature)).sum(-1)


def of_likeliest_token(p: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """α = p(argmax q), where the draft takes its likeliest token: q is one-hot."""
    return p.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)


#: The rules, by how the draft chooses its token.
ACCEPTANCE: Mapping[DraftSampling, Rule] = MappingProxyType(
    {
        DraftSampling.PROBABILISTIC: Rule(of_sampled_token, greedy_draft=False),
        DraftSampling.GREEDY: Rule(of_likeliest_token, greedy_draft=True),
    }
)


def at_temperature_0(
    best: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return α and coverage of greedy decoding: whether the likeliest tokens are the same.

    Args:
        best: [n] the target's likeliest tokens.
        logits: [n, V_d] the draft's logits.
        ids: [V_d] target id of every draft index; None when V_d = V.

    Returns:
        [n] bool each: the draft's likeliest token is the target's; the draft vocabulary has it.
    """
    drafted = logits.argmax(-1)
    if ids is None:
        return drafted == best, torch.ones_like(best)
    return ids[drafted] == best, torch.isin(best, ids)


__all__ = [
    "ACCEPTANCE",
    "Probability",
    "Rule",
    "at_temperature_0",
    "of_likeliest_token",
    "of_sampled_token",
]
