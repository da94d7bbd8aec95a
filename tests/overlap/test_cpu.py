"""The C++ implementation: float32 arithmetic, reading and writing of rows, compilation."""

import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rounding import rounding

from specforge_lk.overlap import fused_cpu, overlap_terms
from specforge_lk.overlap.contract import RowGradients, RowInputs

NAMES = ("kl", "alpha", "log_alpha", "reverse_kl", "log_q")


def tokens_of(logits):
    """A token of the last for every row; the first row's is outside the draft vocabulary."""
    rows, vocabulary = torch.arange(len(logits)), logits.shape[-1]
    return (vocabulary - 1 - rows % vocabulary).masked_fill(rows == 0, -1)


def evaluate(case, impl, dtype=None):
    """Terms [5, N] and the gradient of each of them, [5, N, V]; computed in ``dtype``."""
    z, y, log_z = (t.detach().to(dtype or t.dtype) for t in case)
    z.requires_grad_()
    terms = overlap_terms(z, y, log_z, tokens=tokens_of(z), impl=impl, reverse_kl=True)
    values = [getattr(terms, name) for name in NAMES]
    gradients = [torch.autograd.grad(v.sum(), z, retain_graph=True)[0] for v in values]
    return torch.stack(values).detach().double(), torch.stack(gradients).double()


def exponential_error(distance=0.0):
    """Relative error of an exponential in float32.

    That of its polynomial, and of an argument that is rounded twice. Tokens whose share is below
    e^-16 do not count, so the argument is up to 16 from the ones that do; add the distance of the
    highest logit from the first block's, which the exponents are taken from.
    """
    return 7.5e-8 + 2 * 2**-24 * (16 + distance)


def assert_exact(case, distance=0.0):
    """Values and gradients against the definition in float64.

    Gradients are differences: errors are counted against the norm of what is subtracted.
    """
    values, gradients = evaluate(case, "cpu")
    expected_values, expected = evaluate(case, "reference", torch.float64)
    torch.testing.assert_close(values, expected_values, rtol=5e-6, atol=5e-6)

    z, y, log_z = (t.detach().double() for t in case)
    q, p = torch.softmax(z, -1), torch.softmax(y, -1)
    ratio = y.clamp_min(-1e30) - log_z[:, None] - z.log_softmax(-1).clamp_min(-1e30)
    _, alpha, _, reverse, _ = expected_values
    norm = q.norm(dim=-1)
    scale = [
        *(norm + p.norm(dim=-1), norm, norm / alpha, (q * ratio).norm(dim=-1) + norm * reverse),
        norm + (tokens_of(z) >= 0),
    ]
    error = (gradients - expected).norm(dim=-1) / torch.stack(scale)
    assert error.max() < exponential_error(distance)


# Whole and broken vectors, one block and several, a vocabulary of one token.
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 1000, 1024, 1025, 4099, 32000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 5.0])
def test_float32_gradients(overlap_case, vocabulary, scale):
    assert_exact(overlap_case(5, vocabulary, outside=9, scale=scale, dtype=torch.float32))


def test_relative_errors_of_gradients(overlap_case):
    case = overlap_case(20, 32000, outside=1000, dtype=torch.float32)
    for computed, expected in zip(
        evaluate(case, "cpu")[1], evaluate(case, "reference", torch.float64)[1], strict=True
    ):
        assert (computed - expected).norm() < exponential_error() * expected.norm()


def test_large_logits_lose_no_digits(overlap_case):
    z, y, _ = overlap_case(4, 3000, dtype=torch.float32)
    # Multiples of 2^-7 stay exact when 96 is added.
    z, y = ((t.detach() * 128).round() / 128 for t in (z, y))
    assert_exact((z + 96, y + 96, (y + 96).double().logsumexp(-1).float() + 0.25))


def test_draft_and_target_alike_up_to_a_constant(overlap_case):
    """Ties up to the rounding of log Z: all tokens must fall on one side of it together."""
    _, y, _ = overlap_case(6, 3000, dtype=torch.float32)
    y = (y * 128).round() / 128
    for case in ((y + 2, y, y.logsumexp(-1)), (y + 2, y + 3, (y + 3).logsumexp(-1))):
        _, gradients = evaluate(case, "cpu")
        # That of log q is no difference of the two.
        assert gradients[:-1].norm(dim=-1).max() < 1e-6


def test_the_highest_logit_comes_late(overlap_case):
    """Sums start from the first block's maximum and must not overflow."""
    z, y, log_z = (t.detach() for t in overlap_case(4, 5000, dtype=torch.float32))
    for above in (60.0, 90.0, 1000.0):
        late = z.clone()
        late[:, 3000:3010] += above
        # Where the sum would overflow, exponents are taken from the highest logit after all.
        assert_exact((late, y, log_z), above if above < 69 else 0.0)


@pytest.mark.parametrize("excluded", [slice(0, 1024), slice(1024, 2048), slice(5, 2500)])
def test_blocks_of_excluded_tokens(overlap_case, excluded):
    z, y, log_z = (t.detach() for t in overlap_case(4, 3000, dtype=torch.float32))
    z[:, excluded] = y[:, excluded] = -torch.inf
    assert_exact((z, y, log_z))


def test_target_without_some_tokens_against_a_draft_without_overlap(overlap_case):
    """The sum of reverse KL, which nobody asked for, overflows beside them."""
    z, y, log_z = (t.detach() for t in overlap_case(4, 3000, dtype=torch.float32))
    y[:, 100:2000] = -torch.inf
    z[:, 1500] += 60
    z.requires_grad_()
    for impl in ("cpu", "reference"):
        terms = overlap_terms(z, y, log_z, impl=impl)
        (gradient,) = torch.autograd.grad((terms.kl + terms.log_alpha).sum(), z)
        if impl == "cpu":
            computed = gradient
    assert (computed - gradient).norm() < 1e-5 * gradient.norm()


def test_coverage_that_underflows(overlap_case):
    z, y, log_z = (t.detach() for t in overlap_case(3, 2000, dtype=torch.float32))
    terms = overlap_terms(z, y, log_z + 150, impl="cpu")
    far = (log_z + 150).double()
    exact = overlap_terms(z.double(), y.double(), far, impl="reference")
    # log p is a difference of logits from it; the sums over p̃ are averages.
    close = rounding(far, torch.float32, 2)
    for name in ("kl", "log_alpha", "log_coverage"):
        torch.testing.assert_close(getattr(terms, name).double(), getattr(exact, name), **close)
    z.requires_grad_()
    terms = overlap_terms(z, y, log_z + 150, impl="cpu")
    (gradient,) = torch.autograd.grad((terms.kl - terms.log_alpha).sum(), z)
    zd = z.detach().double().requires_grad_()
    exact = overlap_terms(zd, y.double(), far, impl="reference")
    (expected,) = torch.autograd.grad((exact.kl - exact.log_alpha).sum(), zd)
    assert (gradient.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("vocabulary", [8, 1003])
@pytest.mark.parametrize(
    "dtypes",
    [*itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)],
    ids=str,
)
def test_every_mixture_of_dtypes(overlap_case, vocabulary, dtypes):
    """Low-precision logits are read exactly, and the gradient is rounded once, as torch does."""
    z, y, log_z = (t.detach() for t in overlap_case(4, vocabulary, dtype=torch.float32))
    z, y = z.to(dtypes[0]).requires_grad_(), y.to(dtypes[1])
    wide = z.detach().float().requires_grad_()
    gradients = []
    for draft, target in ((z, y), (wide, y.float())):
        terms = overlap_terms(draft, target, log_z, tokens=tokens_of(draft), impl="cpu")
        of_all = (terms.kl + terms.log_alpha - terms.log_q).sum()
        gradients += torch.autograd.grad(of_all, draft)
    assert gradients[0].dtype == dtypes[0]
    assert torch.equal(gradients[0], gradients[1].to(dtypes[0]))


def test_threads_change_nothing(overlap_case):
    case = overlap_case(300, 1500, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(case, "cpu"))
    finally:
        torch.set_num_threads(before)
    for values, gradients in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(gradients, results[0][1])


@pytest.mark.parametrize("impl", ["cpu", "closed_form"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_may_overwrite_the_draft_logits(overlap_case, impl, dtype):
    from specforge_lk.overlap import closed_form

    kernels = {"cpu": fused_cpu, "closed_form": closed_form}[impl]
    z, y, log_z = (t.detach() for t in overlap_case(5, 1029, dtype=dtype))
    rows = RowInputs(
        log_z, None, torch.tensor([1, 0, 1, 1, 0]).bool(), torch.arange(5), log_z.dtype, True
    )
    statistics = kernels.forward(z, y, rows)
    gradients = RowGradients(*torch.ones(4, 5, dtype=log_z.dtype))
    arguments = (z, y, rows, statistics, gradients)
    expected = kernels.backward(*arguments)
    assert not torch.equal(expected, z)
    assert kernels.backward(*arguments, out=z) is z
    assert torch.equal(z, expected)


def test_tensors_elsewhere_are_refused():
    z = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"meta.*impl='auto'"):
        overlap_terms(z, z, torch.zeros(2, device="meta"), impl="cpu")


# ---------------------------------------------------------------------------- compilation


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
    """An empty cache, in a process that has not loaded the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (fused_cpu.library, fused_cpu.available):
        function.cache_clear()
    yield tmp_path / "specforge-lk"
    monkeypatch.undo()
    for function in (fused_cpu.library, fused_cpu.available):
        function.cache_clear()


def test_compiles_once(nothing_compiled, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="specforge_lk"):
        fused_cpu.library()
    assert "compiling" in caplog.text
    (built,) = nothing_compiled.iterdir()
    fused_cpu.library.cache_clear()
    compiled = built.stat().st_mtime_ns
    fused_cpu.library()
    assert built.stat().st_mtime_ns == compiled


def test_a_cpu_with_the_least_instructions(nothing_compiled, monkeypatch, overlap_case):
    """Of x86-64 those have neither wide vectors nor a fused multiply-add."""
    flags = tuple(flag for flag in fused_cpu._FLAGS if flag != "-march=native")
    monkeypatch.setattr(fused_cpu, "_FLAGS", flags)
    test_large_logits_lose_no_digits(overlap_case)
    test_the_highest_logit_comes_late(overlap_case)
    assert len(list(nothing_compiled.iterdir())) == 1


def test_a_library_for_another_cpu_is_not_loaded(nothing_compiled, monkeypatch):
    """Machines may share a home; on the lesser one it would be an illegal instruction."""
    fused_cpu.library()
    (built,) = nothing_compiled.iterdir()
    built.unlink()  # a new file: this process has mapped the old one
    built.touch()
    fused_cpu.library.cache_clear()
    monkeypatch.setattr(fused_cpu, "_instructions", lambda: "flags : fpu")
    fused_cpu.library()
    assert built.read_bytes() == b"" and len(list(nothing_compiled.iterdir())) == 2


@pytest.mark.slow
def test_processes_may_compile_at_the_same_time(nothing_compiled):
    code = "from specforge_lk.overlap import fused_cpu; print(fused_cpu.available())"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["True", "True"]
    assert len(list(nothing_compiled.iterdir())) == 1


def test_without_a_compiler_the_closed_form_takes_over(
    nothing_compiled, monkeypatch, caplog, overlap_case
):
    case = overlap_case(3, 20, dtype=torch.float32)
    expected = overlap_terms(*case, impl="closed_form")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    for _ in range(2):
        assert torch.equal(overlap_terms(*case).alpha, expected.alpha)
    assert caplog.text.count("no C++ compiler") == 1
    with pytest.raises(fused_cpu.CompilerError, match="set CXX"):
        overlap_terms(*case, impl="cpu")


def test_a_failing_compiler_is_quoted(nothing_compiled, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho unsupported option >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(fused_cpu.CompilerError, match=r"failed \(3\):\nunsupported option"):
        fused_cpu.library()
    assert list(nothing_compiled.iterdir()) == []


SHORT_OF_THREADS = """
import resource
from pathlib import Path

import torch
from specforge_lk import overlap_terms

z = torch.randn(3000, 64)
y = torch.randn(3000, 64)
log_z = y.logsumexp(-1)
expected = overlap_terms(z, y, log_z, impl="cpu").kl
torch.set_num_threads(64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
# Room for two stacks of the 63 threads.
limit = pages * resource.getpagesize() + (20 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
assert torch.equal(overlap_terms(z, y, log_z, impl="cpu").kl, expected)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_fewer_threads_than_asked_for_will_do():
    done = subprocess.run([sys.executable, "-c", SHORT_OF_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_is_not_there(nothing_compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(fused_cpu.CompilerError, match=r"none cannot be run.*set CXX"):
        fused_cpu.library()


def test_a_cache_that_cannot_be_written(nothing_compiled, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not fused_cpu.available()
    with pytest.raises(fused_cpu.CompilerError, match="XDG_CACHE_HOME"):
        fused_cpu.library()
