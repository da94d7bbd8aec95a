"""Released prompts and completions become conversations: whole, in order, after any crash."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_target import build_tokenizer
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.conversations import Chat
from specforge_lk.data.jsonl import read_jsonl
from specforge_lk.data.prompts import read_prompts

ROOT = Path(__file__).parents[2]


def released(count: int) -> list[dict]:
    """Rows in the layout of the released sets."""
    return [
        {
            "id": 7 * i,
            "conversation": [{"role": "user", "content": f"question {i}"}],
            "generated_message": {"role": "assistant", "content": f"ответ {i}\n" * (1 + i % 9)},
            "source": "ignored",
        }
        for i in range(count)
    ]


def wanted(rows: list[dict]) -> list[dict]:
    return [
        {
            "id": str(row["id"]),
            "conversations": [*row["conversation"], row["generated_message"]],
            "source_row": number,
        }
        for number, row in enumerate(rows)
    ]


def save(rows: list[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(source: Path, out: Path, *more: str):
    arguments = ["data", "--source", str(source), "--out", str(out), *more]
    return CliRunner().invoke(app, arguments)


def run(*args) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.output


def read(path: Path) -> list[dict]:
    return list(read_jsonl(path))


@pytest.mark.parametrize("name", ["set.parquet", "set.jsonl"])
def test_rows_become_conversations_that_capture_reads(name: str, tmp_path: Path):
    rows = released(30)
    out = tmp_path / "out.jsonl"
    assert "30 rows read, 30 new conversations, 0 left out" in run(save(rows, tmp_path / name), out)
    assert read(out) == wanted(rows)
    tokenizer = build_tokenizer()
    (tokens,) = Chat(tokenizer, ()).tokenize(read(out)[3])
    supervised = [t for t, m in zip(tokens.input_ids, tokens.loss_mask, strict=True) if m]
    assert tokenizer.decode(supervised) == rows[3]["generated_message"]["content"] + "<|im_end|>"


def test_a_folder_has_subsets_and_splits(tmp_path: Path):
    rows = released(6)
    for row in rows:
        row["other_target"] = {"role": "assistant", "content": "said by another"}
    save(rows[:4], tmp_path / "set" / "a" / "train.parquet")
    save(rows[4:], tmp_path / "set" / "b" / "held.parquet")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: a, data_files: [{split: train, path: a/*.parquet}]}\n"
        "- {config_name: b, data_files: [{split: held, path: b/*.parquet}]}\n---\n"
    )
    run(tmp_path / "set", tmp_path / "a.jsonl", "--subset", "a")
    assert read(tmp_path / "a.jsonl") == wanted(rows[:4])
    which = ["--subset", "b", "--split", "held", "--completion", "other_target"]
    run(tmp_path / "set", tmp_path / "b.jsonl", *which)
    said = [row["conversations"][-1]["content"] for row in read(tmp_path / "b.jsonl")]
    assert said == ["said by another"] * 2


def test_messages_keep_their_speakers(tmp_path: Path):
    (row,) = released(1)
    row["conversation"] = [
        {"from": "system", "content": "be brief"},
        {"from": "human", "content": "one"},
        {"from": "gpt", "content": "1"},
        {"from": "human", "content": "two"},
    ]
    row["generated_message"] |= {"finish_reason": "length", "thinking": "hm"}
    run(save([row], tmp_path / "set.jsonl"), tmp_path / "out.jsonl")
    (converted,) = read(tmp_path / "out.jsonl")
    roles = [message["role"] for message in converted["conversations"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert converted["conversations"][-1]["thinking"] == "hm"
    assert converted["finished"] is False

    row["conversation"] = [{"content": "no role, but alone"}]
    run(save([row], tmp_path / "set.jsonl"), tmp_path / "prompts.jsonl", "--prompts-only")
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    assert list(prompts.values()) == [{"id": "0", "prompt": "no role, but alone"}]


@pytest.mark.slow
def test_killed_runs_continue_with_nothing_lost_or_doubled(tmp_path: Path):
    rows = released(8_000)
    source, out = save(rows, tmp_path / "set.parquet"), tmp_path / "out.jsonl"
    program = "from specforge_lk.cli import main; main()"
    command = [sys.executable, "-c", program, "data", "--source", str(source), "--out", str(out)]
    chance = random.Random(0)
    size = 0
    for _ in range(2):
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        until = size + chance.randrange(1, 600_000)
        while not out.exists() or out.stat().st_size < until:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        size = out.stat().st_size
        with out.open("a") as stream:  # what a crash in the middle of a write leaves
            stream.write('{"id": "5", "conversations": [{"ro')
    before = out.read_bytes().count(b"\n")
    assert 500 <= before < 8_000
    assert f"8000 rows read, {8_000 - before} new" in run(source, out)
    assert read(out) == wanted(rows)
    assert "0 new" in run(source, out)


def test_a_larger_limit_continues(tmp_path: Path):
    rows = released(20)
    source, out = save(rows, tmp_path / "set.parquet"), tmp_path / "out.jsonl"
    assert "5 rows read, 5 new" in run(source, out, "--limit", "5")
    assert "12 rows read, 7 new" in run(source, out, "--limit", "12")
    assert "12 rows read, 0 new" in run(source, out, "--limit", "3")
    assert read(out) == wanted(rows[:12])

    rows[11]["id"] = 999
    result = invoke(save(rows, source), out)
    assert (
        result.exit_code == 1 and "begun from other data: its last row is row 12" in result.output
    )
    result = invoke(source, out, "--prompts-only")
    assert result.exit_code == 1 and "completion='generated_message', not None" in result.output
    assert read(out) == wanted(released(12))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"id": None}, "set.jsonl:4: it has no id; its fields are"),
        (
            {"conversation": None},
            "4 (id 21): it has no messages in its field conversation",
        ),
        ({"conversation": [{"role": "user", "content": ""}]}, "no text in conversation[0].content"),
        ({"conversation": [{"role": "assistant", "content": "x"}]}, "is the assistant's, not the"),
        ({"conversation": [{"content": "x"}] * 2}, "it does not say whose conversation[0] is"),
        ({"generated_message": None}, "no text in generated_message.content"),
        ({"generated_message": {"role": "assistant"}}, "no text in generated_message.content"),
    ],
)
def test_a_malformed_row_is_named_and_loses_nothing(damage: dict, message: str, tmp_path: Path):
    rows = released(6)
    rows[3] |= damage
    source, out = save(rows, tmp_path / "set.jsonl"), tmp_path / "out.jsonl"
    result = invoke(source, out)
    assert result.exit_code == 1 and message in result.output, result.output
    assert read(out) == wanted(released(6))[:3]
    refused = invoke(source, out, "--skip-malformed")
    assert refused.exit_code == 1 and "1 of 6 rows would be left out" in refused.output
    out = tmp_path / "other.jsonl"
    some = ("--skip-malformed", "--max-left-out", "0.2")
    assert "6 rows read, 5 new conversations, 1 left out" in run(source, out, *some)
    assert read(out) == [row for row in wanted(released(6)) if row["source_row"] != 3]


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source, out = save(released(2), tmp_path / "set.jsonl"), tmp_path / "out.jsonl"
    (tmp_path / "set.csv").write_text("id\n1\n")
    (tmp_path / "torn.jsonl").write_text('{"id": 1, "conver')
    for arguments, message in [
        ((tmp_path / "set.csv", out), "none of .jsonl, .parquet, .json"),
        ((tmp_path / "torn.jsonl", out), "torn.jsonl"),
        (("nobody/nothing", out), "nobody/nothing"),
        ((source, out, "--split", "held"), "held"),
        ((source, out, "--subset", "a"), "--subset a"),
        ((source, tmp_path / "out.jsonl.gz"), "name it .jsonl"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output
        assert isinstance(result.exception, SystemExit), result.exception


def test_a_completion_that_was_cut_in_its_thoughts_is_kept(tmp_path: Path):
    said = {"role": "assistant", "content": None, "reasoning": "hm"}
    asked = [{"role": "user", "content": "hi"}]
    row = {"id": 1, "conversation": asked, "generated_message": said, "finish_reason": "length"}
    source, out = tmp_path / "set.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row) + "\n")
    result = CliRunner().invoke(app, ["data", "--source", str(source), "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["conversations"][-1] == {**said, "content": ""} and not written["finished"]
