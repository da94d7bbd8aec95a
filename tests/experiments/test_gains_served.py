"""What vLLM counted with one objective is compared with the baseline, prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from experiments.gains.served import Counted, Served, gain, in_short, main, table


def counted(objective: str, rounds: list[int]) -> Counted:
    return Counted(
        objective=objective,
        rule="temperature=1",
        tokens=[60] * len(rounds),
        rounds=rounds,
        expected=sum(rounds) + 0.5,
        error=1.5,
    )


def test_difference_is_paired():
    """One that always takes a round less: the prompts' own spread does not widen the interval."""
    rounds = [30, 40, 50, 60] * 5
    base, better = counted("kl", rounds), counted("tv", [n - 1 for n in rounds])
    value, interval = gain(better, base)
    assert value == pytest.approx(60 / 44 - 60 / 45)
    low, high = interval or (0, 0)
    assert 0 < low < value < high < 2 * value
    _, worse = gain(base, better)
    assert worse == pytest.approx([-high, -low])


def test_report_says_what_was_counted_and_computed():
    base, same = counted("kl", [30, 40]), counted("tv", [30, 40])
    report = Served(settings={"new tokens": 61}, versions={}, counted=[base, same])
    text = table(report)
    assert in_short(report) == [
        "`temperature=1`: with `tv` in place of `kl`, vLLM takes 70 rounds for 120 tokens in place "
        "of 70 for 120, τ +0.000 [+0.000, +0.000]"
    ]
    assert "| `temperature=1` | `kl` | 120 | 70 | 70.5 ± 1.5 | 1.7143 |  |  |" in text
    assert "| 1.7143 | +0.0000 [+0.0000, +0.0000] | +0.0% |" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--architecture", "dflash", "name one of eagle3"),
        ("--objectives", "nll", "name some of kl"),
    ],
)
def test_unknown_names_are_refused(option: str, value: str, words: str, tmp_path: Path):
    app = Typer()
    app.command()(main)
    found = CliRunner().invoke(app, [option, value, "--results", str(tmp_path / "r.json")])
    assert found.exit_code == 2 and words in " ".join(found.output.split())
