"""Values and gradients of every loss, against float64 autograd of its definition."""

from types import SimpleNamespace

import pytest
import torch
from chain_reducer import combine

from specforge_lk.losses import LOSSES, ChainLoss

RECORDS = {record.name: record for record in LOSSES}
ETA = 2.5


def build(name, **options):
    return RECORDS[name].build(RECORDS[name].options(**options))


def target_of(case):
    """The target; the recorded token of the first position is outside the draft vocabulary."""
    shape, vocabulary = case.log_normalizer.shape, case.target_logits.shape[-1]
    labels = torch.arange(-1, shape.numel() - 1) % vocabulary
    labels[0] = -1
    return SimpleNamespace(
        logits=case.target_logits,
        log_normalizer=case.log_normalizer,
        log_coverage=case.target_logits.logsumexp(-1) - case.log_normalizer,
        labels=labels.view(shape),
    )


def evaluate(loss, z, target, mask):
    """Terms, combined vectors and the scalar that a trainer's reducer makes of them."""
    terms = loss.terms(z, target, mask)
    (combined,) = combine(loss, [terms], [mask])
    return terms, combined, combined["loss"][mask].mean()


def definition(name, options, z, case, mask):
    """The per-position loss in probabilities, differentiable, sharing nothing with the package.

    Every loss of `LOSSES` needs one.
    """
    q = torch.softmax(z, -1)
    p = (case.target_logits - case.log_normalizer[..., None]).exp()
    renormalized = p / p.sum(-1, keepdim=True)
    alpha = torch.minimum(p, q).sum(-1)
    kl = (renormalized * (renormalized / q).log()).sum(-1)
    if options.get("kl_term") == "restricted":
        kl = (p * (p / q).log()).sum(-1)
    if name in ("lk_lambda", "tau"):  # a chain of one draft position is reached
        scope = options.get("lambda_scope", "head")
        scopes = {
            "head": torch.exp(-ETA * alpha[mask].mean()),
            "token": torch.exp(-ETA * alpha),
            "fixed": torch.tensor(options.get("lambda_fixed", 0.5)),
            "schedule": torch.tensor(max(0, 1 - PROGRESS / options.get("lambda_until", 0.5))),
        }
        weight = scopes[scope].detach()
        return weight * kl + (1 - weight) * (1 - alpha)
    return {
        "kl": kl,
        "tv": 1 - alpha,
        "lk_alpha": -alpha.log(),
        "reverse_kl": (q * (q / p).log()).sum(-1),
    }[name]


#: Share of the run that is done.
PROGRESS = 0.3

#: Options that each loss is tested with; a loss that is not here is tested with its defaults.
OPTIONS = {
    "kl": [{}, {"kl_term": "restricted"}],
    "lk_lambda": [
        {"eta": ETA},
        {"eta": ETA, "kl_term": "restricted"},
        {"eta": ETA, "lambda_scope": "token"},
        {"lambda_scope": "fixed"},
        {"lambda_scope": "fixed", "lambda_fixed": 0.1},
        {"lambda_scope": "schedule"},
        {"lambda_scope": "schedule", "lambda_until": 0.25},
    ],
    "tau": [{"eta": ETA}, {"eta": ETA, "lambda_scope": "token", "estimator": "product"}],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in RECORDS for options in OPTIONS.get(name, [{}])],
)
def test_loss_is_its_definition(overlap_case, name, options):
    case = overlap_case(2, 6, 15, outside=5)
    mask = torch.arange(12).view(2, 6) % 3 != 0
    of = build(name, **options)
    if options.get("lambda_scope") == "schedule":
        with pytest.raises(ValueError, match="no known end"):
            evaluate(of, case[0], target_of(case), mask)
        of.begin_step(PROGRESS)
    terms, combined, loss = evaluate(of, case[0], target_of(case), mask)
    expected = definition(name, options, case.draft_logits, case, mask)
    torch.testing.assert_close(combined["loss"][mask], expected[mask])
    torch.testing.assert_close(
        torch.autograd.grad(loss, case.draft_logits)[0],
        torch.autograd.grad(expected[mask].mean(), case.draft_logits)[0],
    )
    for vector in (terms | combined).values():
        assert vector.shape == mask.shape
    assert (terms["alpha"] <= terms["coverage"])[mask].all()


def test_past_is_the_chance_to_get_past_the_recorded_token(overlap_case):
    case = overlap_case(2, 6, 15, outside=5)
    target, mask = target_of(case), torch.ones(2, 6, dtype=torch.bool)
    past = build("kl").terms(case.draft_logits, target, mask)["past"]
    ratio = torch.softmax(case.draft_logits, -1)
    ratio = ratio / (case.target_logits - case.log_normalizer[..., None]).exp()
    expected = ratio.gather(-1, target.labels.clamp_min(0)[..., None]).squeeze(-1).clamp_max(1)
    expected[target.labels < 0] = 0
    torch.testing.assert_close(past, expected)
    assert past[0, 0] == 0 and (past < 1).any() and (past == 1).any()
    # A target that comes without recorded tokens has none.
    target.labels = None
    assert "past" not in build("kl").terms(case.draft_logits, target, mask)


def test_restricted_kl_gradient_is_scaled_by_coverage(overlap_case):
    case = overlap_case(4, 15, outside=30)
    mask = torch.ones(4, dtype=torch.bool)
    z, target = case.draft_logits, target_of(case)

    def gradient(kl_term):
        loss = build("kl", kl_term=kl_term)
        combined = loss.combine(loss.terms(z, target, mask), torch.mean)
        return torch.autograd.grad(combined["loss"].sum(), z)[0]

    coverage = target.log_coverage.exp()[:, None]
    assert (coverage < 0.9).any()
    torch.testing.assert_close(gradient("restricted"), coverage * gradient("renormalized"))


@pytest.mark.parametrize("name", RECORDS)
def test_padding_changes_neither_loss_nor_gradient(overlap_case, name):
    case = overlap_case(2, 6, 15)
    mask = torch.ones(2, 6, dtype=torch.bool)
    *_, loss = evaluate(build(name), case.draft_logits, target_of(case), mask)
    expected = torch.autograd.grad(loss, case.draft_logits)[0]

    pad = torch.nn.functional.pad
    z = pad(case.draft_logits.detach(), (0, 0, 0, 3), value=torch.nan).requires_grad_()
    target = SimpleNamespace(
        logits=pad(case.target_logits, (0, 0, 0, 3)),
        log_normalizer=pad(case.log_normalizer, (0, 3), value=torch.inf),
        log_coverage=pad(target_of(case).log_coverage, (0, 3), value=-torch.inf),
        labels=pad(target_of(case).labels, (0, 3), value=-1),
    )
    *_, padded = evaluate(build(name), z, target, pad(mask, (0, 3)))
    gradient = torch.autograd.grad(padded, z)[0]
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(gradient[:, :6], expected)
    assert not gradient[:, 6:].any()


@pytest.mark.parametrize("kl_term", ["renormalized", "restricted"])
@pytest.mark.parametrize("name", RECORDS)
def test_positions_without_coverage_lose_nothing(overlap_case, name, kl_term):
    options = {"kl_term": kl_term} if "kl_term" in RECORDS[name].options.model_fields else {}
    case = overlap_case(4, 15)
    case.target_logits[2] = -torch.inf
    mask = torch.ones(4, dtype=torch.bool)
    target = target_of(case)
    target.labels[2] = -1
    terms, combined, loss = evaluate(build(name, **options), case[0], target, mask)
    assert terms["no_coverage"].tolist() == [0, 0, 1, 0] and terms["past"][2] == 0
    assert terms["coverage"][2] == 0
    assert combined["loss"][2] == 0 and (combined["loss"][[0, 1, 3]] != 0).all()
    gradient = torch.autograd.grad(loss, case.draft_logits)[0]
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[3].any()


@pytest.mark.parametrize("name", RECORDS)
def test_all_masked_head_is_finite(overlap_case, name):
    case = overlap_case(3, 15)
    mask = torch.zeros(3, dtype=torch.bool)  # its mean is 0 / 0
    terms, combined, _ = evaluate(build(name), case[0], target_of(case), mask)
    for vector in (terms | combined).values():
        assert vector.isfinite().all()
    (combined["loss"] * mask).sum().backward()
    assert not case.draft_logits.grad.any()


@pytest.mark.parametrize("name", RECORDS)
def test_chunked_terms_equal_unchunked(overlap_case, name):
    case = overlap_case(10, 15)
    mask = torch.arange(10) % 4 != 1
    target, loss = target_of(case), build(name)
    whole, combined, _ = evaluate(loss, case.draft_logits, target, mask)
    parts = [
        loss.terms(
            case.draft_logits[rows],
            SimpleNamespace(**{key: value[rows] for key, value in vars(target).items()}),
            mask[rows],
        )
        for rows in (slice(0, 3), slice(3, 10))
    ]
    joined = {key: torch.cat([part[key] for part in parts]) for key in whole}
    (again,) = combine(loss, [joined], [mask])
    torch.testing.assert_close(joined, whole)
    torch.testing.assert_close(again, combined)


def test_lambda_scopes(overlap_case):
    case = overlap_case(6, 15)
    mask = torch.arange(6) != 2
    target = target_of(case)

    def weight(**options):
        terms, combined, _ = evaluate(build("lk_lambda", **options), case[0], target, mask)
        assert not combined["lambda"].requires_grad
        return terms["alpha"].detach(), combined["lambda"]

    alpha, head = weight()
    torch.testing.assert_close(head, torch.exp(-3 * alpha[mask].mean()).expand(6))
    alpha, token = weight(lambda_scope="token", eta=10)
    torch.testing.assert_close(token, torch.exp(-10 * alpha))
    _, fixed = weight(lambda_scope="fixed", lambda_fixed=0.25)
    assert (fixed == 0.25).all()


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_training_step_is_finite_and_descends(overlap_case, name, dtype):
    case = overlap_case(4, 50, dtype=dtype)
    mask = torch.ones(4, dtype=torch.bool)
    *_, before = evaluate(build(name), case[0], target_of(case), mask)
    (gradient,) = torch.autograd.grad(before, case.draft_logits)
    assert gradient.dtype == dtype and gradient.isfinite().all()
    stepped = case.draft_logits.detach() - gradient
    *_, after = evaluate(build(name), stepped, target_of(case), mask)
    assert after < before


@pytest.mark.parametrize("name", RECORDS)
def test_a_loss_has_the_methods_that_its_options_ask_for_alone(name):
    """SpecForge looks for them; without any a loss trains as it always did."""
    assert not hasattr(build(name), "shape_target")
    assert hasattr(build(name, serving="drafting=greedy"), "shape_target")
    assert isinstance(build(name), ChainLoss) == (name == "tau")
    if name != "tau":
        assert isinstance(build(name, chain_weight="auf"), ChainLoss)
