"""The loss of a whole chain: the tokens that verification will accept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from specforge_lk.losses.contract import Mean, Target, Terms
from specforge_lk.losses.options import TauOptions
from specforge_lk.losses.terms import (
    OverlapLoss,
    Scheduled,
    blend,
    supervised_only,
    total_variation,
    trained,
)
from specforge_lk.overlap import OverlapTerms


@dataclass(frozen=True)
class Tau(Scheduled, OverlapLoss):
    """Accepted tokens of the chain, E = sum_k reach_k alpha_k, blended with KL as in lk_lambda.

    Of draft position k, counted from 0, the loss is

        lambda_k KL_k + (1 - lambda_k) (1 - reach_k alpha_k),    reach_k = prod_{i<k} a_i,

    with gradient through reach_k and alpha_k, and lambda_k that of ``lk_lambda``. With a_i =
    min(1, q_i(x_i) / p_i(x_i)) of the recorded token x_i, 0 outside the draft vocabulary
    (``estimator`` "weighted"), sum_k reach_k alpha_k of one response has as its expectation over
    the target's responses the tokens accepted of a chain that is verified token by token, and so
    has its gradient: p, which responses are drawn from, does not depend on the draft. With a_i =
    alpha_i ("product": the e2e losses of AngelSpec, arXiv 2607.25852, and Bebop, arXiv 2606.12370)
    neither holds where a draft position's acceptance depends on the tokens before it.

    Why KL is in it: at random initialization q is about uniform on V_d tokens. Where p has its mass
    on n of them the gradients with respect to z have norms

        KL: 1 / sqrt(n)        1 - alpha: sqrt(n) / V_d        1 - reach_k alpha_k: less by reach_k,

    0.1 and 8e-5 at n = 100, V_d = 128000 (the LK-losses paper, Table 3), and reach_k is about
    (n / V_d)^k: no signal at all reaches later draft positions. lambda is 1 there and falls with
    each draft position's own alpha. -log E, the other way to raise a small gradient, is not
    unbiased: E of one response is an estimate, and the logarithm of an estimate has another mean.
    ``lambda_scope`` "fixed" with ``lambda_fixed`` 0 is the expectation alone.

    The scale: the trainer adds up the means of the draft positions, so that at lambda = 0 the loss
    is K - E in tokens per verification step, where draft positions are supervised at the same
    positions. KL is in nats. Drafts that propose a block average them: (K - E) / K.
    """

    options: TauOptions

    def _needs_tokens(self) -> bool:
        return self.options.estimator == "weighted"

    def combine_chain(
        self, heads: Sequence[Mapping[str, torch.Tensor]], means: Sequence[Mean]
    ) -> list[Terms]:
        """Return "loss", "lambda" and "reach", each [...], of every draft position.

        Args:
            heads: terms of the draft positions, in order, aligned by chain start.
            means: for every draft position, the mean of a vector over its supervised positions.
        """
        name = "past" if self.options.estimator == "weighted" else "alpha"
        combined: list[Terms] = []
        reached: torch.Tensor | None = None  # 1, at the first draft position
        for terms, mean in zip(map(supervised_only, heads), means, strict=True):
            variation = total_variation(terms, reached)
            found = blend(self.options, terms, mean, variation, self._progress)
            chance = trained(terms, name)
            reach = torch.ones_like(chance) if reached is None else reached.detach()
            combined.append({**found, "reach": reach})
            reached = chance if reached is None else reached * chance
        return combined

    def _chain_terms(
        self, draft_logits: torch.Tensor, target: Target, mask: torch.Tensor, overlap: OverlapTerms
    ) -> Terms:
        return {"_supervised": (mask != 0).to(overlap.alpha.dtype)}
