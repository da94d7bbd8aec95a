"""Responses sampled from a server: on-policy, none lost or doubled, whatever fails on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import chat_server
import pytest
from chat_server import END, ChatServer, answer, token_ids
from tiny_target import build_tokenizer
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data import sample_server as client
from specforge_lk.data.conversations import Chat

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    with chat_server.running() as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.05)


def prompts(directory: Path, count: int) -> Path:
    path = directory / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(server: ChatServer, directory: Path, *more: str) -> list[str]:
    paths = ["--prompts", str(directory / "prompts.jsonl"), "--out", str(directory / "out.jsonl")]
    return ["generate", "--server", server.url, *paths, "--max-new-tokens", "50", *more]


def invoke(*args, env: dict | None = None):
    return CliRunner().invoke(app, arguments(*args), env=env)


def run(*args, env: dict | None = None) -> str:
    result = invoke(*args, env=env)
    assert result.exit_code == 0, result.output
    return result.output


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]


def assert_whole(directory: Path, count: int) -> None:
    """Every prompt has its own answer, once."""
    assert Counter(row["id"] for row in rows(directory)) == {f"p{i}": 1 for i in range(count)}
    for row in rows(directory):
        question, said = row["conversations"]
        assert question == {"role": "user", "content": f"question {row['id'][1:]}"}
        assert said == {"role": "assistant", "content": answer(question["content"])}
        assert row["response_ids"] == [*token_ids(said["content"]), END] and row["finished"]


def test_requests_ask_for_the_target_s_own_distribution(server, tmp_path: Path):
    prompts(tmp_path, 3)
    options = ["--serving", "sglang,temperature=0.5,top_p=0.9", "--seed", "3"]
    output = run(server, tmp_path, *options, env={"OPENAI_API_KEY": "secret"})
    assert "3 responses (3 new, 3 finished), 39 tokens" in output
    assert_whole(tmp_path, 3)
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["top_p"]) == ("tiny", 0.5, 0.9)
    assert body["max_tokens"] == 50 and body["return_token_ids"] is True
    # Left out, engines would take these from the target's generation_config.json.
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
    assert len({body["seed"] for body in server.requests}) == 3
    assert all(0 <= body["seed"] < 2**31 for body in server.requests)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "out.jsonl.settings.json").read_text()
    assert [row["sampling"] for row in rows(tmp_path)] == [{"temperature": 0.5, "top_p": 0.9}] * 3

    result = invoke(server, tmp_path, *options, "--target", "other")
    assert result.exit_code == 1 and "target='tiny', not 'other'" in result.output


def test_plain_openai_servers_give_rows_that_capture_tokenizes(server, tmp_path: Path):
    prompts(tmp_path, 2)
    server.with_ids = False
    server.choice = {"finish_reason": "length"}
    output = run(server, tmp_path, "--no-extensions", "--target", "mine")
    assert "2 responses (2 new, 0 finished), 0 tokens" in output
    assert "2 without token ids" in output
    assert set(server.requests[0]) == {
        *("model", "messages", "temperature", "top_p", "max_tokens", "seed")
    }
    tokenizer = build_tokenizer()
    for row in rows(tmp_path):
        assert "response_ids" not in row and row["finished"] is False
        assert "sampling" not in row  # what else this server truncates is not known
        (tokens,) = Chat(tokenizer, ()).tokenize(row)
        said = [t for t, mask in zip(tokens.input_ids, tokens.loss_mask, strict=True) if mask]
        assert tokenizer.decode(said) == answer(row["conversations"][0]["content"])


@pytest.mark.parametrize(
    "choice",
    [
        {"token_ids": [7, 8, END]},
        {"token_ids": [7, 8]},
        {
            "meta_info": {
                "output_token_logprobs": [[-0.1, 7, None], [-2.0, 8, None], [-1.0, END, None]]
            }
        },
    ],
    ids=["vLLM", "without the end", "SGLang 0.5.14"],
)
def test_sampled_tokens_end_with_the_one_that_ended_the_response(
    choice: dict, server, tmp_path: Path
):
    prompts(tmp_path, 1)
    server.with_ids = False
    server.choice = {"matched_stop": END, **choice}
    run(server, tmp_path)
    assert rows(tmp_path)[0]["response_ids"] == [7, 8, END]
    # Without both, SGLang 0.5.14 gives no token ids.
    assert server.requests[0]["logprobs"] and server.requests[0]["return_meta_info"]


@pytest.mark.parametrize(
    ("options", "choice", "sampling"),
    [
        (["--top-k", "20", "--top-p", "0.9"], {}, {"temperature": 1, "top_k": 20, "top_p": 0.9}),
        (["--top-k", "20"], {"meta_info": {}}, {"temperature": 1, "top_k": 20}),
        # SGLang takes top-p of another set of tokens.
        (["--top-k", "20", "--top-p", "0.9"], {"meta_info": {}}, None),
        ([], {"token_ids": None}, None),
    ],
    ids=["vLLM", "SGLang", "SGLang with both", "without token ids"],
)
def test_rows_say_how_they_were_sampled_where_that_is_known(
    options: list[str], choice: dict, sampling: dict | None, server, tmp_path: Path
):
    prompts(tmp_path, 1)
    server.choice = choice
    run(server, tmp_path, *options)
    assert server.requests[0]["top_k"] == (20 if options else -1)
    (row,) = rows(tmp_path)
    assert row.get("sampling") == sampling


def test_failures_that_pass_are_tried_again(server, tmp_path: Path):
    prompts(tmp_path, 60)
    server.fail = chat_server.unreliable(seed=1, share=0.4)
    run(server, tmp_path, "--timeout", "0.5", "--concurrency", "16", "--retries", "20")
    assert_whole(tmp_path, 60)
    assert len(server.requests) > 75


def test_requests_under_way_are_bounded(server, tmp_path: Path):
    prompts(tmp_path, 30)
    server.delay = 0.05
    run(server, tmp_path, "--concurrency", "5")
    assert server.most == 5


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form: str, server, tmp_path: Path):
    prompts(tmp_path, 1)
    seen = []

    def fail(handler, prompt: str) -> bool:
        if seen:
            return False
        seen.append(prompt)
        # A date has whole seconds: this one is between 1 and 2 ahead.
        when = {"seconds": "1", "date": formatdate(time.time() // 1 + 2, usegmt=True)}[form]
        handler.reply(429, "busy", Retry_After=when)
        return True

    server.fail = fail
    run(server, tmp_path)
    first, second = server.arrivals
    assert second - first >= 0.95


def test_a_server_that_stays_down_loses_nothing(server, tmp_path: Path):
    prompts(tmp_path, 12)
    server.fail = lambda handler, prompt: (
        server.answered.total() >= 5 and not handler.reply(500, "broken")
    )
    result = invoke(server, tmp_path, "--retries", "3", "--concurrency", "1")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "prompt 'p5': status 500, 4 times in a row" in result.output
    assert [row["id"] for row in rows(tmp_path)] == [f"p{i}" for i in range(5)]
    server.fail = lambda handler, prompt: False
    assert "12 responses (7 new" in run(server, tmp_path)
    assert_whole(tmp_path, 12)


def test_refused_prompts_are_named(server, tmp_path: Path):
    prompts(tmp_path, 20)
    server.fail = lambda handler, prompt: (
        prompt.endswith("7") and not handler.reply(400, {"message": "too long"})
    )
    result = invoke(server, tmp_path, "--concurrency", "2")
    assert result.exit_code == 1
    assert "prompt 'p7' was refused" in result.output and "too long" in result.output
    assert "--skip-refused" in result.output
    kept = len(rows(tmp_path))
    assert 5 <= kept < 18
    output = run(server, tmp_path, "--skip-refused")
    assert f"18 responses ({18 - kept} new" in output and "2 prompts were refused" in output
    assert "'p17' was refused" in output
    assert {row["id"] for row in rows(tmp_path)} == {f"p{i}" for i in range(20)} - {"p7", "p17"}


@pytest.mark.slow
def test_killed_runs_continue_with_nothing_lost_or_doubled(server, tmp_path: Path):
    count = 400
    prompts(tmp_path, count)
    server.delay = 0.05
    server.fail = chat_server.unreliable(seed=2, share=0.05)
    options = ["--timeout", "1", "--concurrency", "8"]
    program = "from specforge_lk.cli import main; main()"
    out, chance, saved = tmp_path / "out.jsonl", random.Random(0), 0
    for _ in range(3):
        until = saved + chance.randrange(1, 80)
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments(server, tmp_path, *options)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while not out.exists() or out.read_bytes().count(b"\n") < until:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = out.read_bytes().count(b"\n")
        with out.open("a") as stream:  # what a crash in the middle of a write leaves
            stream.write('{"id": "p399", "conversations": [{"role"')
    assert saved < count
    server.delay = 0
    assert f"{count} responses ({count - saved} new" in run(server, tmp_path, *options)
    assert_whole(tmp_path, count)
    assert "(0 new" in run(server, tmp_path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"models": ["a", "b"]}, [], "serves a, b: name one"),
        ({"models": []}, [], "serves no model: name one"),
        ({"choice": {"finish_reason": "abort"}}, [], "finish_reason 'abort', 2 times in a row"),
        (
            {"with_ids": False, "choice": {"message": {"content": "x", "reasoning_content": "y"}}},
            [],
            "gives no token ids",
        ),
        (
            {"fail": lambda handler, prompt: not handler.reply(401, "who?")},
            [],
            "status 401, who?; check --server, --target and --api-key",
        ),
        ({}, ["--server", "localhost:1"], "'localhost:1' is no http:// or https:// address"),
        ({}, ["--server", "http://host:port"], "http://host:port is no address of a server"),
        ({}, ["--server", "http://127.0.0.1:9"], "models: ConnectError"),
        ({}, ["--top-p", "0"], "top_p must be above 0"),
    ],
)
def test_bad_servers(change: dict, options: list[str], message: str, server, tmp_path: Path):
    prompts(tmp_path, 2)
    for name, value in change.items():
        setattr(server, name, value)
    result = invoke(server, tmp_path, "--retries", "1", *options)
    assert result.exit_code == 1 and message in result.output, result.output
    assert isinstance(result.exception, SystemExit), result.exception


def test_local_options_are_checked(tmp_path: Path):
    prompts(tmp_path, 1)
    paths = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    for options, message in [
        ([], "give --target, or --server"),
        (
            ["--target", "x", "--serving", "vllm", "--top-p", "0.5", "--temperature", "1"],
            "give --serving or --temperature, --top-p, not both",
        ),
        (["--server", "x", "--no-extensions", "--top-k", "5"], "leave out --no-extensions"),
    ]:
        result = CliRunner().invoke(app, ["generate", *paths, *options], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in result.output
