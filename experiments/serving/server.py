"""``generate --server`` and ``capture`` with a real engine: vLLM's OpenAI server, killed twice.

Responses are sampled from a server; the client is killed (kill -9) on the way, and so is the
server while the client waits for it. What the file then holds must be what the server samples for
these prompts and seeds, and what `capture` trains on must be the server's own tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from experiments.assets import Assets
from experiments.runner import CONFIGS, capture, console, fail
from experiments.serving.cases import SERVING
from experiments.serving.compare import DIFFERING
from experiments.serving.engine import environment
from experiments.serving.report import ServedResponses
from specforge_lk.data.prompts import read_rows, user_turns
from specforge_lk.data.responses import Request
from specforge_lk.files import write_text
from specforge_lk.serving import Sampling

FOLDER = SERVING / "server"
#: Requests under way at once.
CONCURRENCY = 4
#: Seconds until a server answers.
START = 600
NAME = "target"


class EngineServer(AbstractContextManager["EngineServer"]):
    """vLLM's OpenAI server in a process group of its own, on one port for all its lives.

    Args:
        python: of vLLM's environment.
        target: Hugging Face folder.
        log: where its output goes.
    """

    def __init__(self, python: Path, target: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log, self._environment = log, environment(python)
        self._command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)),
            *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"),
            *("--max-num-seqs", str(CONCURRENCY)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                fail("vLLM's server does not start", self._log)
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """Kill it with all its processes (kill -9)."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __exit__(self, *error: object) -> None:
        self.kill()


@dataclass(frozen=True)
class _Reply:
    """A chat completion: its tokens, and those of its prompt."""

    prompt: list[int]
    tokens: list[int]


def check(assets: Assets, engine: Path, count: int, new_tokens: int) -> ServedResponses:
    """Sample responses from vLLM's server, capture them, and compare.

    Args:
        assets: target and benchmarks.
        engine: Python of vLLM's environment.
        count: prompts of each benchmark.
        new_tokens: longest response.
    """
    prompts = [
        {"id": row["id"], "prompt": user_turns(row, str(path))[0]}
        for path in assets.benchmarks.values()
        for row in read_rows(str(path))[:count]
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    asked, out = FOLDER / "prompts.jsonl", FOLDER / "responses.jsonl"
    for old in FOLDER.glob("responses.jsonl*"):
        old.unlink()
    write_text(asked, "".join(json.dumps(row) + "\n" for row in prompts))

    def client(url: str) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-c", "from specforge_lk.cli import main; main()", "generate"),
            *("--server", url, "--prompts", str(asked), "--out", str(out)),
            *("--max-new-tokens", str(new_tokens), "--concurrency", str(CONCURRENCY)),
            *("--retries", "100"),
        ]
        with (FOLDER / "client.log").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    with EngineServer(engine, assets.target.absolute(), FOLDER / "server.log") as server:
        console.print("[dim]vLLM's server starts[/]")
        server.start()
        first = client(server.url)
        client_killed_at = _reached(first, lambda: _lines(out), len(prompts) // 4)
        first.kill()
        first.wait()
        second = client(server.url)
        more = client_killed_at + len(prompts) // 4
        server_killed_at = _reached(second, lambda: _lines(out), more)
        server.kill()
        time.sleep(2)  # requests that were under way fail, and are tried again
        waited = second.poll() is None
        server.start()
        if second.wait():
            fail("specforge-lk generate failed", FOLDER / "client.log")
        again = client(server.url)
        if again.wait():
            fail("specforge-lk generate failed", FOLDER / "client.log")
        summary = (FOLDER / "client.log").read_text().strip().rpartition("\n")[2]
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            replies = dict(
                zip(
                    (row["id"] for row in prompts),
                    pool.map(lambda row: _ask(server.url, row, new_tokens), prompts),
                    strict=True,
                )
            )
    captured = _captured(out, len(rows))
    ids = [row["response_ids"] for row in rows if "response_ids" in row]
    expected = {(*reply.prompt, *reply.tokens): len(reply.prompt) for reply in replies.values()}
    found = ServedResponses(
        prompts=len(prompts),
        client_killed_at=client_killed_at,
        server_killed_at=server_killed_at,
        responses=len(rows),
        tokens=sum(map(len, ids)),
        with_ids=len(ids),
        sampled_again=sum(row.get("response_ids") == replies[row["id"]].tokens for row in rows),
        captured=sum(expected.get(tokens) == before for tokens, before in captured),
        passed=False,
    )
    whole = sorted(row["id"] for row in rows) == sorted(row["id"] for row in prompts)
    # In another batch float32 may round a near-tie the other way.
    enough = (1 - DIFFERING) * len(prompts)
    return found.model_copy(
        update={
            "passed": whole
            and waited
            and "(0 new" in summary
            and all(row.get("sampling") == {"temperature": 1} for row in rows)
            and found.with_ids == len(prompts)
            and client_killed_at < server_killed_at < len(prompts)
            and min(found.sampled_again, found.captured) >= enough
        }
    )


def _reached(process: subprocess.Popen[bytes], value: Callable[[], int], least: int) -> int:
    """Wait until a value is at least ``least`` while a process runs, and return it."""
    while (now := value()) < least:
        if process.poll() is not None:
            fail("specforge-lk generate ended too early", FOLDER / "client.log")
        time.sleep(0.05)
    return now


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _ask(url: str, prompt: dict[str, Any], new_tokens: int) -> _Reply:
    """Ask as `generate` does, but for the code that is checked here."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt["prompt"]}],
        "max_tokens": new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "seed": Request(Sampling(), new_tokens).number(prompt["id"]) >> 32,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START)
    response.raise_for_status()
    reply = response.json()
    return _Reply(reply["prompt_token_ids"], reply["choices"][0]["token_ids"])


def _captured(responses: Path, count: int) -> list[tuple[tuple[int, ...], int]]:
    """Capture the responses; return the tokens of every sample, and how many begin unsupervised.

    A sample whose supervised tokens are not its last ones has -1 of these.
    """
    features = FOLDER / "features"
    shutil.rmtree(features, ignore_errors=True)
    capture(
        CONFIGS / "medusa.yaml",
        features,
        None,
        threads=len(os.sched_getaffinity(0)),
        samples=count,
        responses=responses,
    )
    samples = []
    for file in sorted(features.glob("*.ckpt")):
        record = torch.load(file, weights_only=True)
        tokens, mask = (record[name].flatten().tolist() for name in ("input_ids", "loss_mask"))
        before = mask.index(1) if 1 in mask else -1
        samples.append((tuple(tokens), before if all(mask[before:]) else -1))
    return samples
