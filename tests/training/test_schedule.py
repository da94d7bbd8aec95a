"""The paper's optimizer settings and head weights, from the command line to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_run import HEADS, Finished, Setup, prepare, prepare_with_features

pytestmark = pytest.mark.slow

LEARNING_RATE, WARMUP_STEPS, BETAS, DECAY = 2e-2, 4, (0.9, 0.95), 0.5
WARMUP = f"training.warmup_steps={WARMUP_STEPS}"
ADAM = f"training.adam_betas={list(BETAS)}"
WEIGHTS = f"training.ploss_decay={DECAY}"
HORIZON = "training.total_steps=6"


def prepare_without_warmup_ratio(root: Path, algorithm: str) -> Setup:
    setup = prepare_with_features(root, algorithm=algorithm)
    config = json.loads(setup.config.read_text())
    del config["training"]["warmup_ratio"]
    setup.config.write_text(json.dumps(config))
    return setup


def two_steps(setup: Setup, *overrides: str) -> Finished:
    stop = ("training.max_steps=2", "training.save_interval=2")
    finished = setup.train("first", *overrides, HORIZON, *stop)
    assert sorted(finished.steps) == [1, 2]
    return finished


def assert_heads_weigh_decay_to_their_number(finished: Finished) -> None:
    for metrics in finished.steps.values():
        losses = [metrics[f"ploss_{head}"] for head in range(HEADS)]
        expected = sum(DECAY**head * loss for head, loss in enumerate(losses))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_eagle3_trains_and_resumes_with_them_only(tmp_path: Path) -> None:
    setup = prepare_without_warmup_ratio(tmp_path, "eagle3")
    finished = two_steps(setup, WARMUP, ADAM, WEIGHTS)
    assert_heads_weigh_decay_to_their_number(finished)
    for step, metrics in finished.steps.items():
        # The learning rate of the step that follows.
        assert metrics["lr"] == pytest.approx(LEARNING_RATE * (step + 1) / WARMUP_STEPS)

    checkpoint = setup.checkpoint("first", 2)
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    optimizer = state["replicated_optimizer_state"]
    assert optimizer["optimizer_state_dict"]["param_groups"][0]["betas"] == BETAS
    assert optimizer["scheduler_state_dict"]["warmup_epochs"] == WARMUP_STEPS

    resume = (HORIZON, f"training.resume_from={checkpoint}")
    resumed = setup.train("resumed", WARMUP, ADAM, WEIGHTS, *resume, "training.max_steps=3")
    assert resumed.steps[3]["lr"] == pytest.approx(LEARNING_RATE)
    for kept, message in ((WEIGHTS, f"resume with {ADAM}"), (ADAM, f"'ploss_decay', {DECAY}")):
        refused = setup.train("refused", WARMUP, kept, *resume, check=False)
        assert refused.returncode and not refused.steps
        assert message in refused.tail()


def test_heads_of_this_package_weigh_decay_to_their_number(tmp_path: Path) -> None:
    setup = prepare_without_warmup_ratio(tmp_path, "medusa")
    finished = two_steps(setup, WEIGHTS, "training.loss=lk_lambda")
    assert_heads_weigh_decay_to_their_number(finished)
    # That is the log. What is trained is the same: the gradient of another decay is another.
    other = setup.train("other", "training.loss=lk_lambda", HORIZON, "training.max_steps=1")
    assert other.steps[1]["ploss_0"] == finished.steps[1]["ploss_0"]
    assert other.steps[1]["grad_norm"] > 1.01 * finished.steps[1]["grad_norm"]


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    """By `--plan`, before anything starts."""
    setup = prepare(tmp_path, "dflash")
    for setting, message in (
        (WARMUP, "keep training.warmup_steps and remove training.warmup_ratio"),
        (WEIGHTS, f"{WEIGHTS} would be ignored: remove it"),
    ):
        refused = setup.train("refused", setting, "--plan", check=False)
        assert refused.returncode and message in refused.tail()
    setup.train("planned", ADAM, "--plan")
