"""The serving rule in a loss: the target and the draft as they will be sampled from.

The target under a rule comes from its full vocabulary (`ServingRule.shape_target`); the draft is
softmax(z / draft temperature), with what its own top-k and top-p cut off at probability 0. Both cut
as `specforge_lk.decode.sampling` does.
A greedy draft is another matter, see `specforge_lk.losses.greedy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch

from specforge_lk.decode.sampling import shape
from specforge_lk.losses.options import ServingOptions
from specforge_lk.serving import Sampling

#: One over the scale of the noise that a greedy draft is trained with, unless it is given. A token
#: that is g nats behind the likeliest one is drafted exp(-s g) times as often. Training can move
#: what is drafted only where that is not 0, and raises the rule's acceptance only where it is.
SHARPNESS: Final = 8.0


@dataclass(frozen=True)
class ServingRule:
    """How target and draft are sampled from.

    Attributes:
        target: what the target samples from.
        draft: what the draft samples from; temperature 1 with greedy drafting.
        sharpness: of a greedy draft, one over the scale of the noise that it is trained with;
            None if drafting is not greedy.
    """

    target: Sampling
    draft: Sampling
    sharpness: float | None

    @classmethod
    def of(cls, options: ServingOptions) -> Self:
        """Return the rule that a loss's options name."""
        rule = options.rule
        if not rule.greedy_draft:
            return cls(rule.target, rule.draft, None)
        sharpness = SHARPNESS if options.sharpness is None else options.sharpness
        return cls(rule.target, Sampling(), sharpness)

    @torch.no_grad()
    def shape_target(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the target's logits under the rule, [..., V] in float32, -inf where it is cut off.

        Args:
            logits: [..., V] of the full vocabulary.
        """
        logits = exact(logits)
        if self.target.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
        # Counted from the greatest one first: a low temperature would make them too large.
        shaped = (logits - logits.amax(-1, keepdim=True)).div_(self.target.temperature)
        if self.target.truncates:
            least = shape(logits, self.target).least
            shaped.masked_fill_(logits < least[..., None], -torch.inf)
        return shaped

    def tempered(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """Return the draft's logits [..., V_d] at its temperature; at 1 the very same tensor."""
        if self.draft.temperature == 1:
            return draft_logits
        return exact(draft_logits) / self.draft.temperature

    def drafting(self, draft_logits: torch.Tensor, tempered: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V_d] of what proposes tokens.

        They are the `tempered` ones, -inf where the draft's own top-k or top-p cuts off; the very
        same tensor where nothing is cut off.
        """
        if not self.draft.truncates:
            return tempered
        found = exact(draft_logits.detach())
        return tempered.masked_fill(found < shape(found, self.draft).least[..., None], -torch.inf)


def exact(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or in float64 as they are: half precision would round once more."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
