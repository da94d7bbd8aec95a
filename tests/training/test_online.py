"""Server-streamed training: producer, consumer, capture server and a real Mooncake on loopback.

A streamed run has to give the figures of the run from captured features, although samples arrive
in any order: one optimizer step takes them all, and the DFlash family draws every anchor there is.
P-EAGLE takes one sample at a time and draws its positions, so its samples are all alike.
`make test-online` runs these tests; they need Mooncake and its libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_target import build_tokenizer
from training_run import (
    BIN,
    HEADS,
    SAMPLES,
    Finished,
    Setup,
    capture_arguments,
    free_port,
    prepare,
    run,
    write_rows,
)

from specforge_lk.data.conversations import Chat
from specforge_lk.data.jsonl import read_jsonl

pytestmark = pytest.mark.online

STEPS = 3
LAMBDA = "training.loss=lk_lambda"
#: More anchors than a sample has positions: the DFlash family takes all of them.
ALL_ANCHORS = "training.num_anchors=256"
#: Target layers that every draft's config names.
LAYERS = {
    "eagle3": (1, 2, 4),
    "peagle": (1, 2, 4),
    "dflash": (1, 3),
    "domino": (1, 3),
    "dspark": (1, 3),
    # These read the last hidden state alone; the server is asked for it alone.
    "medusa": (0,),
    "mlp_speculator": (0,),
    "mtp": (0,),
}
LAST_STATE_ALONE = ("medusa", "mlp_speculator", "mtp")
STARTUP_SECONDS = 60


def whole_set(algorithm: str) -> list[str]:
    """Options of a run whose steps take all samples."""
    micro_batches = SAMPLES if algorithm == "peagle" else 1
    return [
        f"training.batch_size={SAMPLES // micro_batches}",
        f"training.accumulation_steps={micro_batches}",
        f"training.num_epochs={STEPS}",
        "training.save_interval=0",
        ALL_ANCHORS,
        # Streamed P-EAGLE takes the tokenizer's unless told; captured, the draft config's.
        "model.mask_token_id=0",
    ]


@contextmanager
def service(
    command: list[object], log: Path, ready: Callable[[], bool], **env: str
) -> Iterator[None]:
    """A process that is running and ready within, and gone afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        )
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    """Whether something serves HTTP at ``url``, be it an error."""
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Online:
    """A run set up for streaming, with Mooncake and the capture server running."""

    algorithm: str
    setup: Setup
    environment: dict[str, str]
    port: int

    @property
    def server_log(self) -> Path:
        return self.setup.root / "server.log"

    def stream(self, name: str, *overrides: str) -> tuple[Finished, list[str]]:
        """`specforge train` from the server; also, what it asked the server for."""
        config = json.loads(self.setup.config.read_text())
        config["model"]["target_backend"] = "sglang"
        data = config["data"]
        del data["hidden_states_path"]
        data["prompts_path"] = str(self.setup.root / "prompts.jsonl")
        data["cache_dir"] = str(self.setup.root / "cache")
        config["training"]["role"] = "auto"
        config["deployment"] = {
            "mode": "disaggregated",
            "disaggregated": {
                "control_dir": str(self.setup.root / f"control-{name}"),
                "backend": "mooncake",
                "store_id": name,
                "server_urls": [f"http://127.0.0.1:{self.port}"],
                "mooncake_metadata_server": self.environment["MOONCAKE_METADATA_SERVER"],
                "mooncake_master_server_addr": self.environment["MOONCAKE_MASTER_SERVER_ADDR"],
                "mooncake_protocol": "tcp",
                "client_buffer_size": 64 << 20,
                "idle_timeout_s": 120,
                "peer_wait_timeout_s": 120,
            },
        }
        path = self.setup.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        asked = len(self._asked())
        into = f"output_dir={self.setup.output(name)}"
        options = (*whole_set(self.algorithm), *overrides)
        finished = run("specforge", "train", "-c", path, into, *options)
        return finished, self._asked()[asked:]

    def _asked(self) -> list[str]:
        lines = self.server_log.read_text().splitlines()
        return [line.removeprefix("captured ") for line in lines if line.startswith("captured ")]


@pytest.fixture(scope="module", params=list(LAYERS))
def online(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Online:
    algorithm = request.param
    setup = prepare(tmp_path_factory.mktemp(algorithm), algorithm)
    if algorithm == "peagle":
        first = next(iter(read_jsonl(setup.responses)))
        write_rows(setup.responses, [{**first, "id": str(i)} for i in range(SAMPLES)])
    run("specforge-lk", *capture_arguments(setup), LAMBDA)
    tokenizer = build_tokenizer()
    chat = Chat(tokenizer, ())
    samples = [s for row in read_jsonl(setup.responses) for s in chat.tokenize(row)]
    rows = [{"input_ids": s.input_ids, "loss_mask": s.loss_mask} for s in samples]
    prompts = setup.root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    rpc, metadata, metrics, port = (free_port() for _ in range(4))
    environment = {
        "MOONCAKE_METADATA_SERVER": f"http://127.0.0.1:{metadata}/metadata",
        "MOONCAKE_MASTER_SERVER_ADDR": f"127.0.0.1:{rpc}",
    }
    master = [
        BIN / "mooncake_master",
        "--enable_http_metadata_server=true",
        "--http_metadata_server_host=127.0.0.1",
        f"--rpc_port={rpc}",
        f"--http_metadata_server_port={metadata}",
        f"--metrics_port={metrics}",
    ]
    server = [
        sys.executable,
        Path(__file__).parents[1] / "helpers" / "capture_server.py",
        setup.target,
        port,
    ]
    key = f"{environment['MOONCAKE_METADATA_SERVER']}?key=probe"
    health = f"http://127.0.0.1:{port}/health"
    with (
        service(master, setup.root / "master.log", lambda: answers(key)),
        service(
            [*server, *LAYERS[algorithm]],
            setup.root / "server.log",
            lambda: answers(health),
            **environment,
        ),
    ):
        yield Online(algorithm, setup, environment, port)


def test_streamed_run_gives_the_figures_of_the_captured_one(online: Online) -> None:
    expected = online.setup.train("offline", *whole_set(online.algorithm), LAMBDA)
    streamed, asked = online.stream("streamed", LAMBDA)
    needs = "last_hidden" if online.algorithm in LAST_STATE_ALONE else "aux last_hidden"
    assert asked == [needs] * (SAMPLES * STEPS)
    assert sorted(streamed.steps) == sorted(expected.steps) == list(range(1, STEPS + 1))
    names = [f"{name}_{head}" for name in ("alpha", "kl", "coverage") for head in range(HEADS)]
    for step, figures in expected.steps.items():
        for name in ("loss", "tau_expected", *names):
            assert streamed.steps[step][name] == pytest.approx(figures[name], rel=1e-4), name


def test_target_states_are_asked_for_only_if_the_loss_needs_them(online: Online) -> None:
    if online.algorithm in LAST_STATE_ALONE:
        pytest.skip("always asks for the last state, and for nothing else")
    _, asked = online.stream("stock")
    needs = "aux" if online.algorithm in ("dflash", "domino") else "aux last_hidden"
    assert set(asked) == {needs}
