"""Every experiment takes ``--device``, and everything that it starts runs there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from experiments import demo, runner, study
from experiments.runner import Training

EXPERIMENTS = ("demo", "study", "agreement", "rotary", "gains.__main__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"experiments.{name}")
    monkeypatch.setattr(module, "prepare", lambda root: pytest.fail("assets were made"))
    monkeypatch.setattr(module.os, "chdir", lambda path: None)
    app = typer.Typer()
    app.command()(module.main)
    positional = {"study": ["algorithms"], "gains.__main__": ["fine-tune"]}.get(name, [])
    done = CliRunner().invoke(app, [*positional, "--device", "cuda"])
    assert done.exit_code == 2
    assert "--device cuda cannot be used here" in " ".join(done.output.split()), done.output


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """What was started, with the device that SpecForge is told; everything is a success."""
    found: list[tuple[list[str], str]] = []

    def start(words: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        found.append((words, env["SPECFORGE_DEVICE"]))
        if "--output-dir" in words:
            Path(words[words.index("--output-dir") + 1]).mkdir()
        return SimpleNamespace(returncode=0, poll=lambda: 0, wait=lambda: 0)

    monkeypatch.setattr(runner.subprocess, "run", start)
    monkeypatch.setattr(runner.subprocess, "Popen", start)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Training, "_digest_of_inputs", lambda run: "same")
    # What the device is called matters here, not whether it is there.
    monkeypatch.setattr(runner, "find_device", lambda name: "cuda" if name == "auto" else name)
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_everything_runs_on_the_device(
    device: str, commands: list[tuple[list[str], str]], tmp_path: Path
) -> None:
    run = Training("eagle3", "kl", 0, tmp_path, max_steps=2)
    runner.capture(run.config_path, run.features, run.vocab_mapping, threads=1, device=device)
    runner.train([run], 1, device)
    made = SimpleNamespace(target=tmp_path, benchmarks={"mt_bench": tmp_path})
    demo._evaluate(made, demo.Runs(("kl",), (0,)), tmp_path, 1, device)
    with pytest.raises(FileNotFoundError, match="report"):
        study.evaluate([run], tmp_path, {}, tmp_path / "report.json", 8, 1, device)
    words = [command for command, _ in commands]
    assert [w[:2] for w in words] == [
        ["specforge-lk", "capture"],
        ["specforge", "train"],
        ["specforge", "export"],
        *[["specforge-lk", "eval"]] * 4,
    ]
    for command, told in commands:
        if command[0] == "specforge-lk":
            assert command[command.index("--device") + 1] == device
        if command[1] == "train":
            assert told == device


def test_a_draft_of_another_device_is_trained_again(
    commands: list[tuple[list[str], str]], tmp_path: Path
) -> None:
    run = Training("eagle3", "kl", 0, tmp_path, max_steps=2)
    trained = []
    for device in ("cpu", "cpu", "cuda", "cuda", "cpu"):
        commands.clear()
        runner.train([run], 1, device)
        trained.append(bool(commands))
    assert trained == [True, False, True, False, True]
    # As it was before there was a choice, so that no draft of a CPU is thrown away.
    assert json.loads(run.made_from.read_text()) == {"command": run.command, "inputs": "same"}


def test_reports_name_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.hardware("cpu") == "a CPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert runner.hardware("cuda") == "NVIDIA H100 80GB HBM3"
