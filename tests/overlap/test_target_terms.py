"""What the overlap operation takes of a target: from logits, and from hidden states by chunks."""

import math

import pytest
import torch
from specforge.core.target_distribution import TargetDistribution
from triton_interpreter import interpreted_triton

from benchmarks.measure import peak_allocated
from specforge_lk import overlap
from specforge_lk.losses import KL, KLOptions
from specforge_lk.overlap import projected_target_terms, target_terms


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def impl(request, monkeypatch):
    """Each implementation in turn; Triton's kernel is interpreted, on CPU tensors."""
    if request.param == "triton":
        interpreted = interpreted_triton("triton_target")
        monkeypatch.setattr(overlap, "triton_target", interpreted, raising=False)
    return request.param


def logits_of(*shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def kept_of(vocabulary, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(vocabulary, generator=generator)[:count].sort().values


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 1), 1), ((2, 3, 37), 11), ((4, 592), 600 // 2), ((50257,), 5000)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(impl, shape, count, dtype):
    logits, kept = logits_of(*shape, dtype=dtype), kept_of(shape[-1], count)
    terms = target_terms(logits, kept, impl=impl)
    exact = logits.double()
    log_p = exact.log_softmax(-1)
    close = (
        {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    )
    assert terms.logits.dtype == dtype and torch.equal(terms.logits, logits[..., kept])
    assert terms.log_normalizer.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(terms.log_normalizer.double(), exact.logsumexp(-1), **close)
    expected = log_p[..., kept].logsumexp(-1)
    torch.testing.assert_close(terms.log_coverage.double(), expected, **close)
    assert torch.equal(terms.token_ids, logits.argmax(-1))


def test_a_full_vocabulary_is_not_copied(impl):
    logits = logits_of(2, 3, 37)
    terms = target_terms(logits, impl=impl)
    assert terms.logits is logits
    assert terms.log_coverage.tolist() == [[0.0] * 3] * 2
    torch.testing.assert_close(terms.log_normalizer, logits.logsumexp(-1))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_windows_and_any_index(impl, index):
    """Tokens in any order, as often as they come."""
    kept = torch.tensor([5, 0, 36, 5], dtype=index)
    logits = logits_of(3, 9, 37)[:, 2:7]
    terms = target_terms(logits, kept, impl=impl)
    assert torch.equal(terms.logits, logits[..., kept.long()])
    assert torch.equal(terms.token_ids, logits.argmax(-1))
    torch.testing.assert_close(terms.log_normalizer, logits.logsumexp(-1))


def test_the_most_likely_token_is_the_first_of_the_highest(impl):
    logits = logits_of(6, 600).round()
    logits[0] = 0.0
    logits[1, 300:] = 50.0
    assert torch.equal(target_terms(logits, impl=impl).token_ids, logits.argmax(-1))


def test_awkward_positions(impl):
    """Without a target, without coverage, with next to none, with tokens excluded, with nan."""
    logits, kept = logits_of(6, 600), torch.arange(100)
    logits[0] = -math.inf
    logits[1, :100] = -math.inf
    logits[2, 300] = 200.0
    logits[3, ::2] = -math.inf
    logits[4, 550] = math.nan
    logits[5, 7] = math.nan
    terms = target_terms(logits, kept, impl=impl)
    assert terms.log_normalizer[0] == math.inf
    assert terms.log_coverage[:2].tolist() == [-math.inf] * 2
    exact = logits.double().log_softmax(-1)[:, kept].logsumexp(-1)
    assert exact[2] < -180
    torch.testing.assert_close(terms.log_coverage[2:4].double(), exact[2:4], rtol=1e-6, atol=0)
    assert terms.log_normalizer[4:].isnan().all() and terms.log_coverage[4:].isnan().all()
    assert terms.log_normalizer[1:4].isfinite().all()
    assert ((terms.token_ids >= 0) & (terms.token_ids < 600)).all()


def test_no_positions(impl):
    terms = target_terms(logits_of(2, 0, 37), torch.arange(5), impl=impl)
    assert terms.logits.shape == (2, 0, 5) and terms.log_normalizer.shape == (2, 0)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("restricted", [True, False])
def test_projected_in_chunks(impl, rows, restricted):
    states, weight, asked = logits_of(2, 5, 8), logits_of(37, 8), []

    def project(part):
        asked.append(len(part))
        return part @ weight.T

    kept = torch.arange(0, 37, 3) if restricted else None
    terms = projected_target_terms(states, project, kept, rows=rows, impl=impl)
    # Every position is multiplied once, for both vocabularies.
    assert sum(asked) == 10 and max(asked) <= rows
    for found, expected in zip(terms, target_terms(states @ weight.T, kept), strict=True):
        torch.testing.assert_close(found, expected)
    none = projected_target_terms(states[:0], project, kept, rows=rows, impl=impl)
    assert none.logits.shape == (0, 5, 13 if restricted else 37)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restricted", [True, False])
def test_a_loss_s_target_is_that_of_specforge(dtype, restricted):
    """Which shifts logits and widens them to float32, where a loss has no `restrict_target`."""
    logits = logits_of(4, 5, 200, dtype=dtype, scale=8.0)
    t2d = torch.arange(200) % 4 == 1 if restricted else None
    theirs = TargetDistribution.from_logits(logits, t2d)
    loss = KL(KLOptions())
    ours = TargetDistribution.from_logits(logits, t2d, restrict=loss.restrict_target)
    assert theirs.logits.dtype == torch.float32 and ours.logits.dtype == dtype
    assert (ours.logits.data_ptr() == logits.data_ptr()) is not restricted
    assert torch.equal(ours.token_ids, theirs.token_ids)
    draft = logits_of(4, 5, ours.logits.shape[-1])
    found, expected = (_terms_and_gradient(loss, draft, t) for t in (ours, theirs))
    for name in expected:
        # Differences of logits and a normalizer near 25 are rounded to 1e-6 each.
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("restricted", [True, False])
def test_a_target_in_half_precision_is_never_widened(restricted):
    logits = logits_of(256, 8192, dtype=torch.bfloat16)
    t2d = torch.arange(8192) % 4 == 1 if restricted else None
    loss = KL(KLOptions())
    theirs = peak_allocated(lambda: TargetDistribution.from_logits(logits, t2d))
    ours = peak_allocated(
        lambda: TargetDistribution.from_logits(logits, t2d, restrict=loss.restrict_target)
    )
    # Two copies in float32.
    assert theirs >= 2 * 4 * logits.numel()
    returned = 2 * logits.numel() // 4 if restricted else 0
    assert ours - returned < theirs / 20


def _terms_and_gradient(loss, draft, target):
    draft = draft.clone().requires_grad_()
    terms = loss.terms(draft, target, torch.ones(draft.shape[:-1], dtype=torch.bool))
    total = (terms["kl"] + terms["alpha"]).sum()
    return {**terms, "gradient": torch.autograd.grad(total, draft)[0]}


@pytest.mark.parametrize(
    ("kept", "options", "message"),
    [
        (torch.ones(37, dtype=torch.bool), {}, r"int32 or int64.*t2d.nonzero"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, r"shape \[V_d\]"),
        (None, {"impl": "fast"}, "auto, reference, cpu, triton"),
        (None, {"impl": "triton"}, r"GPU.*impl='reference'"),
    ],
)
def test_what_does_not_fit_is_named(kept, options, message):
    with pytest.raises(ValueError, match=message):
        target_terms(logits_of(2, 37), kept, **options)


def test_chunks_have_rows():
    with pytest.raises(ValueError, match="rows must be at least 1"):
        projected_target_terms(logits_of(2, 8), lambda part: part, rows=0)
