"""`tau`: its definition, and that its expectation over responses is what decoding accepts."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from chain_reducer import combine, total

from specforge_lk.losses import LOSSES

(RECORD,) = (record for record in LOSSES if record.name == "tau")
V, K = 4, 3


def build(**options):
    return RECORD.build(RECORD.options(**options))


def target_of(logits: torch.Tensor, kept: list[int], tokens: torch.Tensor) -> SimpleNamespace:
    """The target of full-vocabulary logits [n, V] on the tokens kept, with recorded tokens [n]."""
    on_draft = logits[:, kept]
    return SimpleNamespace(
        logits=on_draft,
        log_normalizer=logits.logsumexp(-1),
        log_coverage=on_draft.logsumexp(-1) - logits.logsumexp(-1),
        labels=torch.tensor([kept.index(x) if x in kept else -1 for x in tokens.tolist()]),
    )


def random_chain(rows: int, vocabulary: int, kept: list[int]):
    """Draft logits [n, V_d], target logits [n, V] and recorded tokens [n] of K draft positions."""
    generator = torch.Generator().manual_seed(0)
    drafts, targets, tokens = [], [], []
    for _ in range(K):
        z = torch.randn(rows, len(kept), generator=generator).double() * 2
        drafts.append(z.requires_grad_())
        targets.append(torch.randn(rows, vocabulary, generator=generator).double() * 2)
        tokens.append(torch.randint(vocabulary, (rows,), generator=generator))
    return drafts, targets, tokens


@pytest.mark.parametrize("estimator", ["weighted", "product"])
@pytest.mark.parametrize("scope", ["head", "token", "fixed"])
def test_loss_and_gradient_are_their_definition(estimator, scope):
    rows, vocabulary, kept, eta = 11, 9, [0, 2, 3, 5, 8], 2.5
    drafts, targets, tokens = random_chain(rows, vocabulary, kept)
    masks = [torch.arange(rows) < rows - k for k in range(K)]  # as at the end of a response
    fixed = {"lambda_fixed": 0.25} if scope == "fixed" else {}
    loss = build(estimator=estimator, eta=eta, lambda_scope=scope, **fixed)
    heads = [
        loss.terms(z, target_of(y, kept, x), mask)
        for z, y, x, mask in zip(drafts, targets, tokens, masks, strict=True)
    ]
    # Where a later draft position is not supervised its vectors may hold anything.
    heads = [
        {name: torch.where(mask, vector, torch.nan) for name, vector in terms.items()}
        for terms, mask in zip(heads, masks, strict=True)
    ]
    combined = combine(loss, heads, masks)

    expected, reach = [], torch.ones(rows).double()
    for z, y, x, mask, got in zip(drafts, targets, tokens, masks, combined, strict=True):
        q = torch.zeros(rows, vocabulary).double()
        q[:, kept] = z.softmax(-1)
        p = y.softmax(-1)
        alpha = torch.minimum(p, q).sum(-1)
        renormalized = p[:, kept] / p[:, kept].sum(-1, keepdim=True)
        kl = (renormalized * (renormalized / q[:, kept]).log()).sum(-1)
        weight = {
            "head": torch.exp(-eta * alpha[mask].mean()).expand(rows),
            "token": torch.exp(-eta * alpha),
            "fixed": torch.full((rows,), 0.25).double(),
        }[scope].detach()
        torch.testing.assert_close(got["lambda"][mask], weight[mask])
        torch.testing.assert_close(got["reach"][mask], reach.detach()[mask])
        expected.append((weight * kl + (1 - weight) * (1 - reach * alpha))[mask])
        torch.testing.assert_close(got["loss"][mask], expected[-1])
        at = x[:, None]
        ratio = (q.gather(1, at) / p.gather(1, at)).squeeze(1).clamp_max(1)
        reach = reach * (ratio if estimator == "weighted" else alpha)

    found = torch.autograd.grad(total(loss, heads, masks), drafts)
    definition = torch.autograd.grad(sum(values.mean() for values in expected), drafts)
    torch.testing.assert_close(found, definition)
    assert all(gradient.any() for gradient in found)


@pytest.mark.parametrize("kept", [range(V), [0, 2, 3]], ids=["whole", "truncated"])
def test_expected_gradient_is_that_of_enumerated_decoding(kept):
    """Over all responses, weighted by their probability; the product form has another gradient."""
    kept = list(kept)
    generator = torch.Generator().manual_seed(3)
    prefixes = [prefix for k in range(K) for prefix in product(range(V), repeat=k)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    # Target and draft are random after every prefix, as autoregressive models may be.
    target = torch.randn(len(prefixes), V, generator=generator).double()
    draft = torch.randn(len(prefixes), len(kept), generator=generator).double().requires_grad_()
    p, q = target.softmax(-1), draft.softmax(-1)

    def accepted(prefix):
        """Accepted tokens of a chain that has come as far as this: q min(1, p / q) each."""
        overlap = torch.minimum(p[number[prefix], kept], q[number[prefix]])
        if len(prefix) == K - 1:
            return overlap.sum()
        later = torch.stack([accepted((*prefix, x)) for x in kept])
        return (overlap * (1 + later)).sum()

    responses = list(product(range(V), repeat=K))
    mask = torch.ones(len(responses), dtype=torch.bool)

    def expectation(estimator):
        loss = build(estimator=estimator, lambda_scope="fixed", lambda_fixed=0)
        heads, chance = [], torch.ones(len(responses)).double()
        for k in range(K):
            rows = torch.tensor([number[response[:k]] for response in responses])
            tokens = torch.tensor([response[k] for response in responses])
            chance = chance * p[rows, tokens]
            here = target_of(target[rows], kept, tokens)
            heads.append(loss.terms(draft[rows], here, mask))
        combined = combine(loss, heads, [mask] * K)
        return sum((chance * (1 - head["loss"])).sum() for head in combined)

    def both(value):
        return torch.cat([value.reshape(1), *torch.autograd.grad(value, draft)[0]]).detach()

    exact, biased = both(accepted(())), both(expectation("product"))
    torch.testing.assert_close(both(expectation("weighted")), exact, rtol=0, atol=1e-9)
    assert abs(biased[0] - exact[0]) > 1e-3 and (biased - exact)[1:].norm() > 0.1 * exact[1:].norm()


def test_gradients_at_random_initialization_need_kl():
    """The paper's Table 3: why the loss is blended with KL. lambda is nearly 1 there."""
    vocabulary, support = 128000, 100
    z = [torch.zeros(1, vocabulary, requires_grad=True) for _ in range(2)]
    logits = torch.full((1, vocabulary), -math.inf)
    logits[:, :support] = 0
    mask = torch.ones(1, dtype=torch.bool)

    def norms(**options):
        loss = build(**options)
        heads = [
            loss.terms(x, target_of(logits, list(range(vocabulary)), torch.zeros(1)), mask)
            for x in z
        ]
        gradients = torch.autograd.grad(total(loss, heads, [mask] * 2), z)
        return [gradient.norm().item() for gradient in gradients]

    pure = norms(lambda_scope="fixed", lambda_fixed=0)
    assert pure[0] == pytest.approx(7.81e-5, rel=0.01)
    assert pure[1] == pytest.approx(7.81e-5 * support / vocabulary, rel=0.01)
    assert norms() == pytest.approx([0.09996 * math.exp(-10 * support / vocabulary)] * 2, rel=1e-3)


def test_recorded_tokens_are_needed():
    drafts, targets, tokens = random_chain(2, V, [0, 1])
    target = target_of(targets[0], [0, 1], tokens[0])
    target.labels = None
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"needs the recorded tokens.*with_labels"):
        build().terms(drafts[0], target, mask)
    assert "past" not in build(estimator="product").terms(drafts[0], target, mask)
