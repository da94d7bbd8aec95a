"""Expected errors end a command with one line and an exit code; help and version are right."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from specforge_lk import __version__
from specforge_lk.cli import app, shell

RUN = "--config none.yaml"
GENERATE = "generate --prompts {prompts} --out {out}"


def commands(command: Any, *names: str) -> dict[tuple[str, ...], Any]:
    """Return every command that does something, by the words that call it."""
    if not hasattr(command, "commands"):
        return {names: command}
    found = {}
    for name, child in command.commands.items():
        found |= commands(child, *names, name)
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("the value and the remedy"), 1, "the value and the remedy"),
        (FileNotFoundError("no [such] file"), 1, "no [such] file"),
        (KeyError("a"), 2, "'a'"),
        (LookupError("b"), 3, "b"),
        (ImportError("made by this package"), 1, "made by this package"),
        (ImportError("x", name="specforge.none"), 1, "run 'specforge-lk patch apply'"),
        (ImportError("x", name="transformers.none"), 1, "installed transformers is of a version"),
    ],
)
def test_expected_errors_are_one_line(error: Exception, code: int, message: str, capsys):
    @shell.errors(codes={KeyError: 2, LookupError: 3})
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    said = capsys.readouterr()
    assert ended.value.exit_code == code and said.out == ""
    assert message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("matplotlib.pyplot", "plots"),
        ("datasets", "data"),
        ("specforge", "specforge"),
        ("no_dependency_of_ours", "specforge,data"),
    ],
)
def test_a_failed_import_names_the_smallest_extra(name: str, extra: str, monkeypatch):
    monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
    lazy = ImportError("transformers could not import it")
    lazy.__cause__ = ImportError("no module", name=name)
    for error in (lazy, lazy.__cause__):
        assert shell.missing(error).endswith(
            f": pip install '.[{extra}]' in a clone of SpecForge-LK"
        )


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug"), typer.Exit(5)])
def test_other_errors_pass(error: Exception):
    with pytest.raises(type(error)) as passed, shell.errors():
        raise error
    assert passed.value is error


def test_a_full_gpu_is_expected():
    import torch

    with pytest.raises(typer.Exit), shell.errors(memory="lower --batch-size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_devices():
    assert shell.find_device("cpu") == "cpu"
    assert shell.find_device("auto") in ("cpu", "cuda")
    with pytest.raises(ValueError, match="--device nowhere cannot be used here"):
        shell.find_device("nowhere")
    with pytest.raises(ValueError, match="--device meta computes nothing; give cpu, or auto"):
        shell.find_device("meta")


@pytest.mark.parametrize(
    ("command", "without", "extra"),
    [
        (f"capture {RUN} --responses r.jsonl", "specforge", "specforge"),
        (f"cost {RUN}", "specforge", "specforge"),
        ("data --source nobody/nothing --out {out}", "datasets", "data"),
        (f"{GENERATE} --target x", "transformers", "data"),
        (f"{GENERATE} --server http://localhost:9", "httpx", "data"),
        ("eval --target x --draft kl=y --held-out z --out {out}", "transformers", "data"),
    ],
    ids=lambda value: value.split()[0],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    command: str, without: str, extra: str, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    words = shlex.split(command.format(prompts=prompts, out=tmp_path / "out.jsonl"))
    program = f"import sys; sys.modules[{without!r}] = None; import specforge_lk.cli as c; c.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"needs {without}: pip install '.[{extra}]' in a clone" in last
    assert "Traceback" not in done.stderr


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"specforge-lk {__version__}\n"


@pytest.mark.parametrize("names", COMMANDS, ids="-".join)
def test_help_ends_with_an_example_that_the_command_accepts(names: tuple[str, ...]):
    command = COMMANDS[names]
    shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"}).output
    label, *examples = command.epilog.split("\n\n")
    assert command.help and label == "Example:" and examples
    for example in examples:
        assert example in shown
        program, *words = shlex.split(example)
        assert [program, *words[: len(names)]] == ["specforge-lk", *names]
        command.make_context(names[-1], words[len(names) :]).close()


@pytest.mark.parametrize("names", COMMANDS, ids="-".join)
def test_a_narrow_terminal_cuts_no_word_of_the_help(names: tuple[str, ...]):
    narrow, wide = (
        CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": columns}).output
        for columns in ("80", "200")
    )
    assert narrow.count("…") == wide.count("…")
