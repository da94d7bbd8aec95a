"""Bad input ends the real commands with an error that names what is wrong and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from training_run import DRAFT_VOCAB_SIZE, Finished, Setup, prepare_with_features, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return prepare_with_features(tmp_path_factory.mktemp("bad"))


def assert_refused(finished: Finished, *words: str) -> None:
    """The command failed, before any step, and its last lines hold all words."""
    assert finished.returncode and not finished.steps, finished.tail()
    for word in words:
        assert word in finished.tail(), finished.tail(20)


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
            ["training.loss_options.eta='fast'", "valid number", "Its options: ['eta',"],
        ),
        (
            ["training.loss=kl", "data.hidden_states_path=nowhere"],
            ["'nowhere' does not exist", "check data.hidden_states_path"],
        ),
    ],
    ids=["unknown loss", "option type", "features"],
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
    """One feature file has a target state that is not a number."""
    path = sorted(setup.features.glob("*.ckpt"))[3]
    record = torch.load(path, weights_only=True)
    record["hidden_state"][0, record["loss_mask"].nonzero()[5]] = float("nan")
    directory, _ = features_with(setup, "nan", 3, record)
    features = f"data.hidden_states_path={directory}"
    every_step = "training.save_interval=1"
    return setup.train("nan", "training.loss=lk_lambda", features, every_step, check=False)


def test_target_states_that_are_not_finite(setup: Setup, nan_run: Finished) -> None:
    assert nan_run.returncode
    for word in ("loss is not finite", "'tiny:00000003'", "data.hidden_states_path"):
        assert word in nan_run.tail()
    saved = [int(path.name.rpartition("step")[2]) for path in setup.output("nan").glob("*-step*")]
    assert sorted(saved) == sorted(nan_run.steps), "the step that failed must not be saved"
    for step in saved:
        assert all(weight.isfinite().all() for weight in setup.weights("nan", step).values())


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
    assert finished.returncode and not trap.exists()
    assert name in finished.tail() and "code" in finished.tail(), finished.tail()


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
