"""`specforge train` sharded, in bfloat16, from features to an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_run import BATCH_SIZE, EPOCH, HEADS, Setup, prepare_with_features, run

pytestmark = pytest.mark.slow

STEPS = 3 * EPOCH
TESTS = Path(__file__).parents[1] / "helpers"
#: Every Python process of a command lets FSDP wrap modules on a CPU.
SITE = "import sys\nsys.path.append({tests!r})\nimport fsdp_cpu\nfsdp_cpu.install()\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH."""
    path = tmp_path_factory.mktemp("site")
    (path / "sitecustomize.py").write_text(SITE.format(tests=str(TESTS)))
    return path


#: A loss of one draft position, and one that sees the chain, for a truncated target.
#: Two of them without holding logits.
CASES = (("eagle3", "lk_lambda", {}, False), ("medusa", "lk_lambda", {}, True))
CASES += (("eagle3", "tau", {"serving": "temperature=0.7,top_p=0.9"}, True),)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """SpecForge's default: bfloat16, SHARD_GRAD_OP, two ranks; the target's head in float32."""
    algorithm, loss, options, fused = request.param
    half = "model.torch_dtype=bfloat16"
    setup = prepare_with_features(tmp_path_factory.mktemp("cli"), half, algorithm=algorithm)
    config = json.loads(setup.config.read_text())
    config["model"]["torch_dtype"] = "bfloat16"
    config["training"]["fsdp_sharding"] = "SHARD_GRAD_OP"
    # One process alone would not shard.
    config["training"] |= {"batch_size": BATCH_SIZE // 2, "loss": loss}
    config["training"] |= {"loss_data_parallel": True, "loss_options": options}
    config["training"]["loss_fused_head"] = fused
    config["deployment"] = {"trainer": {"nproc_per_node": 2}}
    setup.config.write_text(json.dumps(config))
    return setup


def test_sharded_run_trains_resumes_and_exports(setup: Setup, site: Path) -> None:
    ranks = {"ranks": 2, "PYTHONPATH": str(site)}
    trained = setup.train("whole", **ranks)
    # FSDP says so where it does not shard.
    assert "FSDP is switching" not in trained.output
    assert sorted(trained.steps) == list(range(1, STEPS + 1))
    losses = trained.epoch_losses()
    assert losses[-1] < 0.95 * losses[0], losses
    for metrics in trained.steps.values():
        for head in range(HEADS):
            assert 0 <= metrics[f"alpha_{head}"] <= metrics[f"coverage_{head}"] * (1 + 1e-6)

    horizon, half = f"training.total_steps={STEPS}", STEPS // 2
    setup.train("stopped", horizon, f"training.max_steps={half}", **ranks)
    resume = f"training.resume_from={setup.checkpoint('stopped', half)}"
    setup.train("resumed", horizon, resume, **ranks)
    weights, expected = setup.weights("resumed", STEPS), setup.weights("whole", STEPS)
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name

    draft = setup.root / "export"
    paths = ["--checkpoint", setup.checkpoint("whole", STEPS), "--output-dir", draft]
    source = ["--draft-config", setup.draft_config, "--embedding-source", setup.target]
    run("specforge", "export", "--to", "hf", *paths, *source)
    assert (draft / "model.safetensors").is_file()
