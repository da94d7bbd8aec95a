"""The Triton kernels through the interpreter: tiles, offsets, precision. What all implementations
of the overlap operation have in common is tested with them."""

from itertools import product

import pytest
import torch
import triton
from triton_interpreter import interpreted_triton

from specforge_lk.overlap import closed_form, triton_kernels
from specforge_lk.overlap.contract import RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.differentiable import covered, differentiable
from specforge_lk.overlap.reference import reference

TILE = 4096  # the interpreter's
LONG = 2 * TILE + 77


def terms_and_gradient(case, log_coverage=None, exact=False):
    """kl, alpha, log_alpha, reverse_kl, log_q [5, ...] and the gradient of their sum."""
    z, y, log_z = (t.detach().double() if exact else t.detach() for t in case)
    z.requires_grad_()
    tokens = torch.full_like(log_z, z.shape[-1] - 1).long()
    tokens.view(-1)[0] = -1
    rows = RowInputs(log_z, log_coverage, torch.ones_like(log_z, dtype=torch.bool), tokens, True)
    if exact:
        terms = reference(z, y, rows._replace(log_coverage=None))
    else:
        terms = differentiable(interpreted_triton(), z, y, rows)
    values = torch.stack([terms.kl, terms.alpha, terms.log_alpha, terms.reverse_kl, terms.log_q])
    return values.detach().double(), torch.autograd.grad(values.sum(), z)[0].double()


@pytest.mark.parametrize("vocabulary", [7, TILE, LONG])
@pytest.mark.parametrize("give_log_coverage", [True, False])
@pytest.mark.parametrize(
    ("dtype", "values_tolerance", "gradient_tolerance"),
    [
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 2e-6, 2e-6),
        # The gradient is rounded to the dtype of z; values are not.
        (torch.bfloat16, 2e-6, 1e-2),
        (torch.float16, 2e-6, 1e-3),
    ],
)
def test_error_norms(
    overlap_case, dtype, vocabulary, give_log_coverage, values_tolerance, gradient_tolerance
):
    case = overlap_case(2, 2, vocabulary, scale=3.0, dtype=dtype)
    log_c = None
    if give_log_coverage:
        log_c = case.target_logits.to(case.log_normalizer.dtype).logsumexp(-1) - case.log_normalizer
    values, gradient = terms_and_gradient(case, log_c)
    expected, expected_gradient = terms_and_gradient(case, exact=True)
    torch.testing.assert_close(values, expected, rtol=values_tolerance, atol=values_tolerance)
    error = (gradient - expected_gradient).norm()
    assert error <= gradient_tolerance * expected_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_vocabulary(overlap_case, dtype):
    case = overlap_case(2, 262_144, dtype=dtype)
    values, gradient = terms_and_gradient(case)
    expected, expected_gradient = terms_and_gradient(case, exact=True)
    torch.testing.assert_close(values, expected, rtol=5e-6, atol=5e-6)
    error = (gradient - expected_gradient).norm()
    assert error <= (2e-6 if dtype == torch.float32 else 1e-2) * expected_gradient.norm()


@pytest.fixture
def awkward_rows(overlap_case):
    """Arguments of `Kernels.forward` in float64, [3, 3, V]: a window with gaps, a vocabulary that
    is not last in memory, tokens excluded in either or both, rows without coverage, skipped rows
    of nan."""
    z, y, log_z = (t.detach() for t in overlap_case(3, 3, LONG, seed=2))
    z[:, :, ::5], y[:, :, ::7] = -torch.inf, -torch.inf
    z[0, 1] = -torch.inf
    y[1, 0], log_z[1, 1] = -torch.inf, torch.inf
    z[1, 2], y[1, 2, 5:] = 0.0, -torch.inf
    z[2, 0], y[2, 0] = torch.nan, torch.nan
    mask = torch.ones(9, dtype=torch.bool)
    mask[6] = False
    tokens = torch.tensor([0, 3, -1, 5, 5, LONG - 1, 7, 5, TILE])
    window = torch.nn.functional.pad(z, (0, 0, 1, 2))[:, 1:4]
    turned = y.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return window, turned, RowInputs(log_z.flatten(), None, mask, tokens, True)


def test_statistics_are_the_closed_form_s(awkward_rows):
    z, y, inputs = awkward_rows
    computed = interpreted_triton().forward(z, y, inputs)
    expected = closed_form.forward(z, y, inputs)
    covered = expected.target_log_sum != -torch.inf
    assert covered.tolist() == [True] * 3 + [False] * 2 + [True] * 4
    for name, value, reference_value in zip(RowStatistics._fields, computed, expected, strict=True):
        # Of rows without coverage the contract says nothing but terms and target_log_sum.
        rows = covered if name in ("draft_shift", "draft_log_sum") else slice(None)
        torch.testing.assert_close(value[rows], reference_value[rows], msg=name)
    unasked = inputs._replace(reverse_kl=False)
    assert not interpreted_triton().forward(z, y, unasked).reverse_kl.any()


@pytest.mark.parametrize("given", list(product([True, False], repeat=4)))
def test_gradients_are_the_closed_form_s(awkward_rows, given):
    z, y, rows = awkward_rows
    statistics = closed_form.forward(z, y, rows)
    rows = covered(rows, statistics)
    generator = torch.Generator().manual_seed(0)
    gradients = RowGradients(
        *(torch.randn(9, generator=generator).double() if g else None for g in given)
    )
    if gradients.log_q is not None:
        gradients.log_q[rows.tokens < 0] = 0
    arguments = (z, y, rows, statistics, gradients)
    computed = interpreted_triton().backward(*arguments)
    assert computed.is_contiguous() and not computed.view(9, -1)[~rows.mask].any()
    torch.testing.assert_close(computed, closed_form.backward(*arguments))


def test_in_place_gradient_survives_the_autotuner(overlap_case, monkeypatch):
    """It times each tile by running the kernel, which overwrites what the next run reads."""
    z, y, log_z = (t.detach() for t in overlap_case(3, LONG))
    kernels = interpreted_triton()
    rows = RowInputs(log_z, None, torch.tensor([True, False, True]), torch.arange(3), True)
    statistics = kernels.forward(z, y, rows)
    arguments = (y, rows, statistics, RowGradients(log_z, log_z, log_z, log_z))
    expected = kernels.backward(z, *arguments)

    runs = []

    def time_twice(run, quantiles):
        runs.append((run(), run()))
        return [1.0]

    tuner = kernels._backward_kernel
    monkeypatch.setattr(tuner, "configs", [triton.Config({"BLOCK": b}) for b in (1024, 2048)])
    monkeypatch.setitem(vars(tuner), "do_bench", time_twice)
    assert kernels.backward(z, *arguments, out=z) is z and len(runs) == 2
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("name", ["draft_logits", "target_logits", "log_normalizer"])
def test_nan_shows(overlap_case, name):
    """Even among logits of -inf: a maximum that drops nan would take the row for an empty one."""
    case = overlap_case(2, LONG)
    case = case._replace(draft_logits=case.draft_logits.detach())
    broken = getattr(case, name)[1:]
    if broken.dim() == 2:
        broken.fill_(-torch.inf)[:, LONG - 1] = torch.nan
    else:
        broken.fill_(torch.nan)
    values, _ = terms_and_gradient(case)
    # log q is the draft's alone.
    of_all = values if name == "draft_logits" else values[:-1]
    assert values[:, 0].isfinite().all() and of_all[:, 1].isnan().all()


def test_rows_further_apart_than_32_bits_reach():
    """Memory is reserved, not used."""
    far = torch.empty((1 << 31) + 8, dtype=torch.bfloat16).as_strided((2, 8), (1 << 31, 1))
    far.copy_(torch.arange(16.0).view(2, 8).sin())
    log_z = far.float().logsumexp(-1)
    rows = RowInputs(log_z, None, torch.ones(2, dtype=torch.bool), None, True)
    near = interpreted_triton().forward(far.clone(), far.clone(), rows)
    for computed, expected in zip(interpreted_triton().forward(far, far, rows), near, strict=True):
        torch.testing.assert_close(computed, expected, rtol=0, atol=0)


def test_cpu_tensors_are_told_where_to_go(overlap_case):
    z, y, log_z = overlap_case(2, 3)
    rows = RowInputs(log_z, None, torch.ones(2, dtype=torch.bool), None, False)
    with pytest.raises(ValueError, match=r"GPU.*impl='closed_form'"):
        triton_kernels.forward(z, y, rows)
