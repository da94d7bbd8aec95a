"""The benchmark measures what it says; its figures themselves are `make bench`'s business."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import accuracy, baselines, criteria, inputs, measure, operation, summary
from benchmarks.__main__ import main

MIB = 1 << 20
QUIET = Console(quiet=True)


@pytest.fixture
def ours():
    return {f"ours {name}": baselines._ours(name, loss) for name, loss in baselines.OURS.items()}


def record(seconds, allocated=0, gradient=0):
    memory = {"allocated": allocated, "resident": allocated, "gradient": gradient}
    return measure.distribution([seconds] * 3) | {"memory": memory}


def test_memory_is_the_peak_and_not_the_sum():
    def allocate():
        first = torch.zeros(40, MIB // 4)
        del first
        torch.zeros(60, MIB // 4)

    assert measure.peak_allocated(allocate) == 60 * MIB


def test_resident_memory_is_the_peak_since_the_start():
    """Neither an earlier peak nor the sum. Bounds are so wide that the kernel's way of counting
    pages, which depends on the machine, does not matter."""

    def allocate(mib):
        torch.zeros(mib, MIB // 4)

    allocate(512)
    with measure.peak_resident() as grown:
        allocate(128)
        allocate(128)
        assert 64 < grown() / MIB < 192


def test_definitions_of_our_losses_are_checked(ours):
    assert set(baselines.check(ours)) == set(ours)
    wrong = ours["ours kl"]._replace(definition=ours["ours lk_alpha"].definition)
    with pytest.raises(RuntimeError, match="differ from their definitions"):
        baselines.check({"ours kl": wrong})


def test_the_floor_reads_supervised_rows_and_writes_all_of_the_gradient():
    x = inputs.Inputs(8, 32, torch.bfloat16, supervised=0.5)
    x.gradient.fill_(1)
    baselines._floor(x)
    assert x.gradient[0, :4].any() and not x.gradient[0, 4:].any()


@pytest.mark.slow
def test_what_does_not_fit_is_reported_and_the_rest_is_measured(ours, tmp_path, monkeypatch):
    def too_large(x):
        torch.empty(1 << 50)

    known = {**ours, "ours, huge": baselines.Implementation(too_large, ("z", "target_p"), None)}
    monkeypatch.setattr(operation, "implementations", lambda: known)
    # On a busy machine even the smallest call may take long; it is repeated all the same.
    monkeypatch.setattr(measure, "LONG_SECONDS", math.inf)
    path = tmp_path / "operation.json"
    grid = (operation.Cell(8, 64, "float32", 1.0), operation.Cell(8, 64, "float32", 0.5))
    operation.run(path, grid, budget=0.01, fresh=False, console=QUIET)
    cells = json.loads(path.read_text())["cells"]
    assert [cell["cell"] for cell in cells] == [asdict(cell) for cell in grid]
    for cell in cells:
        assert "does not fit in" in cell["implementations"]["ours, huge"]["does_not_fit"]
        for name in ours:
            found = cell["implementations"][name]
            assert len(found["seconds"]) >= measure.MINIMUM_REPEATS
            assert found["memory"]["allocated"] >= found["memory"]["gradient"] == 8 * 64 * 4
    summary.write(tmp_path, QUIET)
    missing = json.loads((tmp_path / "summary.json").read_text())["does_not_fit"]
    assert [entry["implementation"] for entry in missing] == ["ours, huge"] * 2

    # A rerun measures nothing anew; other code starts over.
    written = path.stat().st_mtime_ns
    operation.run(path, grid, budget=0.01, fresh=False, console=QUIET)
    assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(measure, "_digest", lambda modules: "other")
    operation.run(path, grid[:1], budget=0.01, fresh=False, console=QUIET)
    assert len(json.loads(path.read_text())["cells"]) == 1


def test_summary_takes_ratios_of_medians(tmp_path):
    one = criteria.HEADLINE
    size = one.tokens * one.vocabulary * 4
    cells = {
        one: {
            "ours kl": record(0.10, size, size),
            "ours lk_alpha": record(0.12, size, size),
            "ours lk_lambda": record(0.10, 1.5 * size, size),
            "specforge kl": record(0.20, size, size),
        },
        operation.Cell(4096, 32000, "float32", 1.0): {
            "ours lk_lambda": record(0.50, size, size),
            "specforge kl": {"does_not_fit": "too large"},
        },
    }
    entries = [{"cell": asdict(c), "implementations": i} for c, i in cells.items()]
    head = {"machine": {"caches": {"L3": 32 * MIB}}}
    (tmp_path / "operation.json").write_text(json.dumps({**head, "cells": entries}))
    summary.write(tmp_path, QUIET)
    targets = json.loads((tmp_path / "summary.json").read_text())["targets"]
    found = {t["name"]: (t["measured"], t["met"], t["cells"]) for t in targets}
    assert found["lk_alpha over kl, time"] == (pytest.approx(1.2), False, 1)
    assert found["lk_lambda over kl, time"] == (pytest.approx(1.0), True, 1)
    assert found["lk_lambda over specforge kl, time"] == (pytest.approx(0.5), True, 1)
    assert found["memory beyond gradient over one [N, V_d] tensor, allocator"][:2] == (0.5, False)
    # Of all cells: half of them, and nine in ten, are no slower.
    assert found["lk_lambda over kl, time, in half of the cells"] == (pytest.approx(1.0), True, 1)
    of_ten = "lk_alpha over kl, time, in nine cells of ten"
    assert found[of_ten] == (pytest.approx(1.2), False, 1)
    # 4 times the positions took 5 times as long.
    over_tokens = found["time per element over N, largest over smallest, float32"]
    assert over_tokens == (pytest.approx(1.25), False, 1)
    assert "lk_alpha over kl, time" in (tmp_path / "summary.md").read_text()


def test_a_share_of_the_cells_keeps_to_a_value():
    values = {operation.Cell(n, 1, "float32", 1.0): float(n) for n in range(10, 0, -1)}
    for share, expected in ((0.5, 5.0), (0.9, 9.0), (1.0, 10.0)):
        assert criteria._of_cells("", 9.0, values, share).measured == expected
    assert criteria._of_cells("", 9.0, {}, 0.9).met is None
    # 10^7 logits are not yet many.
    large, small = (operation.Cell(n, 10**4, "float32", 1.0) for n in (1001, 1000))
    assert criteria._large({large: 1.0, small: 2.0}) == {large: 1.0}


def test_quick_accuracy_meets_the_criteria(tmp_path):
    app = typer.Typer()
    app.command()(main)
    options = ["--quick", "--only", "accuracy", "--only", "summary", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    cells = json.loads((tmp_path / "accuracy.json").read_text())["cells"]
    assert len(cells) == len(accuracy.QUICK)
    targets = json.loads((tmp_path / "summary.json").read_text())["targets"]
    met = {t["name"]: t["met"] for t in targets if t["bound"] is not None}
    assert met["relative gradient error, float32 logits"]
    assert met["relative gradient error, bfloat16 logits, of the operation"]


def test_accuracy_sees_an_error_at_ties_of_one_row():
    """Ties may go either way, but all of a row's together."""
    logits = accuracy.CASES["coarse grid"](
        *torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(0))
    )
    exact = accuracy.gradient(accuracy.mean_of("tv"), logits, exactly=True)
    assert accuracy.distance(exact, accuracy.mean_of("tv"), logits) < 1e-9
    exact[0, 0] *= 2
    assert accuracy.distance(exact, accuracy.mean_of("tv"), logits) > 1e-4
