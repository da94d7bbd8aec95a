"""With training.loss unset, the patched SpecForge trains bit for bit as the unpatched one.

Unpatched SpecForge does not import on a CPU, so it has the patch that makes Triton optional, and
those that change training on purpose: all that have a `baseline` in the series' ``series.toml``.
What they record for resuming stays out: it is written on further patches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from series_tree import SERIES, unpack
from training_run import ENVIRONMENT, EPOCH, Finished, Setup, prepare_with_features

from specforge_lk.patching import git_apply
from tools.cover_letter import entries, number

pytestmark = pytest.mark.slow

#: P-EAGLE cannot train offline before the patches; its loss is compared instead.
ALGORITHMS = ("eagle3", "dflash", "domino", "dspark")
STEPS = 3 * EPOCH
#: What is a function of the loss and its gradients; acceptance metrics were wrong before.
COMPARED = ("loss", "grad_norm", "ploss_", "acc_", "lr")


@pytest.fixture(scope="module")
def unpatched(
    pristine_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give the release with the patches named above."""
    wheel = pristine_wheel(f"specforge=={SERIES.version}")
    tree = unpack(wheel, tmp_path_factory.mktemp("unpatched"), SERIES)
    known = entries()
    named = [patch for patch in SERIES.patches if known[number(patch)].baseline]
    assert named
    resuming = ("*providers.py", "*trainer.py", "*defaults.py")
    for patch in named:
        git_apply(tree, patch, *(f"--exclude={path}" for path in ("tests/*", *resuming)))
    return tree


@pytest.fixture(scope="module", params=ALGORITHMS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """In bfloat16, like the unpatched target head, and without settings that only patches add."""
    setup = prepare_with_features(
        tmp_path_factory.mktemp("stock"), "model.torch_dtype=bfloat16", algorithm=request.param
    )
    config = json.loads(setup.config.read_text())
    del config["model"]["target_head_dtype"]
    config["model"]["torch_dtype"] = "bfloat16"
    setup.config.write_text(json.dumps(config))
    return setup


@pytest.fixture(scope="module")
def before(setup: Setup, unpatched: Path) -> Finished:
    # Proof of which SpecForge runs.
    newer = setup.train("newer", "training.loss=kl", check=False, PYTHONPATH=str(unpatched))
    assert newer.returncode and "'training.loss' does not exist" in newer.tail()
    return setup.train("before", PYTHONPATH=str(unpatched))


@pytest.fixture(scope="module")
def after(setup: Setup) -> Finished:
    return setup.train("after")


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its place in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    return {k: v for key, item in items for k, v in tensors(item, f"{name}/{key}").items()}


def test_every_step_logs_the_same(before: Finished, after: Finished) -> None:
    assert sorted(before.steps) == sorted(after.steps) == list(range(1, STEPS + 1))
    for step, metrics in before.steps.items():
        compared = {name for name in metrics if name.startswith(COMPARED)}
        assert {"loss", "grad_norm"} <= compared
        for name in compared:
            assert after.steps[step][name] == metrics[name], (step, name)


def test_weights_and_optimizer_states_are_the_same(
    setup: Setup, before: Finished, after: Finished
) -> None:
    for file in ("training_state.pt", "training_state_rank0.pt"):
        old, new = (
            tensors(torch.load(setup.checkpoint(run, STEPS) / file, weights_only=True))
            for run in ("before", "after")
        )
        assert old and old.keys() == new.keys()
        for name in old:
            assert torch.equal(old[name], new[name]), f"{file}: {name}"


def test_stock_checkpoint_does_not_resume_with_a_loss(setup: Setup, before: Finished) -> None:
    resume = f"training.resume_from={setup.checkpoint('before', EPOCH)}"
    refused = setup.train("refused", "training.loss=lk_lambda", resume, check=False)
    assert refused.returncode and not refused.steps
    assert "training_loss=None" in refused.tail() and "training_loss=lk_lambda" in refused.tail()


@pytest.fixture(scope="module")
def steps(unpatched: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What stock_steps.py saves with the unpatched SpecForge and with the patched one."""
    script = Path(__file__).parents[1] / "helpers" / "stock_steps.py"
    root, saved = tmp_path_factory.mktemp("steps"), []
    for name, path in (("before", [str(unpatched)]), ("after", [])):
        file = root / f"{name}.pt"
        environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([*path, str(script.parent)])}
        command = [sys.executable, str(script), str(root), str(file)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-4000:]
        saved.append(torch.load(file, weights_only=True))
    old, new = saved
    return old, new


@pytest.mark.parametrize(
    "name",
    [f"sharded {algorithm}" for algorithm in (*ALGORITHMS, "eagle3-compact")] + ["loss of peagle"],
)
def test_a_step_is_the_same(steps: tuple[dict, dict], name: str) -> None:
    """Loss and gradients under SHARD_GRAD_OP: FSDP cast the model's inputs before the patches.

    P-EAGLE, which does not train on a CPU without them, has its loss and metrics compared.
    """
    old, new = (saved[name] for saved in steps)
    assert len(old) > 5 and old.keys() == new.keys()
    assert any(value.any() for key, value in old.items() if key != "loss")
    for key, value in old.items():
        assert torch.equal(value, new[key]), key
