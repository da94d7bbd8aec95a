"""The overlap operation for CPUs in C++, compiled on first use.

Torch operations pass over a chunk of logits some twenty times; here one row at a time stays in
cache, and every exponential is taken once a pass. ``fused_cpu.cpp`` includes no header of torch,
so the machine's C++ compiler needs about two seconds for it, once: the library is kept in
``$XDG_CACHE_HOME/specforge-lk`` (``~/.cache`` by default), named by what it was made from.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import torch

from specforge_lk.overlap import closed_form
from specforge_lk.overlap.contract import RowGradients, RowInputs, RowStatistics
from specforge_lk.overlap.rows import row_offsets

logger = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_name("fused_cpu.cpp")
# No -ffast-math: it would drop the handling of nan and infinity.
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC", "-pthread"),
)
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CompilerError(RuntimeError):
    """The C++ source cannot be compiled, or the result not be kept and loaded."""


class _Inputs(ctypes.Structure):
    """``struct Inputs`` of the C++ source."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("z", "y", "mask", "z_offsets", "y_offsets", "log_z", "tokens")
        ),
        *((name, ctypes.c_int64) for name in ("n", "v")),
        *((name, ctypes.c_int32) for name in ("z_dtype", "y_dtype", "threads")),
    )


def forward(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> RowStatistics:
    """See `contract.Kernels`. Dtypes that the source does not know are left to `closed_form`."""
    if not _knows(draft_logits, target_logits):
        return closed_form.forward(draft_logits, target_logits, rows)
    values = torch.zeros(len(RowStatistics._fields) - 1, len(rows.mask))
    draft_argmax = torch.zeros(len(rows.mask), dtype=torch.int64)
    inputs, _tensors = _inputs(draft_logits, target_logits, rows)
    done = library().overlap_forward(
        ctypes.byref(inputs), rows.reverse_kl, values.data_ptr(), draft_argmax.data_ptr()
    )
    _check(done)
    return RowStatistics._make((*values, draft_argmax))


def backward(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    rows: RowInputs,
    statistics: RowStatistics,
    gradients: RowGradients,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `contract.Kernels`. Dtypes that the source does not know are left to `closed_form`."""
    if not _knows(draft_logits, target_logits):
        return closed_form.backward(draft_logits, target_logits, rows, statistics, gradients, out)
    if out is None:
        out = torch.empty(draft_logits.shape, dtype=draft_logits.dtype)
    of_terms = torch.zeros(len(gradients), len(rows.mask))
    for row, values in zip(of_terms, gradients, strict=True):
        if values is not None:
            row.copy_(values)
    values = torch.stack(statistics[:-1])
    inputs, _tensors = _inputs(draft_logits, target_logits, rows)
    done = library().overlap_backward(
        ctypes.byref(inputs), values.data_ptr(), of_terms.data_ptr(), out.data_ptr()
    )
    _check(done)
    return out


def knows_target(logits: torch.Tensor) -> bool:
    """Return whether `target` takes logits of this dtype."""
    return _knows(logits)


def target(
    logits: torch.Tensor,
    kept: torch.Tensor | None,
    on_draft: torch.Tensor,
    log_normalizer: torch.Tensor,
    log_coverage: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Write the terms of a target's logits, [..., V]: see `target_terms.TargetKernel`."""
    y = _readable(logits)
    if kept is not None:
        kept = kept.to(torch.int32).contiguous()
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < y.shape[-1]:
            raise IndexError(f"kept has tokens outside of the target's vocabulary, {y.shape[-1]}")
    offsets = row_offsets(y)
    inputs = _Inputs(
        y=y.data_ptr(),
        y_offsets=offsets.data_ptr(),
        n=len(offsets),
        v=y.shape[-1],
        y_dtype=_DTYPES[y.dtype],
        threads=torch.get_num_threads(),
    )
    done = library().overlap_target(
        ctypes.byref(inputs),
        *((None, 0) if kept is None else (kept.data_ptr(), len(kept))),
        *(t.data_ptr() for t in (on_draft, log_normalizer, log_coverage, token_ids)),
    )
    _check(done)
    if kept is None:
        log_coverage.copy_(
            torch.where(log_normalizer == torch.inf, -torch.inf, 0.0 * log_normalizer)
        )


def _inputs(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, rows: RowInputs
) -> tuple[_Inputs, tuple[torch.Tensor, ...]]:
    """Return addresses, and the tensors that they point into, for the caller to keep alive."""
    z, y = (_readable(t) for t in (draft_logits, target_logits))
    tensors = z, y, rows.mask, row_offsets(z), row_offsets(y)
    return _Inputs(
        *(t.data_ptr() for t in tensors),
        *(None if t is None else t.data_ptr() for t in (rows.log_normalizer, rows.tokens)),
        *(len(rows.mask), z.shape[-1]),
        *(_DTYPES[z.dtype], _DTYPES[y.dtype], torch.get_num_threads()),
    ), tensors


def _check(done: bool) -> None:
    if not done:
        raise MemoryError(
            "the overlap operation has no memory for three rows of logits per thread: free some, "
            "or lower torch.set_num_threads"
        )


def _knows(*logits: torch.Tensor) -> bool:
    known = set(_DTYPES) if library().overlap_has_float16() else set(_DTYPES) - {torch.float16}
    return known.issuperset(t.dtype for t in logits)


def _readable(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type != "cpu":
        raise ValueError(
            f"impl='cpu' got logits on {logits.device}: use impl='auto', or 'closed_form'"
        )
    # The vocabulary must be contiguous; the other dimensions may have any strides.
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


@cache
def library() -> ctypes.CDLL:
    """Load the compiled source, compiling it unless this machine's cache has it.

    Raises:
        CompilerError: no C++ compiler was found, it failed (the message has its output), or the
            cache cannot be used.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise CompilerError(
            f"no C++ compiler ({', '.join(_COMPILERS)}) on PATH: install one, set CXX, or use "
            "impl='closed_form'"
        )
    path = _cached(compiler)
    try:
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(
            f"{error}: set XDG_CACHE_HOME to a directory that can be written and executed from, "
            "or use impl='closed_form'"
        ) from error
    library.overlap_forward.argtypes = [
        ctypes.POINTER(_Inputs),
        ctypes.c_int32,
        *[ctypes.c_void_p] * 2,
    ]
    library.overlap_forward.restype = ctypes.c_bool
    library.overlap_backward.argtypes = [ctypes.POINTER(_Inputs), *[ctypes.c_void_p] * 3]
    library.overlap_backward.restype = ctypes.c_bool
    library.overlap_target.argtypes = [
        ctypes.POINTER(_Inputs),
        ctypes.c_void_p,
        ctypes.c_int64,
        *[ctypes.c_void_p] * 4,
    ]
    library.overlap_target.restype = ctypes.c_bool
    return library


_COMPILERS: Final = ("c++", "g++", "clang++")


@cache
def available() -> bool:
    """Return whether `library` can be loaded; if not, the reason is logged, once."""
    try:
        library()
    except CompilerError as error:
        logger.warning("overlap operation: slower fallback 'closed_form' (%s)", error)
        return False
    return True


def _cached(compiler: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # -march=native: machines that share a home directory may differ in their instructions.
    machine = platform.machine() + _instructions()
    made_from = "\0".join((_SOURCE.read_text(), compiler, *_FLAGS, machine))
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    return root / "specforge-lk" / f"overlap-{digest}.so"


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, path: Path) -> None:
    logger.info("overlap operation: compiling %s for this CPU, once", _SOURCE.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built = Path(directory) / path.name
        command = [*shlex.split(compiler), *_FLAGS, "-o", str(built), str(_SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CompilerError(
                f"{command[0]} cannot be run ({error}): set CXX to another compiler, or use "
                "impl='closed_form'"
            ) from error
        if done.returncode != 0:
            raise CompilerError(
                f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr}"
                "set CXX to another compiler, or use impl='closed_form'"
            )
        # A rename is atomic: processes that compile at the same time do not disturb each other.
        built.replace(path)
