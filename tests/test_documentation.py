"""What the pages promise: the README's Python runs, and generated blocks are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import pages

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alpha, coverage = map(float, re.findall(r"tensor\((\d\.\d+)", done.stdout))
    assert 0 < alpha <= coverage < 1


def test_the_readme_is_a_front_door() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1000


@pytest.mark.parametrize("page", pages.BLOCKS)
def test_generated_blocks_are_up_to_date(page: str) -> None:
    """`make pages` writes them anew."""
    assert pages.filled(page) == (ROOT / page).read_text(encoding="utf-8")


def test_a_block_is_written_between_its_comments() -> None:
    text = "before\n<!-- a: written by `make pages` -->\nold\n<!-- a: end -->\nafter\n"
    filled = pages.fill(text, "a", "new")
    assert filled == text.replace("old", "new")
    with pytest.raises(ValueError, match="block 'b': no line"):
        pages.fill(text, "b", "new")
