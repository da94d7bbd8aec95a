"""Values of the overlap terms: definition, invariants, the paper's golden figures."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import rounding

from specforge_lk.overlap import IMPLEMENTATIONS, overlap_terms

# The interpreter takes seconds; `test_triton.py` has what it does quickly.
ALL = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())
    for name in (*IMPLEMENTATIONS, "auto")
]

cases = given(
    vocabulary=st.integers(1, 40),
    outside=st.sampled_from([0, 1, 30]),
    scale=st.sampled_from([0.0, 0.1, 2.0, 8.0]),
    seed=st.integers(0, 1000),
)
quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def terms_in_probabilities(case, tokens):
    """The definitions once more, in probabilities, sharing nothing with the package."""
    q = torch.softmax(case.draft_logits.detach().double(), -1)
    p = (case.target_logits.double() - case.log_normalizer.double()[..., None]).exp()
    coverage = p.sum(-1)
    renormalized = p / coverage[..., None]
    return {
        "kl": torch.special.xlogy(renormalized, renormalized / q).sum(-1),
        "alpha": torch.minimum(p, q).sum(-1),
        "log_alpha": torch.minimum(p, q).sum(-1).log(),
        "log_coverage": coverage.log(),
        "reverse_kl": torch.special.xlogy(q, q / p).sum(-1),
        "log_q": q.gather(-1, tokens[:, None]).squeeze(-1).log(),
        "log_p": p.gather(-1, tokens[:, None]).squeeze(-1).log(),
    }


@pytest.mark.parametrize("impl", ALL, indirect=True)
@cases
@quick
def test_values_are_the_definition(overlap_case, impl, vocabulary, outside, scale, seed):
    sizes = {"outside": outside, "scale": scale, "seed": seed}
    case = overlap_case(4, vocabulary, **sizes, dtype=torch.float64)
    tokens = torch.arange(4) * 7 % vocabulary
    terms = overlap_terms(*case, tokens=tokens, impl=impl, reverse_kl=True)
    for name, expected in terms_in_probabilities(case, tokens).items():
        torch.testing.assert_close(
            getattr(terms, name).detach(), expected, rtol=1e-9, atol=1e-12, msg=name
        )


@cases
@quick
def test_invariants(overlap_case, impl, vocabulary, outside, scale, seed):
    sizes = {"outside": outside, "scale": scale, "seed": seed}
    case = overlap_case(4, vocabulary, **sizes, dtype=torch.float64)
    terms = overlap_terms(*case, impl=impl)
    assert (terms.alpha <= terms.log_coverage.exp() * (1 + 1e-12)).all()
    assert (terms.kl > -1e-12).all()

    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    permuted = overlap_terms(
        case.draft_logits[:, order], case.target_logits[:, order], case.log_normalizer, impl=impl
    )
    torch.testing.assert_close(permuted.kl, terms.kl)
    torch.testing.assert_close(permuted.alpha, terms.alpha)

    if outside == 0:
        p, q = torch.softmax(case.target_logits, -1), torch.softmax(case.draft_logits, -1)
        torch.testing.assert_close(1 - terms.alpha, 0.5 * (p - q).abs().sum(-1), atol=1e-12, rtol=0)


def test_gradient_norms_of_the_paper(impl):
    """Appendix A: q uniform on V = 128000, p uniform on k = 100 tokens."""
    vocabulary, k = 128_000, 100
    z = torch.zeros(1, vocabulary, requires_grad=True)
    y = torch.full((1, vocabulary), -torch.inf)
    y[:, :k] = 0.0
    terms = overlap_terms(z, y, torch.tensor([math.log(k)]), impl=impl)

    def norm(term):
        return torch.autograd.grad(term.sum(), z, retain_graph=True)[0].double().norm().item()

    assert norm(terms.kl) == pytest.approx(0.09996, abs=1e-5)
    assert norm(1 - terms.alpha) == pytest.approx(7.81e-5, abs=1e-7)
    assert norm(-terms.log_alpha) == pytest.approx(0.09996, abs=1e-5)


def test_point_mass_target_gives_negative_log_likelihood(impl_case, impl):
    z = impl_case(5, 30).draft_logits
    token = torch.tensor([0, 3, 29, 7, 7])
    y = torch.full((5, 30), -torch.inf, dtype=z.dtype).scatter(1, token[:, None], 0.0)
    terms = overlap_terms(z, y, torch.zeros(5, dtype=z.dtype), impl=impl)
    nll = torch.nn.functional.cross_entropy(z, token, reduction="none")
    torch.testing.assert_close(-terms.log_alpha, nll)
    torch.testing.assert_close(terms.kl, nll)
    torch.testing.assert_close(
        torch.autograd.grad(-terms.log_alpha.sum(), z)[0], torch.autograd.grad(nll.sum(), z)[0]
    )


def test_a_token_s_log_probability_is_its_negative_cross_entropy(impl_case, impl):
    """Value and gradient, which is that of cross-entropy with hard labels."""
    case = impl_case(2, 3, 30)
    tokens = torch.tensor([[0, 29, -1], [7, 7, 12]])
    terms = overlap_terms(*case, tokens=tokens, impl=impl)
    z = case.draft_logits
    expected = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), tokens.flatten(), ignore_index=-1, reduction="none"
    ).view(2, 3)
    inside = tokens >= 0
    torch.testing.assert_close(-terms.log_q[inside], expected[inside])
    torch.testing.assert_close(
        torch.autograd.grad(-terms.log_q[inside].sum(), z, retain_graph=True),
        torch.autograd.grad(expected.sum(), z),
    )
    # What is outside the draft vocabulary is never drafted, so no chain gets past it.
    chance = (terms.log_q - terms.log_p).clamp_max(0).exp()
    assert chance[0, 2] == 0 and (chance[inside] > 0).all()
    (gradient,) = torch.autograd.grad(chance.sum() + terms.log_q.sum(), z)
    assert gradient.isfinite().all() and not gradient[0, 2].any()


def test_shift_of_the_logits_changes_nothing(impl_case, impl):
    case = impl_case(3, 20)
    shifted = (case.draft_logits + 50, case.target_logits - 70, case.log_normalizer - 70)
    # The shifted logits are rounded themselves.
    close = rounding(shifted[1], shifted[1].dtype, 2)
    for name in ("kl", "alpha", "log_alpha"):
        torch.testing.assert_close(
            getattr(overlap_terms(*shifted, impl=impl), name),
            getattr(overlap_terms(*case, impl=impl), name),
            **close,
        )


def test_given_log_coverage_changes_nothing_and_is_returned(impl_case, impl):
    case = impl_case(3, 20)
    computed = overlap_terms(*case, impl=impl)
    given = overlap_terms(*case, impl=impl, log_coverage=computed.log_coverage)
    for name in ("kl", "alpha", "log_alpha", "log_coverage"):
        torch.testing.assert_close(
            getattr(given, name), getattr(computed, name), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_full_vocabulary_is_normalized_in_the_pass(overlap_case, impl, dtype):
    z, y, _ = (t.detach() for t in overlap_case(2, 3, 37, outside=0, scale=5.0, dtype=dtype))
    y[0, 0] = -torch.inf  # no target at all
    y[0, 1, ::2] = -torch.inf
    y[0, 2, 5] = torch.nan
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    wide = torch.promote_types(dtype, torch.float32)
    options = {"mask": mask, "tokens": torch.full((2, 3), 36), "impl": impl, "reverse_kl": True}
    names = ("kl", "alpha", "log_alpha", "log_q", "log_p")
    found = []
    given = y.to(wide).logsumexp(-1)
    for normalizer in (None, torch.where(given == -torch.inf, torch.inf, given)):
        leaf = z.clone().requires_grad_()
        terms = overlap_terms(leaf, y, normalizer, **options)
        values = torch.stack([getattr(terms, name) for name in names])
        (gradient,) = torch.autograd.grad(values.nan_to_num().sum(), leaf)
        found.append((values, gradient, terms))
    (values, gradient, terms), (expected, expected_gradient, _) = found
    torch.testing.assert_close(values, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)
    assert (
        values[:3, 0, 2].isnan().all() and not values[:, 0, 0].any() and not values[:, 1, 0].any()
    )
    # Coverage is 1, not what rounding makes of it.
    assert (
        terms.log_coverage[0].tolist()[:2] == [-math.inf, 0.0] and terms.log_coverage[0, 2].isnan()
    )
    assert terms.log_coverage[1].tolist() == [0.0] * 3
