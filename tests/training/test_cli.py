"""Capture, training, resume, export and evaluation, each through its command line.

One run of each starts from nothing, as a user's does; the rest may share their imports.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
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

from specforge_lk.evaluate.report import Result, read_report
from specforge_lk.evaluate.rounds import Rounds

pytestmark = pytest.mark.slow

STEPS = 3 * EPOCH
LAMBDA = "training.loss=lk_lambda"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """One command captures everything; the last samples become the held-out features."""
    setup = prepare(tmp_path_factory.mktemp("training"))
    with setup.responses.open("a") as file:
        file.write(setup.held_out.read_text())
    run("specforge-lk", *capture_arguments(setup), fresh=True)
    setup.held_out_features.mkdir()
    for path in sorted(setup.features.glob("*.ckpt"))[-HELD_OUT:]:
        path.rename(setup.held_out_features / path.name)
    # The record of the capture names the files that stay.
    record = setup.features / "capture.json"
    held = json.loads(record.read_text())
    held["files"] = sorted(path.name for path in setup.features.glob("*.ckpt"))
    record.write_text(json.dumps(held))
    return setup


def evaluating(setup: Setup) -> list[str]:
    return [
        f"training.eval_interval={STEPS}",
        f"data.eval_hidden_states_path={setup.held_out_features}",
    ]


@pytest.fixture(scope="module")
def kl_run(setup: Setup) -> Finished:
    return setup.train("kl", "training.loss=kl", *evaluating(setup))


@pytest.fixture(scope="module")
def lambda_run(setup: Setup) -> Finished:
    return setup.train("lk_lambda", LAMBDA, *evaluating(setup), fresh=True)


@pytest.fixture(scope="module")
def accumulated_run(setup: Setup) -> Finished:
    """The remaining loss, two micro-batches of one sample to an optimizer step."""
    accumulate = ["training.batch_size=1", "training.accumulation_steps=2"]
    return setup.train("lk_alpha", "training.loss=lk_alpha", *accumulate)


@pytest.fixture(scope="module")
def evaluations(setup: Setup, lambda_run: Finished) -> list[Path]:
    """Reports of `specforge-lk eval` on the exported draft, with one head and more."""
    draft = setup.root / "export"
    paths = ["--checkpoint", setup.checkpoint("lk_lambda", STEPS), "--output-dir", draft]
    config = ["--draft-config", setup.draft_config, "--vocab-mapping", setup.mapping]
    source = ["--embedding-source", setup.target]
    run("specforge", "export", "--to", "hf", *paths, *config, *source, fresh=True)
    models = ["--target", setup.target, "--draft", f"lk_lambda={draft}"]
    settings = ["--held-out", setup.held_out, "--sampled-by", "temperature=1"]
    reports = [setup.root / f"report-{heads}.json" for heads in range(1, HEADS + 1)]
    for heads, report in enumerate(reports, start=1):
        several = ["--heads", heads, "--out", report]
        run("specforge-lk", "eval", *models, *settings, *several, fresh=heads == HEADS)
    return reports


@pytest.mark.parametrize("name", ["kl_run", "lambda_run", "accumulated_run"])
def test_loss_falls_and_metrics_are_acceptance_rates(
    name: str, request: pytest.FixtureRequest
) -> None:
    finished = request.getfixturevalue(name)
    assert sorted(finished.steps) == list(range(1, STEPS + 1))
    losses = finished.epoch_losses()
    assert losses == sorted(losses, reverse=True), losses
    # The first epoch already learns, so its mean is not where the loss began.
    assert losses[-1] < 0.95 * losses[0]
    for metrics in finished.steps.values():
        assert metrics["grad_norm"] > 0
        for head in range(HEADS):
            alpha, coverage = metrics[f"alpha_{head}"], metrics[f"coverage_{head}"]
            assert 0 <= alpha <= coverage * (1 + 1e-6) <= 1
            assert 0 <= metrics[f"past_{head}"] <= 1
            assert 1 <= metrics["tau_expected"] <= 1 + HEADS
            assert (f"lambda_{head}" in metrics) == (name == "lambda_run")
            if name == "lambda_run":
                assert metrics[f"lambda_{head}"] == pytest.approx(math.exp(-3 * alpha), rel=1e-5)


def test_losses_are_their_definitions(kl_run: Finished, lambda_run: Finished) -> None:
    """What is logged as the loss of a head, from what is logged beside it."""
    for finished in (kl_run, lambda_run):
        for metrics in finished.steps.values():
            for head in range(HEADS):
                weight = metrics.get(f"lambda_{head}", 1.0)
                total_variation = 1 - metrics[f"alpha_{head}"]
                expected = weight * metrics[f"kl_{head}"] + (1 - weight) * total_variation
                assert metrics[f"ploss_{head}"] == pytest.approx(expected, rel=1e-5)
    # The same draft on the same batch, before anything was learned.
    for name in ("alpha_0", "coverage_0", "kl_0", "past_0", "tau_expected"):
        assert kl_run.steps[1][name] == pytest.approx(lambda_run.steps[1][name], rel=1e-6)


def test_micro_batches_make_one_step(setup: Setup, accumulated_run: Finished) -> None:
    state = torch.load(setup.checkpoint("lk_alpha", STEPS) / "training_state.pt", weights_only=True)
    assert (state["global_step"], state["accumulation_steps"]) == (STEPS, 2)


def test_resumed_run_ends_with_the_same_weights(setup: Setup, lambda_run: Finished) -> None:
    half = STEPS // 2
    horizon = f"training.total_steps={STEPS}"
    stopped = setup.train("stopped", LAMBDA, horizon, f"training.max_steps={half}")
    assert max(stopped.steps) == half
    resume = f"training.resume_from={setup.checkpoint('stopped', half)}"
    resumed = setup.train("resumed", LAMBDA, horizon, resume)
    assert sorted(resumed.steps) == list(range(half + 1, STEPS + 1))
    weights, expected = setup.weights("resumed", STEPS), setup.weights("lk_lambda", STEPS)
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize(
    "loss", [[], [LAMBDA, "training.loss_options.eta=10"]], ids=["stock", "other eta"]
)
def test_checkpoint_resumes_with_its_own_loss_only(
    setup: Setup, lambda_run: Finished, loss: list[str]
) -> None:
    resume = f"training.resume_from={setup.checkpoint('lk_lambda', EPOCH)}"
    refused = setup.train("refused", *loss, resume, check=False)
    assert refused.returncode
    assert "training_loss=lk_lambda" in refused.tail() and '"eta": 3.0' in refused.tail()
    assert not refused.steps


def test_two_processes_equal_one(setup: Setup, lambda_run: Finished) -> None:
    """Rank r takes every second sample, so two ranks of batch 1 see what one of batch 2 sees.

    Without training.loss_data_parallel the losses differ by some thousandths, since samples differ
    in length, and the weights by two thirds of the way that they have gone.
    """
    together = setup.train(
        "two",
        LAMBDA,
        "training.batch_size=1",
        "training.loss_data_parallel=true",
        "deployment.trainer.nproc_per_node=2",
    )
    assert [step for step, _ in together.logged] == [s + 1 for s in range(STEPS) for _ in range(2)]
    # Before the first update, a difference is one of rounding.
    for step, metrics in together.logged:
        close = MEAN_ERROR if step == 1 else 1e-3
        for name in ("loss", "tau_expected", "alpha_2", "lambda_2", "coverage_2", "past_2"):
            assert metrics[name] == pytest.approx(lambda_run.steps[step][name], rel=close)
    # AdamW moves a weight whose gradient is rounding alone by a whole learning rate, either way:
    # single weights may be apart, and their distance as a whole may not be.
    weights, expected, earlier = (
        torch.cat([tensor.flatten().float() for _, tensor in sorted(setup.weights(*run).items())])
        for run in (("two", STEPS), ("lk_lambda", STEPS), ("lk_lambda", EPOCH))
    )
    assert (weights - expected).norm() < 0.01 * (expected - earlier).norm()


def report_result(path: Path) -> tuple[Result, Rounds]:
    (result,) = read_report(path).results
    return result, Rounds.load(path.parent / result.arrays)


def test_exported_draft_is_evaluated(evaluations: list[Path]) -> None:
    result, rounds = report_result(evaluations[-1])
    assert result.loss == "lk_lambda" and result.conversations == HELD_OUT
    assert 1 < result.tau_rounds_ci[0] <= result.tau_rounds <= 1 + HEADS
    assert all(0 < alpha <= 1 for alpha in result.alpha_per_head)
    alpha = rounds.alpha[rounds.whole].mean(0)
    np.testing.assert_allclose(result.alpha_per_head, alpha, rtol=1e-5)


def test_engines_find_the_captured_layers(setup: Setup, evaluations: list[Path]) -> None:
    """SpecForge and SGLang number the outputs of layers, vLLM the inputs."""
    config = json.loads((setup.root / "export" / "config.json").read_text())
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in layers]


def test_training_and_evaluation_measure_the_same(
    lambda_run: Finished, evaluations: list[Path]
) -> None:
    """Two implementations: SpecForge's TTT on stored features, and a chain drafted on the target.

    They agree on the positions, too: head i is trained where a chain of i + 1 heads starts.
    """
    metrics = lambda_run.evaluations[STEPS]
    for head, evaluation in enumerate(evaluations):
        result, rounds = report_result(evaluation)
        # Were they much the same everywhere, a head at a wrong position would not show.
        for name, values in (("alpha", rounds.alpha), ("past", rounds.past)):
            of_starts = values[rounds.whole]
            assert of_starts.std(0).min() > 0.02
            expected = float(of_starts[:, head].mean())
            assert metrics[f"{name}_{head}"] == pytest.approx(expected, rel=MEAN_ERROR)
        coverage = float(rounds.coverage[rounds.whole.nonzero()[0] + head].mean())
        assert metrics[f"coverage_{head}"] == pytest.approx(coverage, rel=MEAN_ERROR)
    assert metrics["tau_expected"] == pytest.approx(result.tau_start, rel=MEAN_ERROR)
