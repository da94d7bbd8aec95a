"""Bad input ends the real commands with an error that names what is wrong and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refused import assert_named, assert_refused, changed, cut, draft_with, flipped
from training_run import (
    DRAFT_VOCAB_SIZE,
    SAMPLES,
    Finished,
    Setup,
    capture_arguments,
    prepare_with_features,
    run,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return prepare_with_features(tmp_path_factory.mktemp("bad"))


def mapping(draft_vocab_size: int, vocab_size: int, first: int = 0) -> dict[str, torch.Tensor]:
    """A draft vocabulary of successive tokens."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[first : first + draft_vocab_size] = True
    return {"t2d": t2d, "d2t": torch.full((draft_vocab_size,), first)}


class Malicious:
    """Pickles as a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def features_with(setup: Setup, name: str, index: int, record: object) -> tuple[Path, str]:
    """A copy of the features with another file in one place, and that file's name."""
    directory = shutil.copytree(setup.features, setup.root / name)
    path = sorted(directory.glob("*.ckpt"))[index]
    torch.save(record, path)
    return directory, path.name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["training.loss=lk_lamda"],
            ["training.loss='lk_lamda'", "'kl', 'lk_alpha', 'lk_lambda'", "leave training.loss"],
        ),
        (
            ["training.loss=lk_lambda", "training.loss_options.eta=fast"],
            [
                "training.loss_options.eta='fast'",
                "valid number",
                "Its options: ['chain_weight', 'eta',",
            ],
        ),
        (
            ["training.loss=kl", "data.hidden_states_path=nowhere"],
            ["'nowhere' does not exist", "check data.hidden_states_path"],
        ),
        (["training.batch_size=two"], ["run.json: training.batch_size='two': Input should be"]),
        (["training.batchsize=2"], ["'training.batchsize' does not exist", "'batch_size'"]),
        (
            [f"training.batch_size={SAMPLES + 1}", "training.max_steps=2"],
            [f"batch_size={SAMPLES + 1} is more than the {SAMPLES} samples", "lower it"],
        ),
        (
            ["model.vocab_mapping_path=nowhere.pt"],
            ["vocabulary mapping nowhere.pt does not exist", "set model.vocab_mapping_path"],
        ),
        (["model.vocab_mapping_path=."], ["vocabulary mapping . is not a file"]),
        (
            ["model.target_model_path=./nowhere"],
            ["model.target_model_path=./nowhere does not exist", "hub id of a model"],
        ),
        (
            ["model.draft_checkpoint_path=./nowhere"],
            ["model.draft_checkpoint_path=./nowhere is not a folder", "exported draft"],
        ),
        (
            ["output_dir=/dev/null"],
            ["output_dir=/dev/null cannot be written to", "name another folder"],
        ),
        (["model.embedding_key=e"], ["has no tensor e", "set model.embedding_key"]),
        (["model.lm_head_key=h"], ["['h'] is in the checkpoint", "set model.lm_head_key"]),
    ],
    ids=[
        *("unknown loss", "option type", "features", "type", "name", "batch size", "vocabulary"),
        *("a folder", "target", "start", "output", "embedding", "LM head"),
    ],
)
def test_wrong_setting(setup: Setup, overrides: list[str], words: list[str]) -> None:
    assert_refused(setup.train("setting", *overrides, check=False), *words)


def test_draft_vocabulary_of_another_size(setup: Setup) -> None:
    path = setup.root / "mapping80.pt"
    torch.save(mapping(80, 264), path)
    finished = setup.train("vocabulary", f"model.vocab_mapping_path={path}", check=False)
    names = ["model.vocab_mapping_path", f"draft_vocab_size={DRAFT_VOCAB_SIZE}"]
    assert_refused(finished, str(path), "80", *names)


@pytest.fixture(scope="module")
def nan_run(setup: Setup) -> Finished:
    """One feature file has a target state that is not a number; it is read after some steps."""
    path = sorted(setup.features.glob("*.ckpt"))[3]
    record = torch.load(path, weights_only=True)
    record["hidden_state"][0, record["loss_mask"].nonzero()[5]] = float("nan")
    directory, _ = features_with(setup, "nan", 3, record)
    features = f"data.hidden_states_path={directory}"
    return setup.train("nan", features, "training.save_interval=1", check=False)


def test_target_states_that_are_not_finite(setup: Setup, nan_run: Finished) -> None:
    """Named without ``training.loss`` too, whose loss alone would not end the run."""
    path = setup.root / "nan" / "sample_00000003.ckpt"
    assert_named(nan_run, str(path), "hidden_state has numbers that are nan", "Capture it again")


def test_a_step_that_is_not_finite_is_not_saved(setup: Setup) -> None:
    rate, save = "training.learning_rate=1e30", "training.save_interval=1"
    stopped = setup.train("rate", "training.loss=lk_lambda", rate, save, check=False)
    assert_named(stopped, "loss is not finite", "'tiny:0000", "lower training.learning_rate")
    saved = [int(path.name.rpartition("step")[2]) for path in setup.output("rate").glob("*-step*")]
    assert sorted(saved) == sorted(stopped.steps), "the step that failed must not be saved"
    for step in saved:
        assert all(weight.isfinite().all() for weight in setup.weights("rate", step).values())


def test_draft_vocabulary_of_another_checkpoint(setup: Setup, nan_run: Finished) -> None:
    """The right size, but other tokens: every prediction would stand for a wrong token."""
    path = setup.root / "other.pt"
    torch.save(mapping(DRAFT_VOCAB_SIZE, 264, first=100), path)
    exported = run(
        "specforge",
        *("export", "--to", "hf", "--output-dir", setup.root / "export"),
        *("--checkpoint", setup.checkpoint("nan", 1), "--draft-config", setup.draft_config),
        *("--vocab-mapping", path, "--embedding-source", setup.target),
        check=False,
    )
    assert_refused(exported, str(path), "--vocab-mapping", "checkpoint")
    assert not (setup.root / "export").exists()


def test_feature_file_that_runs_code(setup: Setup) -> None:
    trap = setup.root / "trap"
    directory, name = features_with(setup, "malicious", 2, {"input_ids": Malicious(trap)})
    features = f"data.hidden_states_path={directory}"
    finished = setup.train("malicious", "training.loss=kl", features, check=False)
    assert_named(finished, name, "code")
    assert not trap.exists()


def test_plugin_that_does_not_import(setup: Setup, tmp_path: Path) -> None:
    info = tmp_path / "broken_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specforge.plugins]\nbroken = broken_pack:plugin\n")
    (tmp_path / "broken_pack.py").write_text("import no_such_module\n")
    said = ("broken-pack 1.0", "'no_such_module'", "uninstall", "SPECFORGE_PLUGINS")
    beside = setup.train("beside", "training.loss=kl", PYTHONPATH=str(tmp_path))
    assert all(part in beside.output for part in said), beside.output
    for asked in (
        setup.train("asked", "training.loss=broken", check=False, PYTHONPATH=str(tmp_path)),
        setup.train("named", check=False, PYTHONPATH=str(tmp_path), SPECFORGE_PLUGINS="broken"),
    ):
        assert_refused(asked, *said)


#: Kind -> what becomes of one feature file, and what the error has to say of it.
DAMAGE = {
    "cut": (cut, "cut or damaged", "Capture it again"),
    "a byte changed": (flipped, "cut or damaged", "checksum"),
    "states fewer than tokens": (
        changed(lambda r: r | {"hidden_state": r["hidden_state"][:, :-1]}),
        "hidden_state has",
        "capture the sample again",
    ),
    "another width": (
        changed(lambda r: r | {"aux_hidden_state": r["aux_hidden_state"][..., :-1]}),
        "aux_hidden_state has states of 95 numbers, but this target and draft have 96",
    ),
    "ids outside": (
        changed(lambda r: r | {"input_ids": r["input_ids"] + 999}),
        "outside the target's vocabulary of 264",
        "model.target_model_path",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_feature_file_that_cannot_be_trained_on(setup: Setup, kind: str) -> None:
    damage, *words = DAMAGE[kind]
    directory = shutil.copytree(setup.features, setup.root / kind)
    path = sorted(directory.glob("*.ckpt"))[3]
    damage(path)
    features = f"data.hidden_states_path={directory}"
    assert_named(setup.train(kind, "training.loss=kl", features, check=False), str(path), *words)


@pytest.mark.parametrize("loss", [[], ["training.loss=kl"]], ids=["stock", "kl"])
@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_features_in_which_nothing_is_supervised(setup: Setup, part: str, loss: list[str]) -> None:
    directory = setup.root / f"unsupervised {part} {len(loss)}"
    shutil.copytree(setup.features, directory)
    for path in directory.glob("*.ckpt"):
        changed(lambda record: record | {"loss_mask": 0 * record["loss_mask"]})(path)
    features = [f"data.hidden_states_path={directory}"]
    if part == "evaluation":
        features = [f"data.eval_hidden_states_path={directory}", "training.eval_interval=2"]
    finished = setup.train(directory.name, *loss, *features, check=False)
    assert_refused(finished, f"none of the {SAMPLES} feature files", str(directory), "data.max_len")


def test_features_of_a_capture_that_was_interrupted(setup: Setup) -> None:
    directory = shutil.copytree(setup.features, setup.root / "interrupted")
    manifest = directory / "capture.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False}))
    for name, loss in (("stock", []), ("kl", ["training.loss=kl"])):
        features = f"data.hidden_states_path={directory}"
        finished = setup.train(f"interrupted {name}", *loss, features, check=False)
        assert_refused(finished, str(manifest), "Run the capture again")


@pytest.mark.parametrize("damage", [cut, flipped])
def test_checkpoints_that_are_damaged(
    setup: Setup, damage: Callable[[Path], None], nan_run: Finished
) -> None:
    """Resumed, started from and exported: all name the file, and a checkpoint before it helps."""
    broken = shutil.copytree(
        setup.checkpoint("nan", 1), setup.root / damage.__name__ / "tiny-step1"
    )
    path = broken / "training_state.pt"
    damage(path)
    output = setup.root / f"export {damage.__name__}"
    exported = run(
        "specforge",
        *("export", "--to", "hf", "--output-dir", output, "--checkpoint", broken),
        *("--draft-config", setup.draft_config, "--embedding-source", setup.target),
        check=False,
    )
    resumed, started = (
        setup.train(
            f"{key} {damage.__name__}", "training.loss=lk_lambda", f"{key}={broken}", check=False
        )
        for key in ("training.resume_from", "model.draft_checkpoint_path")
    )
    for finished in (exported, resumed, started):
        assert_refused(finished, str(path), "cut or damaged", "another checkpoint")
    assert not output.exists()


def test_a_draft_of_more_layers_than_are_trained(setup: Setup, nan_run: Finished) -> None:
    """Named before anything is captured, trained or exported."""
    draft = draft_with(setup, "two layers", num_hidden_layers=2)
    words = ("num_hidden_layers is 2", "one decoder layer", "set num_hidden_layers to 1")
    override = f"model.draft_model_config={draft}"
    assert_refused(setup.train("layers", "training.loss=kl", override, check=False), *words)
    captured = run(
        "specforge-lk",
        *capture_arguments(setup, setup.held_out, setup.root / "of two layers"),
        override,
        check=False,
    )
    assert_refused(captured, *words)
    assert not (setup.root / "of two layers").exists()
    output = setup.root / "two layers exported"
    exported = run(
        "specforge",
        *("export", "--to", "hf", "--output-dir", output),
        *("--checkpoint", setup.checkpoint("nan", 1), "--draft-config", draft),
        *("--embedding-source", setup.target),
        check=False,
    )
    assert_refused(exported, *words)
    assert not output.exists()


def test_yarn_with_defaults_and_few_positions(setup: Setup) -> None:
    """YaRN needs no more than transformers does; a draft for less than the target warns."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    draft = draft_with(setup, "yarn", rope_scaling=yarn, max_position_embeddings=128)
    steps = ("training.loss=kl", f"model.draft_model_config={draft}", "training.max_steps=1")
    trained = setup.train("yarn", *steps, "training.save_interval=1")
    said = ("max_position_embeddings is 128", "the target's is 512", "data.max_length is 256")
    for word in said:
        assert word in trained.output, trained.tail(30)
    output = setup.root / "yarn exported"
    exported = run(
        "specforge",
        *("export", "--to", "hf", "--output-dir", output),
        *("--checkpoint", setup.checkpoint("yarn", 1), "--draft-config", draft),
        *("--embedding-source", setup.target),
    )
    for word in said[:2]:
        assert word in exported.output, exported.tail(30)
    measured = run(
        "specforge-lk",
        *("eval", "--target", setup.target, "--draft", f"kl={output}", "--device", "cpu"),
        *("--held-out", setup.held_out, "--sampled-by", "temperature=1", "--heads", "2"),
        *("--held-out-limit", "1", "--out", setup.root / "yarn report.json"),
    )
    assert "its config.json is 128, the target's 512" in measured.output, measured.output


def test_a_run_that_diverged_is_neither_exported_nor_started_from(setup: Setup) -> None:
    """Without ``training.loss`` it goes on to its end."""
    steps = ("training.max_steps=2", "training.save_interval=2", "training.learning_rate=1e30")
    setup.train("diverged", *steps)
    checkpoint, output = setup.checkpoint("diverged", 2), setup.root / "diverged export"
    exported = run(
        "specforge",
        *("export", "--to", "hf", "--output-dir", output, "--checkpoint", checkpoint),
        *("--draft-config", setup.draft_config, "--embedding-source", setup.target),
        check=False,
    )
    said = "has numbers that are nan or infinite"
    assert_refused(exported, "the checkpoint's draft_state_dict", said, "an earlier step")
    assert not output.exists()
    start = f"model.draft_checkpoint_path={checkpoint}"
    assert_refused(setup.train("from it", start, check=False), str(checkpoint), said, "another one")
