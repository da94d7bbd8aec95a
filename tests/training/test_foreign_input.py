"""Features, targets and draft configs that are not this run's end it before its first step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from refused import assert_refused, cut, draft_with
from tiny_target import save_target
from training_run import Setup, capture_arguments, prepare_with_features, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return prepare_with_features(tmp_path_factory.mktemp("foreign"))


def manifest_with(**changes: object) -> Callable[[Path], None]:
    def change(features: Path) -> None:
        path = features / "capture.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_a_file(features: Path) -> None:
    (features / "sample_00000003.ckpt").unlink()


#: Kind -> what becomes of the features, and what the error has to say of it.
FOREIGN = {
    "layers": (manifest_with(layers=[0, 2, 4]), "layers [0, 2, 4]", "reads [1, 2, 4]"),
    "a missing file": (without_a_file, "1 of the 12 feature files", "sample_00000003.ckpt"),
    "a damaged manifest": (manifest_with(files=7), "is cut or damaged (files is '7')"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_capture_that_is_not_this_run_s(setup: Setup, kind: str) -> None:
    change, *words = FOREIGN[kind]
    directory = shutil.copytree(setup.features, setup.root / kind)
    change(directory)
    finished = setup.train(kind, f"data.hidden_states_path={directory}", check=False)
    assert_refused(finished, str(directory / "capture.json"), "apture again", *words)


def test_the_target_of_the_features_moved_and_another_one(setup: Setup) -> None:
    moved = shutil.copytree(setup.target, setup.root / "moved")
    once = ("training.max_steps=1", "training.save_interval=0")
    setup.train("moved", f"model.target_model_path={moved}", *once)
    other = save_target(setup.root / "other", seed=1)
    evaluated = (f"data.eval_hidden_states_path={setup.features}", "training.eval_interval=1")
    for name, place in (("other", ()), ("other evaluated", evaluated)):
        finished = setup.train(name, f"model.target_model_path={other}", *place, check=False)
        said = (
            f"another target, '{setup.target}', than model.target_model_path={other}",
            "weights",
        )
        assert_refused(finished, str(setup.features / "capture.json"), *said)
    again = run(
        *("specforge-lk", *capture_arguments(setup), f"model.target_model_path={other}"),
        check=False,
    )
    assert_refused(again, str(setup.features), "features of another target", "another directory")


def missing(shard: int) -> Callable[[Path], None]:
    return lambda target: sorted(target.glob("*.safetensors"))[shard].unlink()


def cut_shard(shard: int) -> Callable[[Path], None]:
    return lambda target: cut(sorted(target.glob("*.safetensors"))[shard])


#: Kind -> what becomes of the target, and what the error has to say of it.
TARGETS = {
    "without a shard": (missing(0), "model-00001", "does not exist", "download or copy it again"),
    "without the head's": (missing(-1), "does not exist", "download or copy it again"),
    "with a cut shard": (cut_shard(0), "model-00001", "is cut or damaged"),
    "with a cut config": (lambda t: (t / "config.json").write_text("{"), "config.json", "valid"),
    "with a cut index": (
        lambda t: (t / "model.safetensors.index.json").write_text("{"),
        "index.json is cut or damaged",
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_whose_files_are_not_whole(setup: Setup, kind: str) -> None:
    damage, *words = TARGETS[kind]
    target = shutil.copytree(setup.target, setup.root / kind)
    damage(target)
    finished = setup.train(kind, f"model.target_model_path={target}", check=False)
    assert_refused(finished, str(target), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["hidden_size is 64", "model.target_model_path have 32"]),
        ({"num_attention_heads": 3}, ["num_key_value_heads is 2, which does not divide"]),
        ({"num_attention_heads": 6, "head_dim": None}, ["not a multiple of the number of att"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps"]),
        ({"rope_theta": 0}, ["rope_theta is 0; it must be a number above 0"]),
        ({"hidden_act": "silo"}, ["hidden_act is 'silo'", "'silu'"]),
    ],
    ids=["hidden size", "groups", "heads", "null", "rope", "activation"],
)
def test_a_draft_config_with_sizes_that_no_draft_has(
    setup: Setup, changes: dict, words: list[str]
) -> None:
    draft = draft_with(setup, "sizes", **changes)
    override = f"model.draft_model_config={draft}"
    assert_refused(setup.train("sizes", override, check=False), "draft config", *words)
