"""What the pages promise: the README's Python runs, and generated blocks are up to date."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result, Training
from tools import gains, pages

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


def test_the_readme_names_what_every_loss_of_the_demo_gains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As mean τ over seeds, with the options that the losses had."""
    report = Report()
    same = {"algorithm": "eagle3", "benchmark": HELD_OUT, "draft_sampling": "probabilistic"}
    for seed, temperature in itertools.product((0, 1), (0.0, 1.0)):
        here = same | {"seed": seed, "temperature": temperature}
        gain = 0.04 * temperature + 0.02 * seed
        for loss, tau in (("start", 1.3), ("kl", 1.4), ("tv", 1.4 + gain)):
            fields = {"heads": 4, "alpha_per_head": [0.3], "coverage": 0.9}
            serving = f"temperature={temperature:g}"
            fields |= {"tau_rounds": tau, "serving": serving, "method": "exact"}
            report.results.append(Result(loss=loss, **here, **fields))
        report.paired += [
            Paired(loss="tv", baseline=baseline, **here, difference=gain + more, ci=[0, 1])
            for baseline, more in (("kl", 0), ("start", 0.1))
        ]
    report.training = [
        Training(algorithm="eagle3", loss=loss, seed=0, command=command, steps=96)
        for loss, command in (
            *(("start", ""), ("kl", "")),
            ("tv", "specforge train training.loss=tv training.loss_options.eta=10"),
        )
    ]
    monkeypatch.setattr(gains, "read_report", lambda path: report)
    expected = "T = 1: `kl` → `tv` (eta = 10) | held-out responses 1.400 → 1.450 |"
    assert expected in gains.gains()
    report.training = report.training[1:]
    assert gains.demo() == "Not measured yet."
