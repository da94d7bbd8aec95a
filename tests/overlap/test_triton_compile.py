"""The Triton kernels compiled ahead of time for GPUs that are not there."""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from specforge_lk.overlap import triton_kernels
from specforge_lk.overlap.contract import RowGradients, RowInputs

pytestmark = pytest.mark.slow

VOCABULARY = 32_000


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Make every launch on ``arch`` compile all tiles instead, and return [(tile, kernel)].

    The launchers themselves run, on tensors without memory, so that what is compiled has the
    signature, alignments and constants that a launch would have. Nothing is interpreted: the
    module is the one that programs import.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = []

    def compile_all(tuner, *arguments, warmup, **options):
        kernels.extend(zip(tuner.configs, tuner.warmup(*arguments, **options), strict=True))

    def on(arch):
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # compiled kernels are kept by device
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
        monkeypatch.setattr(triton.runtime.Autotuner, "run", compile_all)
        return kernels

    return on


def launch(dtype, vocabulary=VOCABULARY):
    """Both passes over a window of a padded [3, 9, V], with all terms and gradients."""
    logits = torch.empty(3, 9, vocabulary, dtype=dtype, device="meta")[:, 1:8]
    log_z = torch.empty(21, device="meta")
    mask, tokens = (torch.empty(21, dtype=d, device="meta") for d in (torch.bool, torch.int64))
    rows = RowInputs(log_z, None, mask, tokens, True)
    statistics = triton_kernels.forward(logits, logits, rows)
    gradients = RowGradients(log_z, log_z, log_z, log_z)
    triton_kernels.backward(logits, logits, rows, statistics, gradients)


def resources(kernel, path):
    """Registers to a thread, and bytes of its stack, where spilled registers go."""
    cubin = path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tile_spills_registers(compiled, tmp_path, arch, dtype):
    kernels = compiled(arch)
    launch(dtype)
    assert len(kernels) == 2 * len(triton_kernels._TILES)
    spilled = []
    for tile, kernel in kernels:
        registers, stack = resources(kernel, tmp_path)
        print(f"sm_{arch} {dtype} {kernel.metadata.name} {tile}: {registers=} {stack=}")
        if stack or kernel.metadata.num_warps * 32 * registers > 1 << 16:
            spilled.append((kernel.metadata.name, str(tile), registers, stack))
    assert not spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_rows_are_read_and_written_in_vectors(compiled, dtype):
    """Only if the launcher says that rows are aligned; otherwise logits come one by one."""
    kernels = compiled(90)
    launch(dtype)
    for _, kernel in kernels:
        logits = r"global\.v[24]\.b32"
        assert re.search(rf"ld\.{logits}", kernel.asm["ptx"])
        if kernel.metadata.name == "_backward_kernel":
            assert re.search(rf"st\.{logits}", kernel.asm["ptx"])


@pytest.mark.parametrize("vocabulary", [1, 32_001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_vocabularies_compile(compiled, monkeypatch, dtype, vocabulary):
    for kernel in (triton_kernels._forward_kernel, triton_kernels._backward_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    kernels = compiled(90)
    launch(dtype, vocabulary)
    assert [kernel.metadata.name for _, kernel in kernels] == [
        "_forward_kernel",
        "_backward_kernel",
    ]


def test_floors_and_clamps_do_not_drop_nan(compiled):
    """As instructions named min and max would; the interpreter's keep it, so only this can tell."""
    kernels = compiled(90)
    launch(torch.float32)
    backward = [k.asm["ptx"] for _, k in kernels if k.metadata.name == "_backward_kernel"]
    assert backward and not any(re.search(r"\b(min|max)\.", ptx) for ptx in backward)
