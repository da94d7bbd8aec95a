"""Weights of draft positions from the chain before them, against their definitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from chain_reducer import combine, total
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel

from specforge_lk.losses import LOSSES, Tau

RECORDS = {record.name: record for record in LOSSES if record.build is not Tau}
ROWS, K, VOCABULARY, KEPT = 80, 4, 6, 5


def build(name, **options):
    return RECORDS[name].build(RECORDS[name].options(**options))


@pytest.fixture
def chain():
    """Draft logits [K, n, V_d], targets, recorded tokens [K, n] of V, masks [K, n] that nest."""
    generator = torch.Generator().manual_seed(0)
    shape = (K, ROWS, VOCABULARY)
    y = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    z = y[..., :KEPT] + torch.randn(shape, generator=generator, dtype=torch.float64)[..., :KEPT]
    tokens = y.softmax(-1).view(-1, VOCABULARY).multinomial(1, generator=generator).view(K, ROWS)
    masks = torch.arange(ROWS) < torch.tensor([[ROWS], [70], [60], [50]])
    labels = torch.where(tokens < KEPT, tokens, -1)
    log_z = y.logsumexp(-1)
    log_c = y[..., :KEPT].logsumexp(-1) - log_z
    fields = ("logits", "log_normalizer", "log_coverage", "labels")
    targets = [
        SimpleNamespace(**dict(zip(fields, of, strict=True)))
        for of in zip(y[..., :KEPT], log_z, log_c, labels, strict=True)
    ]
    return z.requires_grad_(), targets, labels, masks


def heads_of(loss, chain):
    z, targets, _, masks = chain
    heads = [loss.terms(*of) for of in zip(z, targets, masks, strict=True)]
    # Outside its mask a vector may hold anything.
    return [
        {name: torch.where(mask, vector, torch.nan) for name, vector in terms.items()}
        for terms, mask in zip(heads, masks, strict=True)
    ]


def definition(way, chain):
    """The weights [K, n], from probabilities; D-PACE's by SpecForge's own function."""
    z, targets, labels, masks = chain
    inside, at = labels >= 0, labels.clamp_min(0)[..., None]
    q = torch.where(inside, z.softmax(-1).gather(-1, at).squeeze(-1), 0.0)
    if way == "dpace":
        own = SimpleNamespace(dpace_alpha=0.5)
        of_chains = (q.T, masks.T.double(), masks.T, "dpace")
        return OnlineDFlashModel._dpace_weight(own, *of_chains).T.detach()
    logits = torch.stack([target.logits for target in targets])
    log_z = torch.stack([target.log_normalizer for target in targets])
    p = (logits - log_z[..., None]).exp().gather(-1, at).squeeze(-1)
    further = {"survival": (q / p).clamp_max(1), "auf": (z.argmax(-1) == labels).double()}[way]
    return torch.cat([torch.ones(1, ROWS), further.cumprod(0)[:-1]]).detach()


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("way", ["survival", "dpace", "auf"])
def test_weights_are_their_definition(chain, way, name):
    z, _, _, masks = chain
    plain, loss = build(name), build(name, chain_weight=way)
    heads = heads_of(loss, chain)
    combined, unweighted = (
        combine(loss, heads, masks),
        combine(plain, heads_of(plain, chain), masks),
    )
    weights = definition(way, chain)
    assert 0 <= weights[-1][masks[-1]].min() < weights[-1][masks[-1]].max()
    for got, before, weight, mask in zip(combined, unweighted, weights, masks, strict=True):
        torch.testing.assert_close(got["chain_weight"][mask], weight[mask])
        torch.testing.assert_close(got["loss"][mask], (weight * before["loss"])[mask])
        assert not got["chain_weight"].requires_grad
    expected = sum(
        (weight * before["loss"])[mask].mean()
        for before, weight, mask in zip(unweighted, weights, masks, strict=True)
    )
    (gradient,) = torch.autograd.grad(total(loss, heads, masks), z)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])
    assert gradient.isfinite().all() and not gradient[~masks].any()


def test_survival_under_greedy_drafting_is_the_first_failure(chain):
    """A greedy draft survives where its likeliest token is the recorded one."""
    greedy = build("tv", chain_weight="survival", serving="drafting=greedy")
    survival = combine(greedy, heads_of(greedy, chain), chain[-1])
    for got, weight, mask in zip(survival, definition("auf", chain), chain[-1], strict=True):
        assert torch.equal(got["chain_weight"][mask], weight[mask].double())


def test_recorded_tokens_are_needed(chain):
    z, targets, _, masks = chain
    targets[0].labels = None
    with pytest.raises(ValueError, match=r"chain_weight='auf'.*needs the recorded tokens"):
        build("kl", chain_weight="auf").terms(z[0], targets[0], masks[0])
