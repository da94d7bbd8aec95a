"""What the compiler makes of the Triton kernels, for GPUs that are not there.

Registers, spills, barriers and instructions are figures of the compiler. They say what a GPU has
to execute; none of them is a time.
"""

import re
import subprocess
from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from specforge_lk.overlap import triton_kernels, triton_target
from specforge_lk.overlap.contract import RowGradients, RowInputs
from specforge_lk.overlap.target_terms import TargetTerms

pytestmark = pytest.mark.slow

# Of both logits: what SpecForge trains in, and what its losses may be given.
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]
# What the loss lk_lambda has gradients of.
LAMBDA = ("kl", "log_alpha")
VOCABULARY = 32_000
# A multiprocessor's, of all these architectures.
REGISTERS, THREADS = 1 << 16, 2048


class Loop:
    """A loop over tiles in machine code.

    Attributes:
        opcodes: how many instructions of every kind it has.
        per_logit: instructions of a thread to each logit of a tensor that it takes.
    """

    def __init__(self, instructions, logits):
        self.opcodes = Counter(opcode(instruction) for instruction in instructions)
        self.powers = sum("EX2" in instruction for instruction in instructions) / logits
        self.per_logit = len(instructions) / logits


class Compiled(NamedTuple):
    """A kernel that a launch asked for, and how many logits of a tile are a thread's."""

    kernel: Any
    logits: int

    @property
    def name(self):
        return self.kernel.metadata.name

    @property
    def ptx(self):
        return self.kernel.asm["ptx"]


def opcode(instruction):
    """``IADD3`` of ``@!P0 IADD3.X R1, ...``."""
    return re.match(r"(?:@!?\w+\s+)?(\w+)", instruction)[1]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return a function that runs a launcher for an architecture and returns what it compiled.

    The launchers themselves run, on tensors without memory, so that what is compiled has the
    signature, alignments and constants that a launch would have. Nothing is interpreted: the
    module is the one that programs import.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run, found = triton.JITFunction.run, []

    def compile_only(self, *arguments, warmup, BLOCK, num_warps, **options):
        kernel = run(self, *arguments, warmup=True, BLOCK=BLOCK, num_warps=num_warps, **options)
        found.append(Compiled(kernel, BLOCK // (32 * num_warps)))

    def of(arch, launcher, *arguments, **options):
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # compiled kernels are kept by device
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        found.clear()
        launcher(*arguments, **options)
        return list(found)

    return of


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def both_passes(dtypes, vocabulary=VOCABULARY, terms=LAMBDA, positions=7, offset=0, full=False):
    """Launch forward and backward over windows of padded logits [3, 2 + positions, V].

    Vectors of one value per row begin ``offset`` values from where memory is aligned. ``full``: the
    target's logits are to be normalized.
    """
    z, y = (meta(3, 2 + positions, vocabulary, dtype=d)[:, 1 : 1 + positions] for d in dtypes)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    vector, mask, tokens = (
        meta(3 * positions + offset, dtype=d)[offset:] for d in (wide, torch.bool, torch.int64)
    )
    rows = RowInputs(None if full else vector, None, mask, tokens, wide, "reverse_kl" in terms)
    statistics = triton_kernels.forward(z, y, rows)
    gradients = RowGradients(*(vector if name in terms else None for name in RowGradients._fields))
    triton_kernels.backward(z, y, rows, statistics, gradients)


def examined(compiled, path):
    """Return registers and loops of a kernel, after checks that hold for every one."""
    kernel, logits = compiled
    registers, stack = resources(kernel, path)
    loops = [Loop(instructions, logits) for instructions in loops_of(path)]
    warps = kernel.metadata.num_warps
    print(f"{compiled.name} {warps=} {registers=} {stack=}")
    for loop in loops:
        print(f"    {loop.per_logit:.1f} to a logit: {dict(loop.opcodes)}")
    assert stack == 0  # where spilled registers go
    assert 32 * warps * registers <= REGISTERS
    assert loops
    for loop in loops:
        # No thread waits for another, or hands it anything.
        assert not loop.opcodes.keys() & {"BAR", "SHFL", "LDS", "STS", "LDL", "STL"}
    return registers, loops


def tool(name, *options):
    """Run one of the CUDA tools that come with Triton."""
    command = [getattr(triton.knobs.nvidia, name).path, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel, path):
    """Write the machine code to ``path``; return registers and bytes of stack of a thread."""
    path.write_bytes(kernel.asm["cubin"])
    usage = tool("cuobjdump", "--dump-resource-usage", path)
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def loops_of(path):
    """Return the instructions of every innermost loop: what a branch backwards goes round."""
    instructions, labels = [], {}
    for line in tool("nvdisasm", "-c", path).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    spans = []
    for at, text in enumerate(instructions):
        target = re.search(r"`\((\.L_\w+)\)", text)
        # At the end of a program is a branch to itself.
        if opcode(text) == "BRA" and target and labels[target[1]] < at:
            spans.append(range(labels[target[1]], at + 1))
    return [
        [instructions[i] for i in span]
        for span in spans
        if not any(other != span and {*other} <= {*span} for other in spans)
    ]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d)[6:] for d in pair))
def test_loops_are_nothing_but_arithmetic(compiled, tmp_path, arch, dtypes):
    """No spills, no barriers, and registers for half of the threads that can be resident."""
    forward, backward = compiled(arch, both_passes, dtypes)
    registers, (of_draft, of_both) = examined(forward, tmp_path / "cubin")
    assert registers <= REGISTERS // (THREADS // 2)
    assert of_draft.per_logit + of_both.per_logit <= (42 if arch == 90 else 44)
    if arch == 90 and dtypes[0].itemsize == 2:
        assert registers <= 40
    registers, loops = examined(backward, tmp_path / "cubin")
    assert registers <= REGISTERS // (THREADS // 2)
    assert max(loop.per_logit for loop in loops) <= (24 if arch == 90 else 26)
    if arch == 90 and dtypes[0].itemsize == 2:
        assert registers <= 32


@pytest.mark.parametrize(
    ("terms", "powers", "per_logit"),
    [
        (("kl",), 2, 18),
        (("log_alpha",), 1, 20),
        (LAMBDA, 2, 24),
        (("kl", "log_alpha", "reverse_kl", "log_q"), 2, 34),
    ],
    ids=["kl", "alpha", "lambda", "all"],
)
def test_absent_gradients_cost_nothing(compiled, tmp_path, terms, powers, per_logit):
    _, backward = compiled(90, both_passes, DTYPES[0], terms=terms)
    _, loops = examined(backward, tmp_path / "cubin")
    loop = max(loops, key=lambda loop: loop.per_logit)
    assert loop.powers == powers and loop.per_logit <= per_logit


def test_a_full_vocabulary_is_normalized_in_a_loop_of_its_own(compiled, tmp_path):
    """Whose instructions are those of the draft's."""
    forward, _ = compiled(90, both_passes, DTYPES[0], full=True)
    registers, loops = examined(forward, tmp_path / "cubin")
    assert registers <= 40
    of_draft, of_target, of_both = (loop.per_logit for loop in loops)
    assert of_target <= 10 and of_draft + of_both <= 42


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_target_is_read_once(compiled, tmp_path, arch, dtype):
    """A loop over the full vocabulary, with one power to a logit; one over the draft's."""

    def fill(positions=21):
        out = (meta(positions, VOCABULARY, dtype=dtype), meta(positions), meta(positions))
        tokens = meta(positions, dtype=torch.int64)
        kept = meta(VOCABULARY, dtype=torch.int32)
        logits = meta(positions, 128_256, dtype=dtype)
        triton_target.fill(logits, kept, TargetTerms(*out, tokens))

    (kernel,) = compiled(arch, fill)
    registers, (of_full, of_draft) = examined(kernel, tmp_path / "cubin")
    assert registers <= REGISTERS // (THREADS // 2)
    assert of_full.powers <= 1.25 and of_full.per_logit <= 11
    # That of the draft vocabulary takes half a tile.
    assert 2 * of_draft.powers <= 1.5 and 2 * of_draft.per_logit <= 22
    if arch == 90:
        assert registers <= 40

    def every_way():
        for positions in (21, 22, 1):
            fill(positions)

    assert len({id(found.kernel) for found in compiled(arch, every_way)}) == 1


def test_a_vocabulary_of_odd_size(compiled, tmp_path):
    """Logits are read one by one, still without barriers."""
    for kernel in compiled(90, both_passes, DTYPES[0], vocabulary=50_257):
        examined(kernel, tmp_path / "cubin")


@pytest.mark.parametrize(
    "dtypes", [DTYPES[0], (torch.float32, torch.float32)], ids=["half", "float"]
)
@pytest.mark.parametrize("vocabulary", [32_000, 73_448])  # multiples of 16, and of 8
def test_aligned_rows_are_read_and_written_in_vectors(compiled, dtypes, vocabulary):
    """Only if the launcher says that rows are aligned; otherwise logits come one by one."""
    forward, backward = compiled(90, both_passes, dtypes, vocabulary)
    for ptx in (forward.ptx, backward.ptx):
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4\.b32", backward.ptx)


@pytest.mark.parametrize("vocabulary", [1, 32_001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_vocabularies_compile(compiled, dtype, vocabulary):
    names = [k.name for k in compiled(90, both_passes, (dtype, dtype), vocabulary)]
    assert names == ["_forward_kernel", "_backward_kernel"]


def test_the_number_of_positions_and_their_memory_compile_nothing_anew(compiled):
    def every_way():
        for positions in (7, 8, 1, 16):
            for offset in (0, 1):
                both_passes(DTYPES[0], positions=positions, offset=offset)

    assert len({id(found.kernel) for found in compiled(90, every_way)}) == 2


def test_floors_do_not_drop_nan(compiled):
    """As instructions named min and max would; the interpreter's keep it, so only this can tell."""
    _, backward = compiled(90, both_passes, (torch.float32, torch.float32))
    assert not re.search(r"\b(min|max)\.(?!NaN)", backward.ptx)
