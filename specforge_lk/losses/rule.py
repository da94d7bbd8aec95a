"""The serving rule in a loss: the target and the draft as they will be sampled from.

The target under a rule comes from its full vocabulary (`ServingRule.shape_target`); the draft is
softmax(z / draft temperature), with what its own top-k and top-p cut off at probability 0. Both cut
as `specforge_lk.decode.sampling` does.

A greedy draft proposes argmax q, which has no gradient. In the loss q_s = softmax(s z), the draft
at temperature 1 / s, stands in for it. Unless two tokens are likeliest together, as s grows

    sum min(p, q_s) -> p(argmax q)    and    min(1, q_s(x) / p(x)) -> 1[x = argmax q],

the two probabilities of greedy drafting. These themselves are reported. KL is taken to softmax(z):
KL to q_s would fit s z to log p, and so undo the sharpening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch

from specforge_lk.decode.sampling import shape
from specforge_lk.losses.contract import Target
from specforge_lk.losses.options import ServingOptions
from specforge_lk.serving import Sampling

#: s of q_s = softmax(s z), unless it is given. A token that is g nats behind the likeliest one has
#: exp(-s g) of its weight. Training can move what is drafted only where that is not 0, and it
#: maximizes the rule's acceptance only where it is. At 8 a token a quarter of a nat behind still
#: counts 0.14, one a whole nat behind 0.0003. Drafts of low rank, as in tests/losses/test_rule.py,
#: get furthest with 4 where targets are peaked and with 16 or 32 where they are flat.
SHARPNESS: Final = 8.0


#: Nats that a token may be behind the likeliest one in the draft that stands in for a greedy one.
_FARTHEST: Final = 40.0


@dataclass(frozen=True)
class ServingRule:
    """How target and draft are sampled from.

    Attributes:
        target: what the target samples from.
        draft: what the draft samples from; temperature 1 with greedy drafting.
        sharpness: s of q_s, which stands in for a greedy draft; None if drafting is not greedy.
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
        logits = _exact(logits)
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
        return _exact(draft_logits) / self.draft.temperature

    def drafting(self, draft_logits: torch.Tensor, tempered: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V_d] of what proposes tokens.

        They are s z of a greedy draft, and `tempered` ones otherwise, -inf where the draft's own
        top-k or top-p cuts off; the very same tensor where nothing is cut off.
        """
        if self.sharpness is not None:
            sharpened = _exact(draft_logits) * self.sharpness
            # Most tokens would have a probability below the least normal number, with which CPUs
            # compute ten times as slowly, or products of two would. e^-40 is as good as none.
            least = sharpened.detach().amax(-1, keepdim=True) - _FARTHEST
            return torch.maximum(sharpened, least)
        if not self.draft.truncates:
            return tempered
        found = _exact(draft_logits.detach())
        return tempered.masked_fill(found < shape(found, self.draft).least[..., None], -torch.inf)


@torch.no_grad()
def greedy_acceptance(
    draft_logits: torch.Tensor, target: Target, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return p(argmax q) and 1[x = argmax q] of the recorded token x, both [...].

    They are 0 where the mask is. The second is None where no token is known.

    Args:
        draft_logits: [..., V_d].
        target: the target under the rule.
        mask: [...].
    """
    drafted = draft_logits.argmax(-1)
    logit = target.logits.gather(-1, drafted[..., None]).squeeze(-1)
    supervised = mask != 0
    covered = supervised & (target.log_coverage != -torch.inf)
    alpha = torch.where(covered, (_exact(logit) - target.log_normalizer).exp(), 0.0)
    if target.labels is None:
        return alpha, None
    return alpha, (supervised & (drafted == target.labels)).to(alpha.dtype)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    # Half precision would round them once more.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
