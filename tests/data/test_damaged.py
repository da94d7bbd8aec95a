"""Feature files that cannot be trained on are captured anew; a capture that stops leaves no half.

All from the command line, within this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from specforge.runtime.data_plane.offline_reader import list_feature_files
from torch.testing import assert_close
from training_run import Setup, capture_arguments, prepare
from typer.testing import CliRunner, Result

from specforge_lk.cli import app


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = prepare(tmp_path_factory.mktemp("damaged"))
    rows = setup.responses.read_text().splitlines(keepends=True)
    setup.responses.write_text("".join(rows[:4]))
    return setup


def capture(setup: Setup, *more: str) -> Result:
    return CliRunner().invoke(app, [*capture_arguments(setup), *more])


def captured(setup: Setup) -> list[Path]:
    done = capture(setup)
    assert not done.exit_code, done.output
    return sorted(setup.features.glob("*.ckpt"))


def cut(place: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        end = int(len(content) * place) if place > 0 else len(content) + int(place)
        path.write_bytes(content[:end])

    return damage


def one_byte(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        middle = len(content) // 2
        new = change(content[middle : middle + 1])
        path.write_bytes(content[:middle] + new + content[middle + 1 :])

    return damage


def record(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        torch.save(change(torch.load(path, weights_only=True)), path)

    return damage


#: Kind -> what becomes of a feature file.
DAMAGE = {
    "half": cut(0.5),
    "some bytes": cut(-9),
    "one byte": cut(-1),
    "empty": cut(1e-9),
    "a byte changed": one_byte(lambda byte: bytes([byte[0] ^ 1])),
    "a byte missing": one_byte(lambda byte: b""),
    "states fewer than tokens": record(lambda r: r | {"hidden_state": r["hidden_state"][:, :-1]}),
    "another width": record(lambda r: r | {"hidden_state": r["hidden_state"][..., :-1]}),
    "another width of layers": record(
        lambda r: r | {"aux_hidden_state": r["aux_hidden_state"][..., :64]}
    ),
    "ids outside": record(lambda r: r | {"input_ids": r["input_ids"] + 999}),
    "nothing supervised": record(lambda r: r | {"loss_mask": 0 * r["loss_mask"]}),
    "no tensors": record(lambda r: [1, 2]),
    "not a tensor": record(lambda r: r | {"hidden_state": "x"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_such_a_file_is_captured_anew_and_no_other(setup: Setup, kind: str) -> None:
    files = captured(setup)
    assert len(files) == 4
    before, good = [path.stat().st_mtime_ns for path in files], torch.load(files[1])
    content = files[1].read_bytes()
    DAMAGE[kind](files[1])
    assert files[1].read_bytes() != content
    done = capture(setup)
    assert not done.exit_code and "(1 new," in done.output, done.output
    # The first time it was captured in a batch of another size.
    assert_close(torch.load(files[1]), good, rtol=0, atol=1e-4)
    assert [path.stat().st_mtime_ns for i, path in enumerate(files) if i != 1] == before[
        :1
    ] + before[2:]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the n-th feature file from now on find a full disk, half way through."""

    def fill(after: int) -> None:
        write, left = Path.write_bytes, iter(range(after, -1, -1))

        def write_bytes(path: Path, data: bytes) -> int:
            if next(left) > 0:
                return write(path, data)
            write(path, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


def test_a_full_disk_is_one_line_and_the_capture_goes_on(
    setup: Setup, full_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = setup.root / "full"
    full_disk(2)
    stopped = capture(setup, "--out", str(out))
    assert stopped.exit_code == 1 and isinstance(stopped.exception, SystemExit)
    (line,) = [part for part in stopped.output.splitlines() if "No space left" in part]
    assert str(out / "sample_0000") in line and "Make room and run the same command" in line
    names = sorted(os.listdir(out))
    assert names[0] == "capture.json" and [n[-5:] for n in names[1:]] == [".ckpt", ".ckpt"]
    # SpecForge does not train on a part of it.
    with pytest.raises(ValueError, match=r"full.*was interrupted.*Run the capture again"):
        list_feature_files(str(out))
    monkeypatch.undo()
    done = capture(setup, "--out", str(out))
    assert not done.exit_code and "(2 new," in done.output
    assert len(list_feature_files(str(out))) == 4
    assert json.loads((out / "capture.json").read_text())["complete"] is True


def test_a_manifest_that_is_cut(setup: Setup) -> None:
    captured(setup)
    manifest = setup.features / "capture.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:20])
    refused = capture(setup)
    manifest.write_text(whole)
    assert refused.exit_code == 1 and f"{manifest} is not JSON" in refused.output
    assert "remove the folder" in refused.output


@pytest.mark.parametrize("kind", ["half", "a byte changed", "no tensors"])
def test_a_draft_vocabulary_that_is_damaged(setup: Setup, kind: str) -> None:
    captured(setup)
    whole = setup.mapping.read_bytes()
    if kind == "no tensors":
        torch.save([1], setup.mapping)
    else:
        DAMAGE[kind](setup.mapping)
    refused = capture(setup)
    setup.mapping.write_bytes(whole)
    assert refused.exit_code == 1 and isinstance(refused.exception, SystemExit), refused.output
    assert str(setup.mapping) in refused.output and "--vocab-mapping" in refused.output


#: Recorded tokens -> what the error has to say of them.
IDS = {
    "too great": ([5, 900, 2], "token id 900, outside the target's vocabulary of 264"),
    "negative": ([5, -1, 2], "token id -1, outside"),
    "beyond 32 bits": ([5, 2**40, 2], f"token id {2**40}, outside"),
    "not a number": ([5, "6", 2], "response_ids must be token ids"),
    "a fraction": ([5, 6.5, 2], "response_ids must be token ids"),
}


@pytest.mark.parametrize("command", ["capture", "eval"])
@pytest.mark.parametrize("kind", IDS)
def test_recorded_tokens_that_the_target_does_not_have(
    setup: Setup, kind: str, command: str, tmp_path: Path
) -> None:
    from tiny_target import save_draft

    ids, said = IDS[kind]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"id": "r7", "conversations": chat, "response_ids": ids, "finished": True}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row | {"sampling": {"temperature": 1.0}}) + "\n")
    if command == "capture":
        refused = CliRunner().invoke(app, capture_arguments(setup, rows, tmp_path / "features"))
    else:
        draft = save_draft(tmp_path / "draft")
        arguments = ["--target", str(setup.target), "--draft", f"kl={draft}", "--device", "cpu"]
        files = ["--held-out", str(rows), "--out", str(tmp_path / "report.json")]
        refused = CliRunner().invoke(app, ["eval", *arguments, *files])
    assert refused.exit_code == 1 and isinstance(refused.exception, SystemExit), refused.output
    assert str(rows) in refused.output and "'r7'" in refused.output
    assert said in refused.output
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "features").exists()
