"""SpecForge with the first n patches of the series, and measurements in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from specforge_lk.patching import SPECFORGE as PACKAGE
from specforge_lk.patching import git_apply, load_series
from tools.wheels import SPECFORGE, wheel

ROOT = Path(__file__).parent.parent
SERIES = load_series(PACKAGE)

#: The probes of the first fixes, which come first in the series, in this order; 0016 and 0017 have
#: tests alone.
FIXES = (
    "without_triton",
    "target_head_files",
    "target_logits",
    "target_head_precision",
    "missing_features",
    "pickled_code",
    "lk_objective",
    "kl_decay_default",
    "acceptance_metric",
    "streamed_samples",
    "supervised_states",
    "vocabulary_mapping",
    "exported_settings",
    "rotary_angles",
    "evaluation_random_numbers",
)

#: Figures of a probe by their titles: numbers, or a sentence.
Figures = dict[str, Any]


class Levels:
    """SpecForge trees with the first n patches, made when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def tree(self, level: int) -> Path:
        """Return the directory that holds the package with the first ``level`` patches."""
        root = self.directory / str(level)
        if not root.exists():
            source = wheel(SPECFORGE) if level == 0 else self.tree(level - 1)
            shutil.copytree(
                source / "specforge",
                root / "specforge",
                ignore=shutil.ignore_patterns("__pycache__"),
            )
            if level:
                git_apply(root, SERIES.patches[level - 1], "--include=specforge/*")
        return root

    def measure(self, probe: str, level: int) -> Figures:
        """Return the figures of ``probe`` with the first ``level`` patches."""
        run = subprocess.run(
            [sys.executable, "-m", "tools.probes", probe],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join((str(self.tree(level)), str(ROOT))),
                "SPECFORGE_PLUGINS": "",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TORCHDYNAMO_DISABLE": "1",
            },
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(f"{probe} with {level} patches failed: {run.stderr}")
        return json.loads(run.stdout)
