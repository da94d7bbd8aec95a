"""A package that knows SpecForge only brings a loss, and trains with it through the CLI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training_run import EPOCH, HEADS, Setup, prepare_with_features

pytestmark = pytest.mark.xdist_group("plugin_example")

SOURCE = Path(__file__).parents[2] / "examples" / "plugin_loss"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that pip installed the package to."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, SOURCE], check=True)
    return site


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return prepare_with_features(tmp_path_factory.mktemp("plugin_example"))


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
    assert "['kl', 'lk_alpha', 'lk_lambda', 'reverse_kl', 'tv']" in refused.tail(1)
