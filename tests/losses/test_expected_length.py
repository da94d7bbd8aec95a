"""What training logs as tau_expected is what decoding gives: every response enumerated."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from specforge.losses.reduction import head_metrics, reduce_heads

from specforge_lk.losses import KL, KLOptions

V, K = 4, 3


@pytest.mark.parametrize("kept", [range(V), [0, 2, 3]], ids=["whole", "truncated"])
def test_mean_over_responses_is_the_expected_length_of_decoding(kept):
    """Target and draft are random after every prefix, as autoregressive models may be."""
    generator = torch.Generator().manual_seed(3)
    prefixes = [prefix for k in range(K) for prefix in product(range(V), repeat=k)]
    kept = list(kept)
    # Logits after every prefix: the target's, [V], and the draft's, [V_d].
    target, draft = (
        {prefix: torch.randn(size, generator=generator).double() for prefix in prefixes}
        for size in (V, len(kept))
    )
    p = {prefix: logits.softmax(-1) for prefix, logits in target.items()}
    q = {prefix: logits.softmax(-1) for prefix, logits in draft.items()}

    def yielded(prefix):
        """Accepted tokens of a chain that has come as far as this."""
        overlap = torch.minimum(p[prefix][kept], q[prefix]).tolist()
        if len(prefix) == K - 1:
            return sum(overlap)
        return sum(a * (1 + yielded((*prefix, x))) for a, x in zip(overlap, kept, strict=True))

    responses = list(product(range(V), repeat=K))
    loss, mask = KL(KLOptions()), torch.ones(len(responses))
    heads, chance = [], torch.ones(len(responses)).double()
    for k in range(K):
        before = [response[:k] for response in responses]
        tokens = torch.tensor([response[k] for response in responses])
        logits = torch.stack([target[prefix] for prefix in before])
        chance *= logits.softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        here = SimpleNamespace(
            logits=logits[:, kept],
            log_normalizer=logits.logsumexp(-1),
            log_coverage=logits[:, kept].logsumexp(-1) - logits.logsumexp(-1),
            labels=torch.tensor([kept.index(x) if x in kept else -1 for x in tokens.tolist()]),
        )
        terms = loss.terms(torch.stack([draft[prefix] for prefix in before]), here, mask.bool())
        heads += reduce_heads(loss, [terms], [mask])
    # The reducer's mean has equal weights: take it of one response at a time.
    lengths = torch.stack([head_metrics(_only(heads, i))["tau_expected"][0] for i in range(V**K)])
    expected = 1 + yielded(())
    assert (chance * lengths).sum().item() == pytest.approx(expected, abs=1e-9)
    of_products = 1 + torch.stack([head.vectors["alpha"] for head in heads]).cumprod(0).sum(0)
    assert abs((chance * of_products).sum().item() - expected) > 1e-3


def _only(heads, i):
    """The heads with one position supervised."""
    mask = torch.zeros_like(heads[0].mask)
    mask[i] = True
    return [replace(head, mask=mask) for head in heads]
