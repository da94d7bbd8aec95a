"""The packages in examples/: a loss that knows SpecForge alone, and a draft for this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE
from training_run import (
    DRAFT_VOCAB_SIZE,
    EPOCH,
    HEADS,
    Setup,
    capture_arguments,
    prepare,
    prepare_with_features,
    run,
)

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that pip installed the examples to."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site]
    sources = [EXAMPLES / "plugin_loss", EXAMPLES / "plugin_draft"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *sources], check=True)
    return site


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return prepare_with_features(tmp_path_factory.mktemp("plugin_loss"))


def test_a_loss_of_another_package_trains(setup: Setup, installed: Path) -> None:
    options = ["training.loss=hellinger", "training.loss_options.scale=2.5"]
    finished = setup.train("hellinger", *options, PYTHONPATH=str(installed))
    assert sorted(finished.steps) == list(range(1, 3 * EPOCH + 1))
    losses = finished.epoch_losses()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]
    for metrics in finished.steps.values():
        for head in range(HEADS):
            distance = metrics[f"hellinger_{head}"]
            assert 0 < distance < 1
            assert metrics[f"ploss_{head}"] == pytest.approx(2.5 * distance, rel=1e-5)


def test_a_plugin_can_be_left_out(setup: Setup, installed: Path) -> None:
    refused = setup.train(
        "hidden",
        "training.loss=hellinger",
        check=False,
        PYTHONPATH=str(installed),
        SPECFORGE_PLUGINS="specforge-lk",
    )
    assert refused.returncode
    assert "training.loss='hellinger'" in refused.tail(1)
    assert "['kl', 'lk_alpha', 'lk_lambda', 'reverse_kl', 'tau', 'tv']" in refused.tail(1)


def test_a_draft_of_another_package_trains_and_is_exported(installed: Path, tmp_path: Path) -> None:
    setup = prepare(tmp_path, "medusa")
    settings = json.loads(setup.config.read_text())
    settings["training"]["strategy"] = "linear_heads"
    setup.config.write_text(json.dumps(settings))
    draft = {
        "architectures": ["LinearHeadsModel"],
        "model_type": "linear_heads",
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "num_heads": HEADS,
    }
    setup.draft_config.write_text(json.dumps(draft))
    path = {"PYTHONPATH": str(installed)}
    run("specforge-lk", *capture_arguments(setup), **path)
    losses = setup.train("linear", "training.loss=lk_lambda", **path).epoch_losses()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]
    run(
        *("specforge", "export", "--to", "hf"),
        *("--checkpoint", setup.checkpoint("linear", 3 * EPOCH)),
        *("--draft-config", setup.draft_config, "--output-dir", tmp_path / "export"),
        **path,
    )
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == ["LinearHeadsModel"]
