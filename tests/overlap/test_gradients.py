"""Gradients of the overlap terms."""

import pytest
import torch

from specforge_lk.overlap import IMPLEMENTATIONS, overlap_terms

NAMES = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q")
# The interpreter takes seconds; `test_triton.py` has what it does quickly.
FAST = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())
    for name in IMPLEMENTATIONS
    if name != "reference"
]


def tokens_of(case):
    """A token for every row of the case, the last one of the vocabulary among them."""
    shape, vocabulary = case.log_normalizer.shape, case.draft_logits.shape[-1]
    return (vocabulary - 1 - torch.arange(shape.numel()) * 3 % vocabulary).view(shape)


def gradient(case, impl, coefficients, mask=None):
    """Gradient of a random combination of all terms."""
    z = case.draft_logits.detach().clone().requires_grad_()
    options = {"tokens": tokens_of(case), "impl": impl, "reverse_kl": True, "mask": mask}
    terms = overlap_terms(z, *case[1:], **options)
    sum(
        (c.to(terms.kl.dtype) * getattr(terms, n)).sum()
        for n, c in zip(NAMES, coefficients, strict=True)
    ).backward()
    return z.grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outside", [0, 5])
def test_gradcheck(overlap_case, impl, name, outside):
    case = overlap_case(3, 11, outside=outside, dtype=torch.float64)

    def term(z):
        terms = overlap_terms(z, *case[1:], tokens=tokens_of(case), impl=impl, reverse_kl=True)
        return getattr(terms, name)

    assert torch.autograd.gradcheck(term, case.draft_logits)


def test_gradients_are_the_paper_s(impl_case, impl):
    case = impl_case(6, 25)
    z = case.draft_logits
    terms = overlap_terms(*case, impl=impl)
    q = torch.softmax(z.detach(), -1)
    p = (case.target_logits - case.log_normalizer[:, None]).exp()
    sign = torch.sign(q - p)
    tv = 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True))
    expected = {
        terms.kl: q - p / p.sum(-1, keepdim=True),
        1 - terms.alpha: tv,
        -terms.log_alpha: tv / torch.minimum(p, q).sum(-1, keepdim=True),
    }
    for term, value in expected.items():
        (computed,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        torch.testing.assert_close(computed, value)


@pytest.mark.parametrize("impl", FAST, indirect=True)
@pytest.mark.parametrize("shape", [(4, 1), (2, 3, 37), (50,), (2, 50257)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Low-precision logits are exact inputs; only the gradient is rounded to their dtype.
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 8e-3),
        (torch.float16, 1e-3),
    ],
)
def test_every_implementation_against_the_reference(overlap_case, impl, shape, dtype, tolerance):
    case = overlap_case(*shape, dtype=dtype)
    exact = type(case)(*(t.detach().double() for t in case))
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(5, *shape[:-1], generator=generator, dtype=torch.float64)
    # The second position is not supervised, and holds nothing.
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask.view(-1)[1:2] = False
    z, y, log_z = (t.detach() for t in case)
    z[~mask], y[~mask], log_z[~mask] = torch.nan, torch.nan, torch.nan

    computed = gradient(case, impl, coefficients, mask=mask)
    assert computed.dtype == dtype and not computed[~mask].any()
    expected = gradient(exact, "reference", coefficients, mask=mask)
    # Entries are differences of numbers up to 1: what these are rounded to is lost absolutely.
    lost = (1e-12 if dtype == torch.float64 else 1e-5) * expected.abs().max().clamp_min(0.1).item()
    torch.testing.assert_close(computed.double(), expected, rtol=tolerance, atol=lost)

    options = {"tokens": tokens_of(case), "reverse_kl": True, "mask": mask}
    values = overlap_terms(*case, impl=impl, **options)
    exact_values = overlap_terms(*exact, impl="reference", **options)
    assert values.kl.dtype == torch.promote_types(dtype, torch.float32)
    precise = 1e-12 if dtype == torch.float64 else 5e-6
    for name in (*NAMES, "log_p"):
        torch.testing.assert_close(
            getattr(values, name).detach().double(),
            getattr(exact_values, name),
            rtol=precise,
            atol=precise,
        )
    assert torch.equal(values.draft_argmax, exact_values.draft_argmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflown_alpha_keeps_its_log_and_gradient(impl, dtype):
    """All of q on a token that the target rules out; the rest of q is e^-200 and less."""
    z = torch.tensor([[200.0, 0.0, -1.0, -2.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[-torch.inf, 1.0, 1.0, 1.0]], dtype=dtype)
    terms = overlap_terms(z, y, y.logsumexp(-1), impl=impl)
    tail = torch.tensor([1.0, 0.0, -1.0, -2.0], dtype=torch.float64)[1:].exp()
    expected_log = tail.sum().log().item() - 200
    assert terms.log_alpha.item() == pytest.approx(expected_log, rel=1e-6)
    (computed,) = torch.autograd.grad(terms.log_alpha.sum(), z)
    # q < p on the tail, so d log alpha / dz is each token's share of it, and -1 on the rest.
    expected = torch.cat([torch.tensor([-1.0]).double(), tail / tail.sum()])[None]
    torch.testing.assert_close(computed.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_take_half(impl):
    """q = 1/4 each; p ties on token 0, is above on 1, below on 2 and excludes 3."""
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 0.5, -0.5, -torch.inf]], dtype=torch.float64)
    log_z = torch.zeros(1, 4, dtype=torch.float64).logsumexp(-1)
    alpha = overlap_terms(z, y, log_z, impl=impl).alpha
    (computed,) = torch.autograd.grad(alpha.sum(), z)
    w = torch.tensor([[0.5, 1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(computed, 0.25 * (w - 0.375))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_are_stationary(overlap_case, impl, dtype):
    case = overlap_case(4, 500, outside=0, dtype=dtype)
    z = case.target_logits.clone().requires_grad_()
    terms = overlap_terms(z, case.target_logits, z.detach().logsumexp(-1), impl=impl)
    torch.testing.assert_close(terms.alpha, torch.ones_like(terms.alpha))
    for term in (terms.kl, terms.alpha, terms.log_alpha):
        (computed,) = torch.autograd.grad(term.sum(), z, retain_graph=True)
        # Rounding may break ties, but only all one way.
        assert computed.abs().max() < 0.51 * torch.softmax(z, -1).max()
    (computed,) = torch.autograd.grad(terms.kl.sum(), z)
    assert computed.abs().max() < 1e-6


def test_differentiates_once_only(overlap_case):
    case = overlap_case(2, 5)
    terms = overlap_terms(*case, impl="closed_form")
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(terms.kl.sum(), case.draft_logits, create_graph=True)


def test_no_gradient_reaches_the_target(impl_case, impl):
    z, y, log_z = impl_case(2, 5)
    y, log_z = y.requires_grad_(), log_z.requires_grad_()
    terms = overlap_terms(z, y, log_z, tokens=torch.tensor([1, 4]), impl=impl)
    (terms.kl + terms.alpha + terms.log_alpha + terms.log_q).sum().backward()
    assert y.grad is None and log_z.grad is None
    assert not terms.log_coverage.requires_grad and not terms.log_p.requires_grad
