"""lk_lambda with every algorithm: capture, training, resume, export, evaluation.

EAGLE-3, whose figures are compared in more detail, has `test_training_cli`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_run import (
    EPOCH,
    HEADS,
    HELD_OUT,
    MEAN_ERROR,
    Finished,
    Setup,
    capture_arguments,
    prepare,
    run,
)

from specforge_lk.drafts.table import DRAFTS
from specforge_lk.evaluate.report import read_report

pytestmark = pytest.mark.slow

ALGORITHMS = tuple(name for name in DRAFTS if name != "eagle3")
STEPS = 3 * EPOCH
LAMBDA = "training.loss=lk_lambda"
#: More anchors than a sample has positions, and no depth thinned out.
ALL_POSITIONS = ("training.num_anchors=256", "training.down_sample_ratio=1")
STATES = "target_last_hidden_states"


@dataclass(frozen=True)
class Trained:
    algorithm: str
    setup: Setup
    finished: Finished


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    setup = prepare(tmp_path_factory.mktemp(request.param), request.param)
    run("specforge-lk", *capture_arguments(setup), LAMBDA)
    return Trained(request.param, setup, setup.train("lk_lambda", LAMBDA))


def test_loss_falls_and_metrics_are_acceptance_rates(trained: Trained) -> None:
    finished = trained.finished
    assert sorted(finished.steps) == list(range(1, STEPS + 1))
    losses = finished.epoch_losses()
    assert losses[-1] < 0.95 * losses[0], losses
    for metrics in finished.steps.values():
        assert metrics["grad_norm"] > 0
        assert 1 <= metrics["tau_expected"] <= 1 + HEADS
        for head in range(HEADS):
            alpha, coverage = metrics[f"alpha_{head}"], metrics[f"coverage_{head}"]
            assert 0 <= alpha <= coverage * (1 + 1e-6) <= 1 + 1e-6
            if DRAFTS[trained.algorithm].whole_vocabulary:
                assert coverage == pytest.approx(1, abs=1e-6)
            if trained.algorithm != "peagle":
                # P-EAGLE's are means over micro-batches, each with a lambda of its own.
                eta = 10 if trained.algorithm == "medusa" else 3
                assert metrics[f"lambda_{head}"] == pytest.approx(math.exp(-eta * alpha), rel=1e-5)


def test_resumed_run_ends_with_the_same_weights(trained: Trained) -> None:
    """Of the loss that sees a whole chain, and with the lambda that depends on the run's steps."""
    setup, half = trained.setup, STEPS // 2
    settings = ("training.loss=tau", "training.loss_options.lambda_scope=schedule")
    settings += ("training.loss_options.lambda_until=1", f"training.total_steps={STEPS}")
    whole = setup.train("whole", *settings)
    setup.train("stopped", *settings, f"training.max_steps={half}")
    resume = f"training.resume_from={setup.checkpoint('stopped', half)}"
    resumed = setup.train("resumed", *settings, resume)
    assert sorted(resumed.steps) == list(range(half + 1, STEPS + 1))
    for step, metrics in whole.steps.items():
        assert metrics["lambda_0"] == pytest.approx(1 - (step - 1) / STEPS, abs=1e-6)
    weights, expected = setup.weights("resumed", STEPS), setup.weights("whole", STEPS)
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


def test_a_run_goes_on_without_holding_logits(trained: Trained) -> None:
    """The next step is the one that it would have been, to rounding; the one after nearly."""
    setup = trained.setup
    resume = f"training.resume_from={setup.checkpoint('lk_lambda', EPOCH)}"
    horizon = (f"training.total_steps={STEPS}", f"training.max_steps={EPOCH + 2}")
    fused = setup.train("fused", LAMBDA, "training.loss_fused_head=true", resume, *horizon)
    assert sorted(fused.steps) == [EPOCH + 1, EPOCH + 2]
    for step, rel in ((EPOCH + 1, MEAN_ERROR), (EPOCH + 2, 1e-2)):
        expected = trained.finished.steps[step]
        assert fused.steps[step].keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("perf/"):
                continue
            assert fused.steps[step][name] == pytest.approx(value, rel=rel, abs=rel), name


def test_checkpoint_resumes_with_its_own_loss_only(trained: Trained) -> None:
    setup = trained.setup
    resume = f"training.resume_from={setup.checkpoint('lk_lambda', EPOCH)}"
    refused = setup.train("refused", resume, check=False)
    assert refused.returncode and not refused.steps
    assert "training_loss=lk_lambda" in refused.tail()


def test_training_and_evaluation_measure_the_same(trained: Trained) -> None:
    """Two implementations on the same held-out chains: SpecForge's blocks or depths on captured
    features, and what the exported draft drafts beside the target.
    """
    setup = trained.setup
    features = setup.held_out_features
    run("specforge-lk", *capture_arguments(setup, setup.held_out, features), LAMBDA)
    trained_once = setup.train(
        "evaluated",
        LAMBDA,
        *ALL_POSITIONS,
        "training.num_epochs=1",
        f"training.eval_interval={EPOCH}",
        f"data.eval_hidden_states_path={features}",
    )
    measured = trained_once.evaluations[EPOCH]
    draft, report = setup.root / "export", setup.root / "report.json"
    paths = ["--checkpoint", setup.checkpoint("evaluated", EPOCH), "--output-dir", draft]
    run("specforge", "export", "--to", "hf", *paths, "--draft-config", setup.draft_config)
    models = ["--target", setup.target, "--draft", f"lk_lambda={draft}"]
    data = ["--held-out", setup.held_out, "--benchmark", f"questions={setup.questions}"]
    settings = ["--heads", HEADS, "--max-new-tokens", 16, "--sampled"]
    settings += ["--sampled-by", "temperature=1"]
    run("specforge-lk", "eval", *models, *data, *settings, "--out", report)
    exact, answered, sampled = read_report(report).results
    assert exact.loss == "lk_lambda" and exact.conversations == HELD_OUT
    assert exact.tau_start - 1 == pytest.approx(measured["tau_expected"] - 1, rel=MEAN_ERROR)
    last = f"alpha_{HEADS - 1}"
    assert exact.alpha_per_head[-1] == pytest.approx(measured[last], rel=MEAN_ERROR)
    assert 1 <= answered.tau_rounds <= 1 + HEADS
    # By rejection sampling: the acceptance that occurred is the one computed, within its noise.
    reached = sampled.drafted / HEADS
    noise = 4 * (sampled.alpha_per_head[0] / reached) ** 0.5
    assert sampled.alpha_per_head_empirical[0] == pytest.approx(
        sampled.alpha_per_head[0], abs=noise
    )


def test_features_without_target_states_say_what_to_do(trained: Trained, tmp_path: Path) -> None:
    """DFlash and Domino capture them when, and only when, a loss asks for them."""
    if trained.algorithm not in ("dflash", "domino"):
        pytest.skip("always captures target states")
    setup = trained.setup
    stock = [a if a != str(setup.features) else str(tmp_path) for a in capture_arguments(setup)]
    run("specforge-lk", *stock)
    path = sorted(tmp_path.glob("*.ckpt"))[0]
    assert STATES not in torch.load(path, weights_only=True)
    assert STATES in torch.load(setup.features / path.name, weights_only=True)
    elsewhere = f"data.hidden_states_path={tmp_path}"
    refused = setup.train("refused", LAMBDA, elsewhere, check=False)
    assert refused.returncode and "prepare the features again" in refused.tail(30)
