"""The overlap of hidden states and LM heads: equal to that of their logits, without the logits."""

import pytest
import torch
import torch.nn.functional as F

from specforge_lk.overlap import Projection, linear, linear_overlap, overlap_terms

NAMES = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q")
# Of every position; the first one's is outside the draft vocabulary.
TOKENS = torch.arange(-1, 17).view(2, 9)
V, H, TARGET_H, OUTSIDE = 37, 8, 6, 5
implementations = pytest.mark.parametrize(
    "impl", ["reference", "closed_form", "cpu"], indirect=True
)


def make_case(dtype):
    """Make draft hidden states and LM head, those of the target, and log Z: [2, 9, ...]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    target = Projection(random(2, 9, TARGET_H), random(V + OUTSIDE, TARGET_H))
    log_z = F.linear(*target).logsumexp(-1)
    target = Projection(target.hidden, target.weight[:V])
    return random(2, 9, H).requires_grad_(), random(V, H).requires_grad_(), target, log_z


@pytest.fixture
def case():
    return make_case(torch.float64)


@pytest.fixture
def impl_case(impl_dtype):
    """As `case`, in the dtype that ``impl`` is tested in."""
    return make_case(impl_dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """Four positions to a chunk."""
    monkeypatch.setattr(linear, "_CPU_CHUNK_BYTES", 4 * V * 8)


def evaluate(terms, inputs, shape):
    """Terms [5, ...] and the gradients of a random combination of them."""
    generator = torch.Generator().manual_seed(1)
    values = torch.stack([getattr(terms, name) for name in NAMES])
    factors = torch.randn(5, *shape, generator=generator).to(values.dtype)
    return values.detach(), *torch.autograd.grad((factors * values).sum(), inputs)


@implementations
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_equals_the_operation_on_logits(impl_case, small_chunks, impl, masked, projected):
    hidden, head, target, log_z = impl_case
    logits = F.linear(*target)
    # A window of a padded tensor, as the steps of EAGLE-3's training-time test have it.
    window = F.pad(logits, (0, 0, 1, 2))[:, 1:10]
    mask = torch.arange(18).view(2, 9) % 3 > 0 if masked else None
    options = {"mask": mask, "tokens": TOKENS, "reverse_kl": True, "impl": impl}
    expected = evaluate(
        overlap_terms(F.linear(hidden, head), logits, log_z, **options), (hidden, head), (2, 9)
    )
    computed = evaluate(
        linear_overlap(hidden, head, target if projected else window, log_z, **options),
        (hidden, head),
        (2, 9),
    )
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b)
    argmax = [
        of_hidden.draft_argmax
        for of_hidden in (
            linear_overlap(hidden, head, target, log_z, **options),
            overlap_terms(F.linear(hidden, head), logits, log_z, **options),
        )
    ]
    assert torch.equal(*argmax) and argmax[0].any()


@implementations
@pytest.mark.parametrize("projected", [True, False])
def test_a_full_vocabulary_needs_no_log_normalizer(impl_case, small_chunks, impl, projected):
    hidden, head, target, _ = impl_case
    logits = F.linear(*target)
    options = {"tokens": TOKENS, "reverse_kl": True, "impl": impl}
    computed, expected = (
        evaluate(
            linear_overlap(hidden, head, target if projected else logits, log_z, **options),
            (hidden, head),
            (2, 9),
        )
        for log_z in (None, logits.logsumexp(-1))
    )
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["closed_form", "cpu"], indirect=True)
def test_masked_positions_are_not_read(impl_case, small_chunks, impl):
    hidden, head, target, log_z = impl_case
    mask = torch.arange(18).view(2, 9) % 3 > 0
    options = {"mask": mask, "tokens": TOKENS, "reverse_kl": True, "impl": impl}
    expected = evaluate(linear_overlap(*impl_case, **options), (hidden, head), (2, 9))
    broken = torch.where(mask[..., None], hidden.detach(), torch.nan).requires_grad_()
    terms = linear_overlap(broken, head, target, log_z, **options)
    for a, b in zip(evaluate(terms, (broken, head), (2, 9)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["closed_form", "cpu"], indirect=True)
def test_positions_without_coverage(impl_case, small_chunks, impl):
    hidden, head, target, log_z = impl_case
    log_z[0, 3] = torch.inf
    terms = linear_overlap(hidden, head, target, log_z, impl=impl, tokens=TOKENS, reverse_kl=True)
    assert terms.log_coverage[0, 3] == -torch.inf
    values, grad_hidden, grad_head = evaluate(terms, (hidden, head), (2, 9))
    assert not values[:, 0, 3].any() and not grad_hidden[0, 3].any()
    assert grad_head.isfinite().all()


def test_rows_are_chosen_once(monkeypatch):
    """A GPU waits for their number; the backward pass has it from the forward pass."""
    case = make_case(torch.float32)
    calls = []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda mask: calls.append(1) or nonzero(mask))
    terms = linear_overlap(*case, mask=torch.ones(2, 9), impl="cpu")
    terms.kl.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(case, frozen):
    inputs = list(case[:2])
    inputs[frozen] = inputs[frozen].detach()
    terms = linear_overlap(*inputs, *case[2:])
    terms.kl.sum().backward()
    assert inputs[frozen].grad is None and inputs[1 - frozen].grad.any()


def test_low_precision_heads_add_up_chunks_in_float32(case, small_chunks):
    hidden, head, target, log_z = case
    hidden, head = (t.detach().bfloat16().requires_grad_() for t in (hidden, head))
    rounded = [t.detach().double().requires_grad_() for t in (hidden, head)]
    exact = evaluate(
        linear_overlap(*rounded, target, log_z, tokens=TOKENS, reverse_kl=True), rounded, (2, 9)
    )
    terms = linear_overlap(
        hidden, head, F.linear(*target).float(), log_z, tokens=TOKENS, reverse_kl=True
    )
    for a, b in zip(evaluate(terms, (hidden, head), (2, 9))[1:], exact[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_autocast_reaches_the_backward_pass(case):
    hidden, head, _, log_z = (t.float() if isinstance(t, torch.Tensor) else t for t in case)
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    logits = F.linear(*case[2]).float()
    with torch.autocast("cpu", torch.bfloat16):
        terms = linear_overlap(hidden, head, logits, log_z, tokens=TOKENS, reverse_kl=True)
        materialized = overlap_terms(
            F.linear(hidden, head), logits, log_z, tokens=TOKENS, reverse_kl=True
        )
    computed = evaluate(terms, (hidden, head), (2, 9))
    expected = evaluate(materialized, (hidden, head), (2, 9))
    torch.testing.assert_close(computed[0], expected[0])
    for a, b in zip(computed[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_autocast_around_the_backward_pass_changes_nothing(case):
    case = [t.float() if isinstance(t, torch.Tensor) else t for t in case]
    hidden, head = (t.detach().requires_grad_() for t in case[:2])
    target = Projection(*(t.float() for t in case[2]))
    expected = evaluate(
        linear_overlap(hidden, head, target, case[3], tokens=TOKENS, reverse_kl=True),
        (hidden, head),
        (2, 9),
    )
    terms = linear_overlap(hidden, head, target, case[3], tokens=TOKENS, reverse_kl=True)
    with torch.autocast("cpu", torch.bfloat16):
        computed = evaluate(terms, (hidden, head), (2, 9))
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_logits_are_ever_whole(case, small_chunks):
    hidden, head, target, log_z = case
    hidden = hidden.detach().repeat(10, 1, 1).requires_grad_()
    target = Projection(target.hidden.repeat(10, 1, 1), target.weight)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_overlap(hidden, head, target, log_z.repeat(10, 1)).kl.sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = [e.nbytes() for e in events]
    # The statistics, nine values per position, are more than the gradient of the hidden states.
    assert max(allocated) == 180 * 9 * 8 < 180 * V * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, 9, V + 1)}, r"draft_head.T and target.*38"),
        ({"log_normalizer": torch.zeros(2, 1)}, "log_normalizer"),
        ({"mask": torch.zeros(9)}, "mask"),
        ({"impl": "fast"}, "unknown"),
        ({"draft_hidden": torch.zeros(H)}, "at least one dimension"),
    ],
)
def test_what_does_not_fit_is_named(case, change, message):
    names = ("draft_hidden", "draft_head", "target", "log_normalizer")
    with pytest.raises(ValueError, match=message):
        linear_overlap(**dict(zip(names, case, strict=True)) | change)
