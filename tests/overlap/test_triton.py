"""The Triton kernels through the interpreter: tiles, offsets, precision. What all implementations
of the overlap operation have in common is tested with them."""

from itertools import product

import pytest
import torch
from triton_interpreter import interpreted_triton

from specforge_lk.overlap import closed_form, triton_kernels, triton_tiles
from specforge_lk.overlap.contract import RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.differentiable import covered, differentiable
from specforge_lk.overlap.reference import reference

TILE = 256  # the interpreter's
LONG = 2 * TILE + 77
ALIGNED = 2 * TILE + 80


def terms_and_gradient(case, exact=False):
    """kl, alpha, log_alpha, reverse_kl, log_q [5, ...] and the gradient of their sum."""
    z, y, log_z = (t.detach().double() if exact else t.detach() for t in case)
    z.requires_grad_()
    tokens = torch.full_like(log_z, z.shape[-1] - 1).long()
    tokens.view(-1)[0] = -1
    mask = torch.ones_like(log_z, dtype=torch.bool)
    rows = RowInputs(log_z, None, mask, tokens, log_z.dtype, True)
    terms = reference(z, y, rows) if exact else differentiable(interpreted_triton(), z, y, rows)
    values = torch.stack([terms.kl, terms.alpha, terms.log_alpha, terms.reverse_kl, terms.log_q])
    return values.detach().double(), torch.autograd.grad(values.sum(), z)[0].double()


dtypes = pytest.mark.parametrize(
    ("dtype", "values_tolerance", "gradient_tolerance"),
    [
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 2e-6, 2e-6),
        # The gradient is rounded to the dtype of z; values are not.
        (torch.bfloat16, 2e-6, 1e-2),
        (torch.float16, 2e-6, 1e-3),
    ],
)


# Rows that begin at multiples of 16 logits and anywhere; one tile, whole tiles, a broken last one.
@pytest.mark.parametrize(
    "shape",
    [
        *((4, 1), (4, 37), (2, 2, TILE)),
        *(pytest.param((3, size), marks=pytest.mark.slow) for size in (LONG, ALIGNED)),
    ],
)
@dtypes
def test_error_norms(overlap_case, shape, dtype, values_tolerance, gradient_tolerance):
    case = overlap_case(*shape, scale=3.0, dtype=dtype)
    values, gradient = terms_and_gradient(case)
    expected, expected_gradient = terms_and_gradient(case, exact=True)
    torch.testing.assert_close(values, expected, rtol=values_tolerance, atol=values_tolerance)
    error = (gradient - expected_gradient).norm()
    # That of a single token is 0: what is left are the roundings of terms of size 1.
    assert error <= gradient_tolerance * expected_gradient.norm().clamp_min(1.0)


@pytest.mark.slow
@dtypes
def test_small_overlaps(overlap_case, dtype, values_tolerance, gradient_tolerance):
    """Down to log alpha of -200 the gradient is as exact as any; with none at all it is finite."""
    z, y, _ = (t.detach() for t in overlap_case(6, LONG, outside=0, dtype=dtype))
    y[:, 7] = -torch.inf
    z[:, 7] = torch.tensor([0.0, 60, 85, 90, 150, 200])
    z[5, :7] = z[5, 8:] = -torch.inf
    wide = torch.promote_types(dtype, torch.float32)
    log_z = y.to(wide).logsumexp(-1)
    rows = RowInputs(log_z, None, torch.ones(6, dtype=torch.bool), None, wide, False)
    exactly = rows._replace(log_normalizer=log_z.double(), dtype=torch.float64)

    def log_alpha_and_gradient(z, terms_of):
        terms = terms_of(z.requires_grad_())
        loss = (0.3 * terms.kl[:5] - 0.7 * terms.log_alpha[:5]).sum() + terms.log_alpha[5]
        return terms.log_alpha.detach().double(), torch.autograd.grad(loss, z)[0].double()

    log_alpha, gradient = log_alpha_and_gradient(
        z.clone(), lambda z: differentiable(interpreted_triton(), z, y, rows)
    )
    expected, expected_gradient = log_alpha_and_gradient(
        z.double(), lambda z: reference(z, y.double(), exactly)
    )
    assert expected[0] > -10 and (expected[3:] < -80).all() and expected[5] < -1e29
    torch.testing.assert_close(log_alpha, expected, rtol=values_tolerance, atol=0)
    # A difference of logits near 200 is exact to their rounding.
    tolerance = gradient_tolerance + 200 * torch.finfo(wide).eps
    error, scale = (t[:5].norm(dim=-1) for t in (gradient - expected_gradient, expected_gradient))
    assert (error <= tolerance * scale).all()
    assert gradient[5].isfinite().all()


def of_strides(shape, *strides):
    return torch.empty_strided(shape, strides, device="meta")


@pytest.mark.parametrize(
    ("logits", "grid", "looked_up"),
    [
        ([of_strides((48,), 1)], (1, 1), False),
        ([of_strides((3, 5, 48), 240, 48, 1)], (15, 1), False),
        ([of_strides((0, 5, 48), 240, 48, 1)], (0, 1), False),
        ([of_strides((3, 1, 48), 240, 7, 1)], (3, 1), False),
        # A window of one of them keeps both dimensions apart.
        ([of_strides((3, 5, 48), 240, 48, 1), of_strides((3, 5, 48), 480, 48, 1)], (5, 3), False),
        ([of_strides((2, 3, 5, 48), 9000, 240, 48, 1)], (15, 2), False),
        ([of_strides((2, 3, 5, 48), 9000, 960, 48, 1)], (30, 1), True),
        # More than a grid has in its second dimension.
        ([of_strides((70_000, 2, 48), 240, 48, 1)], (140_000, 1), True),
    ],
)
def test_grids(logits, grid, looked_up):
    found, layouts = triton_tiles.grid_of(*logits)
    assert found == grid
    assert [layout.lookup is not None for layout in layouts] == [looked_up] * len(logits)


@pytest.mark.slow
def test_rows_that_are_looked_up(overlap_case):
    z, y, log_z = (t.detach() for t in overlap_case(2, 3, 2, 48))
    rows = RowInputs(
        log_z.flatten(), None, torch.ones(12, dtype=torch.bool), None, log_z.dtype, True
    )
    expected = interpreted_triton().forward(z, y, rows)
    gradients = RowGradients(*(log_z.flatten() for _ in range(3)), None)
    expected_gradient = interpreted_triton().backward(z, y, rows, expected, gradients)
    z = z.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    y = torch.nn.functional.pad(y, (0, 0, 1, 1, 2, 0))[:, 2:, 1:3]
    assert all(layout.lookup is not None for layout in triton_tiles.grid_of(z, y)[1])
    torch.testing.assert_close(interpreted_triton().forward(z, y, rows), expected)
    gradient = interpreted_triton().backward(z, y, rows, expected, gradients)
    torch.testing.assert_close(gradient, expected_gradient)


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
    return window, turned, RowInputs(log_z.flatten(), None, mask, tokens, log_z.dtype, True)


@pytest.mark.slow
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


def test_gradient_may_overwrite_the_draft_logits(overlap_case):
    z, y, log_z = (t.detach() for t in overlap_case(3, LONG))
    kernels = interpreted_triton()
    rows = RowInputs(
        log_z, None, torch.tensor([True, False, True]), torch.arange(3), log_z.dtype, True
    )
    statistics = kernels.forward(z, y, rows)
    arguments = (y, rows, statistics, RowGradients(log_z, log_z, log_z, log_z))
    expected = kernels.backward(z, *arguments)
    assert kernels.backward(z, *arguments, out=z) is z
    torch.testing.assert_close(z, expected, rtol=0, atol=0)


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
    rows = RowInputs(log_z, None, torch.ones(2, dtype=torch.bool), None, log_z.dtype, True)
    near = interpreted_triton().forward(far.clone(), far.clone(), rows)
    for computed, expected in zip(interpreted_triton().forward(far, far, rows), near, strict=True):
        torch.testing.assert_close(computed, expected, rtol=0, atol=0)


def test_cpu_tensors_are_told_where_to_go(overlap_case):
    z, y, log_z = overlap_case(2, 3)
    rows = RowInputs(log_z, None, torch.ones(2, dtype=torch.bool), None, log_z.dtype, False)
    with pytest.raises(ValueError, match=r"GPU.*impl='closed_form'"):
        triton_kernels.forward(z, y, rows)
