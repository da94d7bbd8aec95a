"""``specforge-lk losses``: every plug-in's losses, and what to do where they cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ["kl", "lk_alpha", "lk_lambda", "reverse_kl", "tau", "tv"]


def losses(*words: str, path: Path | None = None, before: str = "") -> subprocess.CompletedProcess:
    program = f"import sys; {before}\nfrom specforge_lk.cli import main; main()"
    more = [str(path)] if path else []
    done = subprocess.run(
        [sys.executable, "-c", program, "losses", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*more, str(ROOT)]), "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return done


def by_name(done: subprocess.CompletedProcess) -> dict[str, dict]:
    return {loss["name"]: loss for loss in json.loads(done.stdout)["losses"]}


def test_own_losses_with_their_options_and_defaults():
    done = losses("--json")
    found = by_name(done)
    assert list(found) == OWN and json.loads(done.stdout)["problem"] is None
    assert all("specforge-lk" in loss["plugin"] and loss["meaning"] for loss in found.values())
    options = {option["name"]: option for option in found["lk_lambda"]["options"]}
    assert options["eta"]["default"] == 3.0 and options["eta"]["values"] == "number"
    assert options["eta"]["algorithm_defaults"] == {"medusa": 10.0}
    assert options["lambda_scope"]["values"] == "head | token | fixed | schedule"
    assert options["lambda_fixed"]["default"] is None
    assert all(option["meaning"] for option in options.values())
    assert [o["name"] for o in found["tv"]["options"]] == ["serving", "sharpness", "chain_weight"]


@pytest.mark.slow
def test_losses_of_another_package(tmp_path: Path):
    source = ROOT / "examples" / "plugin_loss"
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    found = by_name(losses("--json", path=tmp_path))
    assert sorted(found) == sorted([*OWN, "hellinger"])
    assert "specforge-lk" not in found["hellinger"]["plugin"]
    (scale,) = found["hellinger"]["options"]
    assert scale["name"] == "scale"
    assert "hellinger" in losses(path=tmp_path).stdout


def test_text_has_every_loss_and_option():
    shown = losses().stdout
    for word in [*OWN, "eta=3.0 (medusa: 10.0)", "lambda_fixed (not set)", "training.loss"]:
        assert word in shown


def test_without_specforge_the_own_losses_are_listed():
    done = losses(before="sys.modules['specforge'] = None")
    assert all(name in done.stdout for name in OWN)
    assert "only this package's losses" in done.stderr
    assert "pip install '.[specforge]'" in done.stderr


def test_an_unpatched_specforge_is_told_apart(tmp_path: Path):
    (tmp_path / "specforge").mkdir()
    (tmp_path / "specforge" / "__init__.py").touch()
    done = losses("--json", path=tmp_path)
    assert sorted(by_name(done)) == OWN
    assert "run 'specforge-lk patch apply'" in json.loads(done.stdout)["problem"]


def test_a_plugin_that_is_asked_for_and_missing_is_one_line():
    program = "from specforge_lk.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "losses"],
        capture_output=True,
        text=True,
        env={**os.environ, "SPECFORGE_PLUGINS": "no_such_plugin"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "['no_such_plugin']; installed: ['specforge-lk']" in done.stderr.splitlines()[-1]
