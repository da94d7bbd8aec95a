"""Greedy drafting in a loss: acceptance of the likeliest token, and one that has a gradient.

A greedy draft proposes x' = argmax z and is verified as such: x' is accepted with probability
p(x'), and a chain gets past the recorded token x where x' = x. Neither has a gradient. In the loss
the logits are perturbed by independent Gumbel noise g of scale 1 / s (Berthet et al., arXiv
2002.08676). Since argmax (z + g / s) is distributed as q_s = softmax(s z), the rule's own
probabilities have the expectations

    E p(argmax (z + g / s)) = sum_x p(x) q_s(x)    and    P(argmax (z + g / s) = x) = q_s(x),

which are smooth in z and come to p(argmax z) and 1[x = argmax z] as s grows, unless two tokens are
likeliest together. The overlap sum min(p, q_s) has the same limit but is no such expectation: it is
greatest at q_s = p, so that where q_s is sharper than p training raises it by making z flatter,
whatever is likeliest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from specforge_lk.losses.contract import Target
from specforge_lk.losses.rule import exact

#: Nats that a token may be behind the likeliest one in q_s. Further behind, most tokens would have
#: a probability below the least normal number, with which CPUs compute ten times as slowly, or
#: products of two would. e^-40 is as good as none.
_FARTHEST: Final = 40.0


class Acceptance(NamedTuple):
    """Of one draft position, each [...], 0 outside the mask and where coverage is 0.

    Attributes:
        alpha: chance that what is drafted is accepted.
        log_alpha: its logarithm.
        past: chance that a chain gets past the recorded token; None where no token is known.
    """

    alpha: torch.Tensor
    log_alpha: torch.Tensor
    past: torch.Tensor | None


def perturbed(
    draft_logits: torch.Tensor, target: Target, mask: torch.Tensor, sharpness: float
) -> Acceptance:
    """Return the expected acceptance of argmax of the perturbed logits, with its gradient.

    Args:
        draft_logits: [..., V_d]; a gradient reaches them.
        target: the target under the rule.
        mask: [...]; nothing is read where it is 0.
        sharpness: s, one over the scale of the noise.
    """
    covered = (mask != 0) & (target.log_coverage != -torch.inf)
    # Elsewhere may be nan, and a sum of no probability has no gradient.
    z = torch.where(covered[..., None], exact(draft_logits) * sharpness, 0.0)
    z = torch.maximum(z, z.detach().amax(-1, keepdim=True) - _FARTHEST)
    log_p = exact(target.logits) - target.log_normalizer[..., None]
    log_p = torch.where(covered[..., None], log_p, 0.0)
    log_sum = z.logsumexp(-1)
    log_alpha = torch.where(covered, (z + log_p).logsumexp(-1) - log_sum, 0.0)
    alpha = torch.where(covered, log_alpha.exp(), 0.0)
    if target.labels is None:
        return Acceptance(alpha, log_alpha, None)
    at = target.labels.clamp_min(0)[..., None]
    past = (z.gather(-1, at).squeeze(-1) - log_sum).exp()
    return Acceptance(alpha, log_alpha, torch.where(covered & (target.labels >= 0), past, 0.0))


@torch.no_grad()
def likeliest(draft_logits: torch.Tensor, target: Target, mask: torch.Tensor) -> Acceptance:
    """Return the rule's own acceptance, p(argmax z) and 1[x = argmax z] of the recorded token x.

    Args:
        draft_logits: [..., V_d].
        target: the target under the rule.
        mask: [...].
    """
    drafted = draft_logits.argmax(-1)
    logit = target.logits.gather(-1, drafted[..., None]).squeeze(-1)
    covered = (mask != 0) & (target.log_coverage != -torch.inf)
    log_alpha = torch.where(covered, exact(logit) - target.log_normalizer, 0.0)
    alpha = torch.where(covered, log_alpha.exp(), 0.0)
    if target.labels is None:
        return Acceptance(alpha, log_alpha, None)
    past = (mask != 0) & (drafted == target.labels)
    return Acceptance(alpha, log_alpha, past.to(alpha.dtype))
