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
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
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
RESPONSES = FOLDER / "responses.jsonl"
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
    with EngineServer(engine, assets.target.absolute(), FOLDER / "server.log") as server:
        console.print("[dim]vLLM's server starts[/]")
        server.start()
        sampled = _sample(server, prompts, new_tokens)
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            asked = pool.map(lambda row: _ask(server.url, row, new_tokens), prompts)
            replies = {row["id"]: reply for row, reply in zip(prompts, asked, strict=True)}
    rows = [json.loads(line) for line in RESPONSES.read_text().splitlines()]
    ids = [row["response_ids"] for row in rows if "response_ids" in row]
    again = sum(row.get("response_ids") == replies[row["id"]].tokens for row in rows)
    expected = {(*r.prompt, *r.tokens): len(r.prompt) for r in replies.values()}
    captured = sum(expected.get(tokens) == before for tokens, before in _captured(len(rows)))
    # In another batch float32 may round a near-tie the other way.
    enough = (1 - DIFFERING) * len(prompts)
    return ServedResponses(
        prompts=len(prompts),
        client_killed_at=sampled.client_killed_at,
        server_killed_at=sampled.server_killed_at,
        responses=len(rows),
        tokens=sum(map(len, ids)),
        with_ids=len(ids),
        sampled_again=again,
        captured=captured,
        passed=sampled.continued
        and sorted(row["id"] for row in rows) == sorted(replies)
        and all(row.get("sampling") == {"temperature": 1} for row in rows)
        and len(ids) == len(prompts)
        and min(again, captured) >= enough,
    )


@dataclass(frozen=True)
class _Sampled:
    """How far sampling was when the client was killed, and when the server was.

    ``continued``: both were killed on the way, the client waited for the server, and at the end
    nothing was left to sample.
    """

    client_killed_at: int
    server_killed_at: int
    continued: bool


def _sample(server: EngineServer, prompts: list[dict[str, Any]], new_tokens: int) -> _Sampled:
    """Write responses of the server to `RESPONSES`; kill the client on the way, then the server."""
    asked, log, few = FOLDER / "prompts.jsonl", FOLDER / "client.log", len(prompts) // 4
    for old in FOLDER.glob(f"{RESPONSES.name}*"):
        old.unlink()
    write_text(asked, "".join(json.dumps(row) + "\n" for row in prompts))
    command = [
        *(sys.executable, "-c", "from specforge_lk.cli import main; main()", "generate"),
        *("--server", server.url, "--prompts", str(asked), "--out", str(RESPONSES)),
        *("--max-new-tokens", str(new_tokens), "--concurrency", str(CONCURRENCY)),
        *("--retries", "100"),
    ]
    with log.open("ab") as output, ExitStack() as clients:

        def client() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            clients.callback(process.wait)
            clients.callback(process.kill)
            return process

        first = client()
        client_killed_at = _reached(first, few)
        first.kill()
        first.wait()
        second = client()
        server_killed_at = _reached(second, client_killed_at + few)
        server.kill()
        time.sleep(2)  # requests that were under way fail, and are tried again
        waited = second.poll() is None
        server.start()
        if second.wait() or client().wait():
            fail("specforge-lk generate failed", log)
    nothing_left = "(0 new" in log.read_text().strip().rpartition("\n")[2]
    on_the_way = server_killed_at < len(prompts)
    return _Sampled(client_killed_at, server_killed_at, waited and on_the_way and nothing_left)


def _reached(client: subprocess.Popen[bytes], least: int) -> int:
    """Wait until a client has written this many responses, and return how many there are."""
    while (now := RESPONSES.read_bytes().count(b"\n") if RESPONSES.exists() else 0) < least:
        if client.poll() is not None:
            fail("specforge-lk generate ended too early", FOLDER / "client.log")
        time.sleep(0.05)
    return now


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


def _captured(count: int) -> list[tuple[tuple[int, ...], int]]:
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
        responses=RESPONSES,
    )
    samples = []
    for file in sorted(features.glob("*.ckpt")):
        record = torch.load(file, weights_only=True)
        tokens, mask = (record[name].flatten().tolist() for name in ("input_ids", "loss_mask"))
        before = mask.index(1) if 1 in mask else -1
        samples.append((tuple(tokens), before if all(mask[before:]) else -1))
    return samples
