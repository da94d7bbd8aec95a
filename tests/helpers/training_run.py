"""A tiny target with its features, and `specforge` and `specforge-lk` run on them as a user does.

Every command is a process of its own. It enters at the function of its console script, in a fork
of a process that has imported SpecForge, unless it is to start from nothing.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from forks import Forks
from tiny_target import build_model, build_tokenizer, draft_config
from typer.testing import CliRunner

from specforge_lk.drafts.table import DRAFTS

BIN = Path(sys.executable).parent
DRAFT_VOCAB_SIZE = 96
HEADS = 3
BATCH_SIZE = 2
SAMPLES = 12
HELD_OUT = 5
#: Optimizer steps per pass over the samples; every pass sees the same ones.
EPOCH = SAMPLES // BATCH_SIZE
#: Relative error of a mean acceptance rate that two programs compute in float32, through target
#: and draft. Their sums of some 2000 terms round logits of up to 15 by eps √2000 · 15 = 8e-5, and
#: with them the acceptance of a chain; it is a tenth of that in the mean over a hundred chains, and
#: 8 times that for the worst of the figures, see `rounding`.
MEAN_ERROR = 6e-5
WORDS = [
    "the",
    "a",
    "draft",
    "target",
    "token",
    "head",
    "of",
    "accepts",
    "rejects",
    "samples",
    "mass",
    "from",
    "under",
    "over",
]


@dataclass(frozen=True)
class Finished:
    """A command that has ended, with stdout and stderr as one text."""

    returncode: int
    output: str

    @property
    def logged(self) -> list[tuple[int, dict[str, float]]]:
        """Every line of training metrics with its step; each process prints its own."""
        return [(step, line) for step, line in _lines(self.output) if "loss" in line]

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        """The training metrics by step."""
        return dict(self.logged)

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """The metrics of every evaluation during training, without ``eval/``."""
        return {
            step: {name.removeprefix("eval/"): value for name, value in line.items()}
            for step, line in _lines(self.output)
            if "eval/avg_loss" in line
        }

    def epoch_losses(self) -> list[float]:
        """Mean training loss of every epoch: comparable, since they hold the same samples."""
        losses = [line["loss"] for _, line in sorted(self.steps.items())]
        return [
            sum(losses[start : start + EPOCH]) / EPOCH for start in range(0, len(losses), EPOCH)
        ]

    def tail(self, lines: int = 8) -> str:
        """The last lines, where an error has to be."""
        return "\n".join(self.output.strip().splitlines()[-lines:])


def _lines(output: str) -> list[tuple[int, dict[str, float]]]:
    # Not anchored to lines: two processes may write on one.
    found = re.findall(r"step (\d+): (\{[^}]*\})", output)
    return [(int(step), ast.literal_eval(line)) for step, line in found]


#: What the commands import, but for plug-ins of other packages.
LIBRARIES = (
    "specforge.cli",
    "specforge.algorithms.builtin",
    "specforge.application",
    "specforge.export.to_hf",
    "specforge.launch",
    "specforge.launch_plan",
    "specforge.modeling.auto",
    "specforge.modeling.draft",
    "specforge.training.assembly",
    "specforge.training.profiling",
    "accelerate.utils",
    "datasets",
    "transformers.models.llama.modeling_llama",
)
#: What is read while they are imported: one thread, nothing compiled, no network.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


@functools.lru_cache(maxsize=2)
def _forks(python_path: str | None) -> Forks:
    """One for each PYTHONPATH; the last two are kept, since each holds some 500 MB."""
    path = {} if python_path is None else {"PYTHONPATH": python_path}
    return Forks(LIBRARIES, os.environ | ENVIRONMENT | path)


def run(
    script: str,
    *args: object,
    check: bool = True,
    fresh: bool = False,
    ranks: int = 1,
    **env: str,
) -> Finished:
    """Run a console script of this environment to its end, on one thread, without the network.

    Args:
        script: its name.
        args: its arguments.
        check: fail where it does.
        fresh: run the script itself, in an interpreter that has imported nothing.
        ranks: how many processes run it as one group, as torchrun would start them.
        env: further variables of its environment.
    """
    command = [str(BIN / script), *map(str, args)]
    environment = os.environ | ENVIRONMENT | env
    if ranks > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **address}
    with tempfile.NamedTemporaryFile("r") as output:
        into = Path(output.name)
        if fresh:
            returncode = _run_fresh(command, into, environment)
        else:
            returncode = _run_forked(command, into, environment, ranks)
        finished = Finished(returncode, output.read())
    assert not check or not finished.returncode, f"{script} {args}\n{finished.tail(40)}"
    return finished


def _run_forked(command: list[str], output: Path, env: Mapping[str, str], ranks: int) -> int:
    (script,) = entry_points(group="console_scripts", name=Path(command[0]).name)
    return _forks(env.get("PYTHONPATH")).run(script.value, command, output, env, ranks=ranks)


def _run_fresh(command: list[str], output: Path, env: Mapping[str, str]) -> int:
    with output.open("w") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.run(command, env=env, **streams, timeout=600).returncode


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def conversations(count: int) -> list[dict]:
    """Rows with a short question and a response of 30 to 90 byte tokens."""
    generator = random.Random(0)
    rows = []
    for index in range(count):
        response = " ".join(generator.choices(WORDS, k=generator.randint(6, 15)))
        messages = [
            {"role": "user", "content": generator.choice(WORDS)},
            {"role": "assistant", "content": response},
        ]
        rows.append({"id": str(index), "conversations": messages})
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Setup:
    """What a training run needs, below one directory."""

    root: Path

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def config(self) -> Path:
        return self.root / "run.json"

    @property
    def draft_config(self) -> Path:
        return self.root / "draft.json"

    @property
    def mapping(self) -> Path:
        return self.root / "vocab_mapping.pt"

    @property
    def responses(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def features(self) -> Path:
        return self.root / "train"

    @property
    def held_out(self) -> Path:
        return self.root / "held_out.jsonl"

    @property
    def questions(self) -> Path:
        return self.root / "questions.jsonl"

    @property
    def held_out_features(self) -> Path:
        return self.root / "held_out"

    def output(self, name: str) -> Path:
        return self.root / "runs" / name

    def train(self, name: str, *overrides: str, **how: Any) -> Finished:
        """Run `specforge train` into ``output(name)``; `run` takes the other arguments."""
        into = f"output_dir={self.output(name)}"
        return run("specforge", "train", "-c", self.config, into, *overrides, **how)

    def checkpoint(self, name: str, step: int) -> Path:
        """The directory of a checkpoint of a run."""
        (path,) = self.output(name).glob(f"*-step{step}")
        return path

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """The draft's weights in a checkpoint of a run."""
        path = self.checkpoint(name, step) / "training_state.pt"
        return torch.load(path, weights_only=True)["draft_state_dict"]


_BLOCK = {"num_anchors": 8, "objective_chunk_blocks": 3}
#: What the training section needs beside the shared settings.
_TRAINING = {
    "eagle3": {"ttt_length": HEADS},
    "peagle": {"batch_size": 1, "accumulation_steps": BATCH_SIZE, "num_depths": HEADS},
    "dflash": _BLOCK,
    "domino": _BLOCK,
    "dspark": _BLOCK,
    "mtp": {"ttt_length": HEADS},
}


def algorithm_settings(algorithm: str, target_config: dict) -> tuple[dict, dict, dict]:
    """A draft's config.json, and what the run config's model and training sections add."""
    model: dict = {"vocab_mapping_path": ""} if DRAFTS[algorithm].whole_vocabulary else {}
    if algorithm in ("dflash", "domino", "dspark"):
        model["target_head_dtype"] = None
    if algorithm == "mtp":
        draft = DRAFTS["mtp"].config(target_config, None, HEADS)
    else:
        draft = draft_config(DRAFT_VOCAB_SIZE, algorithm, HEADS)
    return draft, model, _TRAINING.get(algorithm, {})


def prepare(root: Path, algorithm: str = "eagle3") -> Setup:
    """Target, run config and conversations; the features are still to be captured."""
    setup = Setup(root)
    model = build_model()
    draft, model_settings, training_settings = algorithm_settings(algorithm, model.config.to_dict())
    # Sharper than random: a head that looks at the wrong position is to show in the figures.
    model.lm_head.weight.data *= 3
    # Shards, for the index that unpatched SpecForge asks for.
    model.save_pretrained(setup.target, max_shard_size="100KB")
    build_tokenizer().save_pretrained(setup.target)
    setup.draft_config.write_text(json.dumps(draft))
    rows = conversations(SAMPLES + HELD_OUT)
    write_rows(setup.responses, rows[:SAMPLES])
    write_rows(setup.held_out, rows[SAMPLES:])
    questions = [row["conversations"][0]["content"] for row in rows]
    write_rows(setup.questions, [{"prompt": question} for question in questions])
    config = {
        "model": {
            "target_model_path": str(setup.target),
            "draft_model_config": str(setup.draft_config),
            "vocab_mapping_path": str(setup.mapping),
            "target_head_dtype": "float32",
            "torch_dtype": "float32",
            **model_settings,
        },
        "data": {
            "hidden_states_path": str(setup.features),
            "max_length": 256,
            "dataloader_num_workers": 0,
        },
        "training": {
            "strategy": algorithm,
            "attention_backend": "sdpa",
            "fsdp_sharding": "NO_SHARD",
            "num_epochs": 3,
            "batch_size": BATCH_SIZE,
            "learning_rate": 2e-2,
            "warmup_ratio": 0.05,
            "log_interval": 1,
            "save_interval": EPOCH,
            "seed": 0,
            **training_settings,
        },
        "run_id": "tiny",
        "output_dir": str(setup.output("unnamed")),
    }
    setup.config.write_text(json.dumps(config))
    return setup


def capture_arguments(
    setup: Setup, responses: Path | None = None, features: Path | None = None
) -> list[str]:
    """Arguments of `specforge-lk` that capture features.

    Without ``responses``, those of the training data, and the draft vocabulary with them.
    """
    data = ["--responses", str(responses or setup.responses)]
    out = ["--out", str(features or setup.features)]
    model = json.loads(setup.config.read_text())["model"]
    wanted = model["vocab_mapping_path"] and responses is None
    mapping = ["--vocab-mapping", str(setup.mapping)] if wanted else []
    return ["capture", "--config", str(setup.config), "--device", "cpu", *data, *out, *mapping]


def prepare_with_features(root: Path, *overrides: str, algorithm: str = "eagle3") -> Setup:
    """As `prepare`, and the training features captured within this process."""
    from specforge_lk.cli import app

    setup = prepare(root, algorithm)
    done = CliRunner().invoke(app, [*capture_arguments(setup), *overrides])
    assert not done.exit_code, done.output
    return setup
