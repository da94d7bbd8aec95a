"""`specforge train` from an exported draft: model.draft_checkpoint_path, through the command line.

Where the draft has a vocabulary of its own, its features are captured again before it is
fine-tuned, from other responses: the draft must keep the tokens that it has been trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import EPOCH, Finished, Setup, capture_arguments, prepare_with_features, run

pytestmark = pytest.mark.slow

#: Those whose drafts have a vocabulary of their own.
TRUNCATED = ("eagle3", "medusa", "mlp_speculator")
ALGORITHMS = (*TRUNCATED, "mtp")
#: What the update of a parameter is lost in.
STILL = "training.learning_rate=1e-30"


@dataclass(frozen=True)
class Trained:
    """A run of one pass over the samples, its last evaluation and its export."""

    setup: Setup
    algorithm: str
    finished: Finished

    @property
    def export(self) -> Path:
        return self.setup.root / "export"

    def fine_tune(self, name: str, *overrides: str, check: bool = True) -> Finished:
        """One step from the export, so small that it changes nothing, and an evaluation."""
        start = f"model.draft_checkpoint_path={self.export}"
        one = ("training.max_steps=1", "training.total_steps=1", "training.save_interval=1")
        return self.setup.train(
            name, start, STILL, *one, *evaluating(self.setup, 1), *overrides, check=check
        )


def evaluating(setup: Setup, step: int) -> list[str]:
    return [
        f"training.eval_interval={step}",
        f"data.eval_hidden_states_path={setup.held_out_features}",
    ]


def export(trained: Trained, name: str, step: int, to: Path) -> dict[str, torch.Tensor]:
    setup = trained.setup
    source = ["--embedding-source", setup.target] if trained.algorithm == "eagle3" else []
    checkpoint = setup.checkpoint(name, step)
    config = ["--checkpoint", checkpoint, "--draft-config", setup.draft_config]
    run("specforge", "export", "--to", "hf", *config, *source, "--output-dir", to)
    return load_file(to / "model.safetensors")


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    algorithm = request.param
    setup = prepare_with_features(tmp_path_factory.mktemp(algorithm), algorithm=algorithm)
    run("specforge-lk", *capture_arguments(setup, setup.held_out, setup.held_out_features))
    passes = ("training.num_epochs=1", f"training.max_steps={EPOCH}")
    finished = setup.train("first", *passes, *evaluating(setup, EPOCH))
    made = Trained(setup, algorithm, finished)
    export(made, "first", EPOCH, made.export)
    return made


def test_training_starts_from_the_exported_weights(trained: Trained, tmp_path: Path) -> None:
    """Every tensor, and what is computed from them beside those that the target lends."""
    second = trained.fine_tune("second")
    (loss,) = (metrics["avg_loss"] for metrics in trained.finished.evaluations.values())
    (again,) = (metrics["avg_loss"] for metrics in second.evaluations.values())
    # Float32 sums of the same numbers.
    assert again == pytest.approx(loss, rel=1e-6)
    before = load_file(trained.export / "model.safetensors")
    after = export(trained, "second", 1, tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("trained", TRUNCATED, indirect=True)
def test_the_draft_keeps_its_vocabulary(trained: Trained, tmp_path: Path) -> None:
    """Without a mapping, SpecForge derives one from the responses that it trains on."""
    other = f"data.hidden_states_path={trained.setup.held_out_features}"
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    trained.fine_tune("own", "model.vocab_mapping_path=", other, cache)
    before = load_file(trained.export / "model.safetensors")
    after = export(trained, "own", 1, tmp_path / "own")
    for name in ("d2t", "t2d"):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("trained", TRUNCATED, indirect=True)
def test_another_vocabulary_is_refused(trained: Trained, tmp_path: Path) -> None:
    t2d = torch.load(trained.setup.mapping, weights_only=True)["t2d"].roll(1)
    d2t = t2d.nonzero().flatten() - torch.arange(int(t2d.sum()))
    torch.save({"t2d": t2d, "d2t": d2t}, tmp_path / "other.pt")
    mapping = f"model.vocab_mapping_path={tmp_path / 'other.pt'}"
    refused = trained.fine_tune("refused", mapping, check=False)
    assert refused.returncode
    message = refused.tail()
    for part in (str(tmp_path / "other.pt"), str(trained.export), "model.vocab_mapping_path"):
        assert part in message
