"""What the extra `data` brings is enough to evaluate any draft: SpecForge is not in it."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specforge.export.to_hf import export_to_hf
from specforge.modeling.auto import AutoDraftModel
from specforge.training.model_loading import load_draft_config_source
from tiny_target import VOCAB_SIZE, build_model, save_target
from training_run import HEADS, algorithm_settings, write_rows

import specforge_lk
from specforge_lk.drafts.table import DRAFTS
from specforge_lk.evaluate.report import read_report

ALGORITHMS = tuple(DRAFTS)
#: What trains: everything else decodes, evaluates or prepares data.
TRAINING = ("specforge_lk.drafts.",)
KERNELS = tuple(f"specforge_lk.overlap.triton_{n}" for n in ("kernels", "target", "tiles"))
#: Its class of configs is transformers' own.
NEEDS_TRANSFORMERS = ("specforge_lk.drafts.mtp_checkpoint", "specforge_lk.decode.mtp")
#: Packages that are not there, for the import system and for those who ask what is installed.
WITHOUT = "import sys; sys.modules |= dict.fromkeys({names!r}); "


def python(code: str, *arguments: object, without: tuple[str, ...]) -> str:
    """Run code in a fresh interpreter that lacks some packages; returns its output."""
    command = [sys.executable, "-c", WITHOUT.format(names=without) + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules() -> list[str]:
    """Names of all modules of this package that do not train."""
    found = pkgutil.walk_packages(specforge_lk.__path__, "specforge_lk.")
    names = [module.name for module in found if not module.name.startswith(TRAINING)]
    assert {
        "specforge_lk.evaluate.runner",
        "specforge_lk.decode.mtp",
        "specforge_lk.data.released",
    } < set(names)
    return ["specforge_lk", *names]


@pytest.mark.parametrize(
    ("without", "left_out"),
    [
        (("specforge", "triton", "gguf", "accelerate"), KERNELS),
        (("specforge", "triton", "transformers", "matplotlib"), (*KERNELS, *NEEDS_TRANSFORMERS)),
        (("specforge", "torch", "numpy", "triton", "transformers"), None),
    ],
    ids=["extra data", "no extra", "the top alone"],
)
def test_modules_import_without(without: tuple[str, ...], left_out: tuple[str, ...] | None) -> None:
    names = [f"specforge_lk{part}" for part in ("", ".cli", ".patching", ".drafts.table")]
    if left_out is not None:
        names = [name for name in modules() if name not in left_out]
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    python(code, *names, without=without)


def export(algorithm: str, folder: Path) -> Path:
    """A random draft, as `specforge export --to hf` writes it."""
    folder.mkdir()
    config, *_ = algorithm_settings(algorithm, build_model().config.to_dict())
    file = folder / "draft.json"
    file.write_text(json.dumps(config))
    torch.manual_seed(0)
    draft = AutoDraftModel.from_config(load_draft_config_source(str(file)), torch.float32)
    for name, parameter in draft.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    if config.get("draft_vocab_size", VOCAB_SIZE) < VOCAB_SIZE:
        # The first tokens: the offsets are 0.
        draft.t2d.copy_(torch.arange(VOCAB_SIZE) < config["draft_vocab_size"])
    state = {"draft_state_dict": draft.state_dict(), "strategy": algorithm}
    torch.save(state, folder / "training_state.pt")
    export_to_hf(str(folder), str(file), str(folder / "export"))
    return folder / "export"


@pytest.mark.slow
def test_every_draft_is_evaluated_without_specforge(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    rows = [
        {"id": topic, "prompt": topic, "conversations": [
            {"role": "user", "content": topic}, {"role": "assistant", "content": f"of {topic}"}
        ]}
        for topic in ("stars", "rain")
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    drafts = [f"kl@{i}={export(name, tmp_path / name)}" for i, name in enumerate(ALGORITHMS)]
    out = tmp_path / "report.json"
    python(
        "from specforge_lk.cli import main; main()",
        *("eval", "--target", target, "--out", out, "--device", "cpu", "--heads", HEADS),
        *(word for draft in drafts for word in ("--draft", draft)),
        *("--held-out", tmp_path / "rows.jsonl", "--benchmark", f"b={tmp_path / 'rows.jsonl'}"),
        *("--sampled-by", "temperature=1", "--sampled", "--max-new-tokens", 8),
        without=("specforge", "triton", "gguf", "accelerate"),
    )
    measured = {result.algorithm: result for result in read_report(out).results}
    assert set(measured) == set(ALGORITHMS)
    assert all(len(result.alpha_per_head) == HEADS for result in measured.values())
