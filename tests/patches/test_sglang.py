"""SGLang 0.5.14, patched, serves a truncated vocabulary without changing the distribution."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from series_tree import apply_until, unpack

from specforge_lk.patching import PACKAGES, load_series

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1] / "helpers"
SERIES = load_series(PACKAGES["sglang"], "0.5.14")


@pytest.fixture(scope="module")
def report(
    pristine_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What sglang_chain.py counted in SGLang with the whole series."""
    wheel = pristine_wheel(f"{SERIES.package.name}=={SERIES.version}")
    tree = unpack(wheel, tmp_path_factory.mktemp("sglang"), SERIES)
    apply_until(tree, SERIES, SERIES.patches[-1])
    path = os.pathsep.join(
        map(str, (tree / SERIES.package.source, tree / "test/registered/unit/spec", TESTS))
    )
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, TESTS / "sglang_stubs.py", TESTS / "sglang_chain.py"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def chi_square(cells: list[int], target: np.ndarray) -> float:
    """p-value that the first three tokens after token 0 come from the target; rare cells as one."""
    counts = np.array(cells)
    expected = counts.sum() * np.einsum("a,ab,bc->abc", target[0], target, target).ravel()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_the_output_has_the_targets_distribution(report):
    target = np.array(report["target"])
    assert chi_square(report["decoded"]["cells"], target) > 1e-3
    # The test sees it when q is scattered to other tokens than the draft's.
    assert chi_square(report["misplaced"]["cells"], target) < 1e-12


def test_the_first_draft_token_is_accepted_at_the_rate_alpha(report):
    """alpha = sum min(p, q), after token 0."""
    alpha = np.minimum(report["target"][0], report["draft"][0]).sum()
    requests = sum(report["decoded"]["cells"])
    assert stats.binomtest(report["decoded"]["accepted"], requests, alpha).pvalue > 1e-3


def test_the_transcript_is_what_sglangs_kernel_does(report):
    assert report["kernel_equals_transcript"]
