"""`specforge train` from an exported draft: model.draft_checkpoint_path, through the command line.

A released draft is one more, once `specforge-lk import-draft` has read it.

Where the draft has a vocabulary of its own, its features are captured again before it is
fine-tuned, from other responses: the draft must keep the tokens that it has been trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from released_layouts import as_torch_file, config_of, engine_name, rewrite, vllm_config
from safetensors.torch import load_file
from training_run import (
    EPOCH,
    HEADS,
    MEAN_ERROR,
    Finished,
    Setup,
    capture_arguments,
    prepare_with_features,
    run,
)

from specforge_lk.drafts.table import DRAFTS
from specforge_lk.evaluate.report import read_report

pytestmark = pytest.mark.slow

#: Those whose drafts have a vocabulary of their own.
TRUNCATED = ("eagle3", "peagle", "medusa", "mlp_speculator")
#: Those that are released in other layouts than that of exports.
RELEASED = ("eagle3", "medusa", "mlp_speculator", "mtp")
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
        return self.setup.train(
            name, start, STILL, *steps(1), *evaluating(self.setup, 1), *overrides, check=check
        )


def evaluating(setup: Setup, step: int) -> list[str]:
    return [
        f"training.eval_interval={step}",
        f"data.eval_hidden_states_path={setup.held_out_features}",
    ]


def steps(count: int) -> list[str]:
    return [f"training.{name}={count}" for name in ("max_steps", "total_steps", "save_interval")]


def export(
    trained: Trained, name: str, step: int, to: Path, config: Path | None = None
) -> dict[str, torch.Tensor]:
    setup = trained.setup
    source = ["--embedding-source", setup.target] if trained.algorithm == "eagle3" else []
    checkpoint = setup.checkpoint(name, step)
    paths = ["--checkpoint", checkpoint, "--draft-config", config or setup.draft_config]
    run("specforge", "export", "--to", "hf", *paths, *source, "--output-dir", to)
    return load_file(to / "model.safetensors")


@pytest.fixture(scope="module", params=tuple(DRAFTS))
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


def released(trained: Trained, path: Path) -> Path:
    """The exported draft as vLLM, the published MLP speculators or a target have it."""
    plain = trained.export
    if trained.algorithm == "eagle3":
        return rewrite(plain, path, vllm_config(plain), engine_name, t2d=None)
    if trained.algorithm == "medusa":
        weights = load_file(plain / "model.safetensors")
        heads = [name for name in weights if name.startswith("lm_heads.")]
        backwards = {name: weights[name].flip(0) for name in (*heads, "token_map")}
        config = config_of(plain, architectures=None)
        return as_torch_file(rewrite(plain, path, config, d2t=None, t2d=None, **backwards))
    if trained.algorithm == "mlp_speculator":
        config = config_of(plain, architectures=None)
        return rewrite(plain, path, config, lambda name: name.removeprefix("speculator."))
    # Beside the target's own layers it has the target's architecture.
    config = config_of(plain, architectures=["LlamaForCausalLM"], num_nextn_predict_layers=1)
    return rewrite(plain, path, config)


@pytest.mark.parametrize("trained", RELEASED, indirect=True)
def test_a_released_draft_is_trained_on(trained: Trained, tmp_path: Path) -> None:
    """It measures as it was released, resumes bitwise, and is exported with its vocabulary."""
    setup, out = trained.setup, tmp_path / "imported"
    source = released(trained, tmp_path / "released")
    run("specforge-lk", "import-draft", source, "--target", setup.target, "--out", out)
    mapping = out / "vocab_mapping.pt"
    own = [f"model.draft_model_config={out / 'config.json'}", "training.loss=kl"]
    own.append(f"model.vocab_mapping_path={mapping if mapping.exists() else ''}")
    start = f"model.draft_checkpoint_path={out}"

    still = setup.train("still", start, STILL, *own, *steps(1), *evaluating(setup, 1))
    measured, report = still.evaluations[1], tmp_path / "report.json"
    models = ["--target", setup.target, "--draft", f"kl={source}", "--heads", HEADS]
    held_out = ["--held-out", setup.held_out, "--sampled-by", "temperature=1"]
    run("specforge-lk", "eval", *models, *held_out, "--out", report)
    (exact,) = read_report(report).results
    assert exact.tau_start - 1 == pytest.approx(measured["tau_expected"] - 1, rel=MEAN_ERROR)
    last = f"alpha_{HEADS - 1}"
    assert exact.alpha_per_head[-1] == pytest.approx(measured[last], rel=MEAN_ERROR)

    setup.train("whole", start, *own, *steps(2))
    horizon = "training.total_steps=2"
    setup.train("half", start, *own, *steps(1), horizon)
    resume = f"training.resume_from={setup.checkpoint('half', 1)}"
    # The same config, whose start an override takes away.
    setup.train("rest", start, "model.draft_checkpoint_path=", resume, *own, *steps(2))
    weights, expected = setup.weights("rest", 2), setup.weights("whole", 2)
    before = setup.weights("still", 1)
    assert weights.keys() == expected.keys()
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name

    exported = export(trained, "rest", 2, tmp_path / "export", out / "config.json")
    written = load_file(out / "model.safetensors")
    assert exported.keys() == written.keys()
    for name in {"d2t", "t2d"} & written.keys():
        assert torch.equal(exported[name], written[name]), name


@pytest.mark.parametrize("trained", TRUNCATED, indirect=True)
def test_capture_makes_no_other_vocabulary(trained: Trained) -> None:
    start = f"model.draft_checkpoint_path={trained.export}"
    refused = run("specforge-lk", *capture_arguments(trained.setup), start, check=False)
    assert refused.returncode and "leave out --vocab-mapping" in refused.tail()
