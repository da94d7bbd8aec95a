"""The paper's figure of Gaussians, through the command."""

import json

import pytest
from typer.testing import CliRunner

from experiments.gaussian import app


def test_it_reproduces_the_paper(tmp_path):
    out = tmp_path / "figure.png"
    result = CliRunner().invoke(app, ["--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    fits = {fit["loss"]: fit for fit in json.loads(result.stdout)["fits"]}
    # The paper has 50.8 for reverse KL; the exact minimum of its mixture is at 50.71.
    for loss, alpha in {"kl": 0.502, "reverse_kl": 0.508, "tv": 0.602}.items():
        assert fits[loss]["alpha"] == pytest.approx(alpha, abs=1e-3)
    # KL matches the mixture's moments.
    assert fits["kl"]["mean"] == pytest.approx(-0.5, abs=1e-3)
    assert fits["kl"]["std"] == pytest.approx(17.375**0.5, abs=1e-3)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]


def test_it_names_a_folder_that_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "missing" / "figure.png")])
    assert result.exit_code == 2
    assert "--out" in result.output
