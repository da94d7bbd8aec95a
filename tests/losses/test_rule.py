"""Losses under a serving rule, against float64 autograd of what is sampled under it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from chain_reducer import combine, mean

from specforge_lk.decode.sampling import distribution
from specforge_lk.losses import LOSSES
from specforge_lk.serving import Sampling, parse

RECORDS = {record.name: record for record in LOSSES}
ROWS, VOCABULARY, KEPT = 24, 15, 10
RULES = (
    "temperature=0.7,top_p=0.8",
    "temperature=1.3,top_k=6,draft_temperature=0.6",
    "draft_top_k=4,draft_top_p=0.9",
    "temperature=1,drafting=greedy",
    "temperature=0.7,top_k=5,drafting=greedy",
    "temperature=0",
)
#: Losses that a rule would make infinite refuse it.
REFUSED = {
    "reverse_kl": {RULES[0], RULES[1], RULES[4], RULES[5]},
    "lk_alpha": {RULES[2]},
}


def build(name, **options):
    return RECORDS[name].build(RECORDS[name].options(**options))


@pytest.fixture
def case():
    """Draft logits [n, V_d], target logits [n, V], recorded tokens [n] of the full vocabulary."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(ROWS, KEPT, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    tokens[:8] = z[:8].argmax(-1)  # some that a greedy draft gets past
    return z.requires_grad_(), y, tokens


def target_of(loss, y, tokens):
    """As SpecForge restricts the shaped target to the draft vocabulary, the first tokens."""
    shaped = getattr(loss, "shape_target", lambda logits: logits)(y)
    log_z = shaped.logsumexp(-1)
    return SimpleNamespace(
        logits=shaped[:, :KEPT],
        log_normalizer=log_z,
        log_coverage=(shaped[:, :KEPT].logsumexp(-1) - log_z).clamp_max(0),
        labels=torch.where(tokens < KEPT, tokens, -1),
    )


def sampled_from(logits, sampling):
    """Probabilities [n, V] from the definition of temperature, top-k and top-p, without ties."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    p = (logits / sampling.temperature).softmax(-1)
    order = p.argsort(-1, descending=True)
    rank = order.argsort(-1)
    if sampling.top_k:
        p = torch.where(rank < sampling.top_k, p, 0)
        p = p / p.sum(-1, keepdim=True)
    likelier = (p.gather(-1, order).cumsum(-1) - p.gather(-1, order)).gather(-1, rank)
    p = torch.where(likelier < sampling.top_p, p, 0)
    return p / p.sum(-1, keepdim=True)


def definition(name, rule, z, y, tokens, sharpness):
    """Loss, its alpha and past [n] with gradients; the alpha and past of the rule itself."""
    p = sampled_from(y, rule.target)
    at = tokens[:, None]

    def padded(q):
        return torch.nn.functional.pad(q, (0, VOCABULARY - KEPT))

    covered = p[:, :KEPT].sum(-1) > 0
    if rule.greedy_draft:
        # With noise on z, q is where the likeliest token is; each is verified as a greedy draft's.
        q, drafted = padded(z.mul(sharpness).softmax(-1)), padded(sampled_from(z, Sampling(0)))
        alpha, rule_alpha = ((p * x).sum(-1) for x in (q, drafted))
        past, rule_past = (x.gather(1, at).squeeze(1) for x in (q, drafted))
        past, rule_past = past * covered, rule_past.detach()
    else:
        q = padded(sampled_from(z, rule.draft))
        alpha = rule_alpha = torch.minimum(p, q).sum(-1)
        # 0 / 0 counts as 0: such a token is neither recorded nor drafted.
        past = (q.gather(1, at) / p.gather(1, at).clamp_min(1e-300)).squeeze(1).clamp_max(1)
        rule_past = past
    rule_alpha = rule_alpha.detach()
    q = padded(z.softmax(-1)) if rule.greedy_draft else q
    # KL is taken to the draft before it is truncated.
    temperature = 1 if rule.greedy_draft else rule.draft.temperature
    log_full = (z / temperature).log_softmax(-1)
    renormalized = p[:, :KEPT] / p[:, :KEPT].sum(-1, keepdim=True).clamp_min(1e-300)
    kl = (torch.xlogy(renormalized, renormalized) - renormalized * log_full).sum(-1)
    weight = torch.exp(-(10 if name == "tau" else 3) * rule_alpha.mean())
    blended = weight * kl + (1 - weight) * (1 - alpha)
    loss = {
        "kl": lambda: kl,
        "tv": lambda: 1 - alpha,
        "lk_alpha": lambda: -torch.where(covered, alpha, 1.0).log(),
        "lk_lambda": lambda: blended,
        "tau": lambda: blended,
        "reverse_kl": lambda: (q * (torch.where(q > 0, q, 1).log() - p.log())).sum(-1),
    }[name]()
    return torch.where(covered, loss, 0), alpha, past, rule_alpha, rule_past.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", RECORDS)
def test_loss_is_its_definition_under_the_rule(case, name, rule):
    if rule in REFUSED.get(name, ()):
        with pytest.raises(ValueError, match="infinite"):
            build(name, serving=rule)
        return
    z, y, tokens = case
    given = {"sharpness": 3} if parse(rule).greedy_draft and "kl" not in name else {}
    loss, mask = build(name, serving=rule, **given), torch.ones(ROWS, dtype=torch.bool)
    terms = loss.terms(z, target_of(loss, y, tokens), mask)
    (combined,) = combine(loss, [terms], [mask])
    sharpness = given.get("sharpness", 8)
    expected, *probabilities = definition(name, parse(rule), z, y, tokens, sharpness)
    alpha, past, rule_alpha, rule_past = probabilities
    torch.testing.assert_close(combined["loss"], expected)
    torch.testing.assert_close(terms["alpha"], rule_alpha)
    torch.testing.assert_close(terms["past"], rule_past)
    trained = [terms.get(f"_{name}", terms[name]) for name in ("alpha", "past")]
    for got, wanted in zip((combined["loss"], *trained), (expected, alpha, past), strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), z, retain_graph=True)[0],
            torch.autograd.grad(wanted.sum(), z, retain_graph=True)[0],
        )
    if parse(rule).greedy_draft:  # what it trains on is not what it reports
        assert not terms["alpha"].requires_grad and not terms["past"].requires_grad
        assert rule_past.sum() >= 8 and (alpha - rule_alpha).abs().max() > 0.01
        if "kl" in name:
            with pytest.raises(ValueError, match="sharpness"):
                build(name, serving=rule, sharpness=3)


@pytest.mark.parametrize("text", ["temperature=0", *RULES[:2], "temperature=1,top_k=3,top_p=0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shaped_target_is_what_decoding_samples_from(text, dtype):
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    logits = logits.round().to(dtype)  # many are equally likely: ties are cut as decoding cuts
    given = logits.clone()
    shaped = build("kl", serving=text).shape_target(logits)
    assert shaped.dtype == torch.float32 and torch.equal(logits, given)
    expected = distribution(logits.float(), parse(text).target)
    torch.testing.assert_close(shaped.softmax(-1), expected)
    assert torch.equal(shaped == -torch.inf, expected == 0)


def test_the_smooth_draft_comes_to_greedy_drafting(case):
    """As s grows, what is trained becomes what is reported."""
    z, y, tokens = case
    mask, gaps = torch.ones(ROWS, dtype=torch.bool), []
    for sharpness in (4, 40, 400):
        loss = build("tau", serving="drafting=greedy", sharpness=sharpness)
        terms = loss.terms(z, target_of(loss, y, tokens), mask)
        gaps.append(max((terms[f"_{n}"] - terms[n]).abs().max() for n in ("alpha", "past")).item())
    assert gaps[0] > 0.1 and gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-9


def test_masked_positions_report_nothing(case):
    z, y, tokens = case
    loss, mask = build("tv", serving="drafting=greedy"), torch.arange(ROWS) % 2 == 0
    target = target_of(loss, y, tokens)
    z = z.detach().masked_fill(~mask[:, None], torch.nan)
    target.log_normalizer[~mask] = torch.nan
    terms = loss.terms(z, target, mask)
    assert all(vector.isfinite().all() for vector in terms.values())
    assert not terms["alpha"][~mask].any() and not terms["past"][~mask].any()


def test_training_for_greedy_drafting_raises_the_probability_of_the_likeliest_token():
    """Drafts of rank 3 cannot match their targets: what they are trained for decides."""
    problems, contexts, vocabulary, rank, steps = 16, 24, 12, 3, 60
    generator = torch.Generator().manual_seed(0)
    y = 1.5 * torch.randn(problems, contexts, vocabulary, generator=generator)
    x = torch.randn(problems, contexts, rank, generator=generator)
    p, mask = y.softmax(-1), torch.ones(problems, contexts, dtype=torch.bool)
    target = SimpleNamespace(
        logits=y, log_normalizer=y.logsumexp(-1), log_coverage=torch.zeros(mask.shape), labels=None
    )

    def train(weights, name, steps, **options):
        loss, weights = build(name, **options), weights.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.03)
        for _ in range(steps):
            optimizer.zero_grad()
            combined = loss.combine(loss.terms(x @ weights, target, mask), lambda v: mean(v, mask))
            combined["loss"].mean().backward()
            optimizer.step()
        return weights.detach()

    def likeliest(weights):
        return p.gather(-1, (x @ weights).argmax(-1, keepdim=True)).mean().item()

    start = train(torch.zeros(problems, rank, vocabulary), "kl", 5 * steps)
    probabilistic = train(start, "tv", steps)
    for name in ("tv", "lk_lambda"):  # KL in it must not undo the sharpening
        greedy = train(start, name, steps, serving="drafting=greedy")
        assert likeliest(greedy) > 1.15 * likeliest(probabilistic) > 1.15 * likeliest(start)
