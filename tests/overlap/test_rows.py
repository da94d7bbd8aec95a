"""Rows of the overlap operation: skipped ones, degenerate ones, chunks and strides."""

import pytest
import torch

from specforge_lk.overlap import overlap_terms, rows

NAMES = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q")


def evaluate(z, y, log_z, token=2, **options):
    """Terms [5, ...] and the gradient of their sum; all rows have the same token."""
    tokens = torch.full(log_z.shape, token)
    terms = overlap_terms(z, y, log_z, tokens=tokens, reverse_kl=True, **options)
    values = torch.stack([getattr(terms, name) for name in NAMES])
    (gradient,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), gradient


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int64])
def test_rows_outside_the_mask_are_skipped_whatever_they_hold(impl_case, impl, mask_dtype):
    case = impl_case(2, 5, 12)
    expected, expected_gradient = evaluate(*case, impl=impl)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
    broken = [
        torch.where(mask.view(2, 5, *[1] * (t.dim() - 2)), t.detach(), value)
        for t, value in zip(case, (torch.nan, torch.inf, torch.nan), strict=True)
    ]
    broken[0].requires_grad_()
    given = mask.to(mask_dtype)
    values, gradient = evaluate(*broken, impl=impl, mask=given)
    torch.testing.assert_close(values, expected * mask)
    torch.testing.assert_close(gradient, expected_gradient * mask[..., None])
    assert (overlap_terms(*broken, impl=impl, mask=given).log_coverage[~mask] == 0).all()


def test_an_empty_vocabulary_is_refused(impl_case, impl):
    with pytest.raises(ValueError, match="vocabulary is empty"):
        overlap_terms(*impl_case(3, 0), impl=impl)


def test_all_masked(impl_case, impl):
    case = impl_case(3, 12)
    values, gradient = evaluate(*case, impl=impl, mask=torch.zeros(3))
    assert not values.any() and not gradient.any()


def test_no_rows(impl_case, impl):
    values, gradient = evaluate(*impl_case(0, 12), impl=impl)
    assert values.shape == (5, 0) and gradient.shape == (0, 12)


@pytest.mark.parametrize("give_log_coverage", [True, False])
def test_rows_without_coverage_are_zero(impl_case, impl, give_log_coverage):
    z, y, log_z = impl_case(4, 12)
    expected, expected_gradient = evaluate(z, y, log_z, impl=impl)
    y[1], log_z[1] = 0.0, torch.inf  # padding
    y[2] = -torch.inf  # the target excludes the whole draft vocabulary
    log_c = y.logsumexp(-1) - log_z if give_log_coverage else None
    values, gradient = evaluate(z, y, log_z, impl=impl, log_coverage=log_c)
    coverage = overlap_terms(z, y, log_z, impl=impl, log_coverage=log_c).log_coverage
    assert (coverage == -torch.inf).tolist() == [False, True, True, False]
    assert not values[:, 1:3].any() and not gradient[1:3].any()
    torch.testing.assert_close(values[:, [0, 3]], expected[:, [0, 3]])
    torch.testing.assert_close(gradient[[0, 3]], expected_gradient[[0, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_excluded_tokens_do_not_count(overlap_case, impl, dtype):
    """Logits of -inf in target and draft equal a vocabulary without those tokens."""
    z, y, log_z = overlap_case(3, 12, dtype=dtype)
    kept = torch.arange(12) % 3 != 0
    log_z = y[:, kept].float().logsumexp(-1).to(log_z.dtype) + 0.1
    z, y = (t.detach().masked_fill(~kept, -torch.inf) for t in (z, y))
    values, gradient = evaluate(z.requires_grad_(), y, log_z, impl=impl)
    small = z.detach()[:, kept].requires_grad_()
    # Of the tokens that are kept, 2 is the second.
    expected, expected_gradient = evaluate(small, y[:, kept], log_z, token=1, impl=impl)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient[:, kept], expected_gradient)
    assert not gradient[:, ~kept].any()


def test_tokens_only_the_target_excludes(impl_case, impl):
    case = impl_case(3, 12)
    case.target_logits[:, 4] = -torch.inf
    values, gradient = evaluate(*case, impl=impl)
    assert values.isfinite().all() and gradient.isfinite().all()
    # Reverse KL is what is not small here: it must drive the draft off the excluded token.
    assert (values[3] > 1e20).all() and (gradient[:, 4] > 1e20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_the_target_shows(overlap_case, impl, dtype):
    """In one logit, and in logits and normalizer, as a broken hidden state leaves them."""
    z, y, log_z = overlap_case(4, 1100, dtype=dtype)
    y[1, 1050] = y[2] = log_z[2] = nan(dtype)
    terms = overlap_terms(z, y, log_z, impl=impl)
    for term in (terms.kl, terms.alpha, terms.log_alpha):
        assert term.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draft_without_a_logit(overlap_case, impl, dtype):
    """All of them -inf is no distribution, but the row must not spoil the batch."""
    z, y, log_z = overlap_case(3, 20, dtype=dtype)
    z = z.detach().clone()
    z[1] = -torch.inf
    values, gradient = evaluate(z.requires_grad_(), y, log_z, impl=impl)
    assert values[[0, 1, 2, 4]].isfinite().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("infinite", [True, False])
def test_non_finite_draft_logits_show(overlap_case, impl, infinite, dtype):
    z, y, log_z = overlap_case(3, 12, dtype=dtype)
    z = z.detach().clone()
    z[1, 5] = torch.inf if infinite else nan(dtype)
    terms = overlap_terms(z, y, log_z, impl=impl)
    for term in (terms.kl, terms.alpha, terms.log_alpha):
        assert term.isfinite().tolist() == [True, False, True]


def nan(dtype):
    """The nan that CUDA returns: every bit of its payload is set."""
    if dtype == torch.float64:
        return torch.tensor(2**63 - 1).view(dtype)
    return torch.tensor(2**31 - 1, dtype=torch.int32).view(dtype)


@pytest.mark.parametrize("vocabulary", [1, 37, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_draft_s_most_likely_token_is_the_first_of_its_highest_logits(
    overlap_case, impl, vocabulary, dtype
):
    z, y, log_z = (t.detach() for t in overlap_case(8, vocabulary, outside=9, dtype=dtype))
    z = z.round()  # many highest ones
    z[1] = -torch.inf
    z[2, vocabulary // 2 :] += 1000.0  # far above all before
    z[3, : vocabulary // 2] = -torch.inf
    y[4] = -torch.inf
    z[5, -1] = torch.nan
    mask = torch.arange(8) != 6
    terms = overlap_terms(z, y, log_z, mask=mask, impl=impl)
    expected = z.argmax(-1).masked_fill(~mask, 0)
    expected[4] = 0  # no coverage
    assert terms.draft_argmax.dtype == torch.int64 and not terms.draft_argmax.requires_grad
    assert ((terms.draft_argmax >= 0) & (terms.draft_argmax < vocabulary)).all()
    finite = torch.arange(8) != 5
    assert torch.equal(terms.draft_argmax[finite], expected[finite])


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 12 * 2, 1 << 20])
@pytest.mark.parametrize("masked", [True, False])
def test_chunks_change_nothing(overlap_case, monkeypatch, chunk_bytes, masked):
    case = overlap_case(3, 5, 12)
    mask = torch.arange(15).view(3, 5) % 4 > 0 if masked else None
    expected = evaluate(*case, impl="reference", mask=mask)
    monkeypatch.setattr(rows, "_CPU_CHUNK_BYTES", chunk_bytes)
    torch.testing.assert_close(evaluate(*case, impl="closed_form", mask=mask), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_any_strides(impl_case, impl, masked):
    """A window of a padded [B, T, V] (EAGLE-3's TTT steps), and a vocabulary that is not last."""
    z, y, log_z = impl_case(3, 5, 12)
    mask = torch.arange(15).view(3, 5) % 4 > 0 if masked else None
    expected, expected_gradient = evaluate(z, y, log_z, impl=impl, mask=mask)
    padded = torch.nn.functional.pad(y, (0, 0, 1, 2))[:, 1:6]
    with pytest.raises(RuntimeError):
        padded.view(-1, 12)  # or the test tests nothing
    transposed = z.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    values, gradient = evaluate(
        transposed, padded, log_z.t().contiguous().t(), impl=impl, mask=mask
    )
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_inputs_are_not_written_to(impl_case, impl):
    case = impl_case(3, 12)
    before = [t.detach().clone() for t in case]
    evaluate(*case, impl=impl, mask=torch.tensor([1, 0, 1]))
    evaluate(*case, impl=impl)
    for t, copy in zip(case, before, strict=True):
        torch.testing.assert_close(t.detach(), copy, rtol=0, atol=0)


def test_terms_may_be_written_to(impl_case, impl):
    case = impl_case(3, 12)
    _, expected = evaluate(*case, impl=impl)
    terms = overlap_terms(*case, tokens=torch.full((3,), 2), impl=impl, reverse_kl=True)
    total = sum(getattr(terms, name).clone() for name in NAMES).sum()
    for name in NAMES:
        getattr(terms, name).mul_(0)
    torch.testing.assert_close(torch.autograd.grad(total, case.draft_logits)[0], expected)
