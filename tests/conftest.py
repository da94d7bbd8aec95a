"""Small fixtures shared by the tests."""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

# Compiling SpecForge's helpers costs more than any test, and needs g++. Read at torch's import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Terminals and CI services have a say in the width and the colors of what commands print.
for _name in ("TERM", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
    os.environ.pop(_name, None)
os.environ["COLUMNS"] = "200"
# Caches of compiled code and of data sets, shared with parallel workers and with subprocesses: the
# home of whoever runs the tests may not be writable, and what it holds is none of their business.
_CACHE = "SPECFORGE_LK_TEST_CACHE"
if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="specforge-lk-tests-")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ[_CACHE]
os.environ["HF_HOME"] = os.path.join(os.environ[_CACHE], "huggingface")
os.environ["MPLCONFIGDIR"] = os.path.join(os.environ[_CACHE], "matplotlib")

import torch  # noqa: E402 (reads the environment)

from specforge_lk import overlap  # noqa: E402
from specforge_lk.overlap import IMPLEMENTATIONS  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that fetch a wheel."""
    for item in items:
        if "pristine_wheel" in getattr(item, "fixturenames", ()):
            item.add_marker("network")


@pytest.fixture(scope="session")
def pristine_wheel(request) -> Callable[[str], Path]:
    """Return a function from a requirement, such as ``specforge==0.2.0``, to its wheel's path.

    It comes from the variable SPECFORGE_WHEEL (a path), if that has the version, or, once, from
    ``pip download``; workers that run in parallel may both download. Only without a network is the
    test skipped.
    """
    root = request.config.rootpath
    wheels = (root if os.access(root, os.W_OK) else Path(os.environ[_CACHE])) / "runs" / "wheels"

    def get(requirement: str) -> Path:
        name, _, version = requirement.partition("==")
        name = name.replace("-", "_")
        variable = f"{name.upper()}_WHEEL"
        given = Path(os.environ.get(variable, ""))
        if given.name.startswith(f"{name}-{version}-"):
            return given
        folder = wheels / requirement
        folder.mkdir(parents=True, exist_ok=True)
        if not (cached := list(folder.glob("*.whl"))):
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", fresh]
                done = subprocess.run([*pip, requirement], capture_output=True, text=True)
                if done.returncode:
                    offline = re.search("ConnectionError|ResolutionError|Timeout", done.stderr)
                    stop = pytest.skip if offline else pytest.fail
                    stop(f"set {variable} to the wheel, pip download failed: {done.stderr}")
                (wheel,) = Path(fresh).glob("*.whl")
                os.replace(wheel, folder / wheel.name)
                cached = [folder / wheel.name]
        return cached[0]

    return get


class OverlapCase(NamedTuple):
    """Random inputs of the overlap operation; attribute names as `overlap_terms` has them."""

    draft_logits: torch.Tensor
    target_logits: torch.Tensor
    log_normalizer: torch.Tensor


@pytest.fixture
def overlap_case() -> Callable[..., OverlapCase]:
    """Make a case: ``shape`` [..., V_d], ``outside`` target tokens not in the draft vocabulary."""

    def make(
        *shape: int,
        outside: int = 3,
        scale: float = 2.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> OverlapCase:
        generator = torch.Generator().manual_seed(seed)
        full = torch.randn(
            *shape[:-1], shape[-1] + outside, generator=generator, dtype=torch.float64
        )
        draft = torch.randn(*shape, generator=generator, dtype=torch.float64)
        full, draft = (full * scale).to(dtype), (draft * scale).to(dtype)
        target = full[..., : shape[-1]].contiguous()
        log_normalizer = full.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1)
        return OverlapCase(draft.requires_grad_(), target, log_normalizer)

    return make


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())
        for name in IMPLEMENTATIONS
    ]
)
def impl(request, monkeypatch) -> str:
    """Every implementation of the overlap operation in turn, by its name; some with indirect=True.

    Triton's kernels are interpreted, on CPU tensors.
    """
    if request.param == "triton":
        from triton_interpreter import interpreted_triton

        monkeypatch.setattr(overlap, "triton_kernels", interpreted_triton(), raising=False)
    return request.param


@pytest.fixture
def impl_dtype(impl) -> torch.dtype:
    """The most precise dtype of ``impl``'s own kernels: "cpu" leaves float64 to closed_form."""
    return torch.float32 if impl == "cpu" else torch.float64


@pytest.fixture
def impl_case(overlap_case, impl_dtype) -> Callable[..., OverlapCase]:
    """Make a case as `overlap_case` does, in the dtype that ``impl`` is tested in."""
    return partial(overlap_case, dtype=impl_dtype)
