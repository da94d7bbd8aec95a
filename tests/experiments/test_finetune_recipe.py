"""The recipe of docs/finetune.md is the demo's fine-tuning, in one file."""

from pathlib import Path

import pytest
import yaml
from specforge.config import load_config

from experiments.demo import Runs

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "smollm2-135m" / "finetune-eagle3.yaml"
#: What the demo has for its own bookkeeping, or says in another way.
ELSEWHERE = {
    "model": {"draft_model_config", "vocab_mapping_path"},
    "training": {"num_epochs", "save_interval", "max_checkpoints"},
}


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_the_recipe_is_the_demos_run(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (demo,) = Runs(losses=("tv",), seeds=(0,)).tuned
    config, *overrides = demo.command[3:]
    theirs = load_config(config, overrides).model_dump()[section]
    ours = load_config(str(RECIPE)).model_dump()[section]
    for name in ELSEWHERE.get(section, ()):
        del theirs[name], ours[name]
    assert ours == theirs


def test_its_learning_rate_is_half_of_the_starts_peak() -> None:
    start = yaml.safe_load((RECIPE.parent / "eagle3.yaml").read_text())
    tuned = yaml.safe_load(RECIPE.read_text())
    assert tuned["training"]["learning_rate"] == start["training"]["learning_rate"] / 2
