"""Targets and drafts whose files are cut, and quantized targets, from the command line."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_target import save_draft, save_target
from typer.testing import CliRunner

from specforge_lk.cli import app


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("whole"), layers=2)


@pytest.fixture
def target(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "target"))


def refused(*arguments: object) -> str:
    """What a command says that refuses its input, in one line but for progress."""
    finished = CliRunner().invoke(app, [*map(str, arguments)])
    assert finished.exit_code == 1 and isinstance(finished.exception, SystemExit), finished.output
    return finished.output.splitlines()[-1]


def generate(target: Path) -> str:
    prompts = target.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    out = target.parent / "out.jsonl"
    return refused("generate", "--target", target, "--prompts", prompts, "--out", out)


#: quant_method -> its settings, its package for Python and its package for pip.
QUANTIZED = {
    "gptq": ({"bits": 4}, "gptqmodel", "gptqmodel"),
    "awq": ({"bits": 4}, "gptqmodel", "gptqmodel"),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ({}, "compressed_tensors", "compressed-tensors"),
    "torchao": ({"quant_type": "int8_weight_only"}, "torchao", "torchao"),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_package_of_a_quantized_target_is_named(method: str, target: Path) -> None:
    settings, module, package = QUANTIZED[method]
    if find_spec(module):
        pytest.skip(f"{module} is installed")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (target / "config.json").write_text(json.dumps(config))
    message = generate(target)
    assert repr(str(target)) in message and f"quantized by {method!r}" in message
    assert f"pip install {package}" in message and "SpecForge" not in message


def test_quantization_that_transformers_does_not_know(target: Path) -> None:
    """It would go on as if the numbers were the weights."""
    config = json.loads((target / "config.json").read_text())
    named = config | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    (target / "config.json").write_text(json.dumps(named))
    message = generate(target)
    assert "quantized by 'modelopt'" in message and "without quantization" in message

    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(target / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    assert "it is quantized, with model.layers.0.mlp.up_proj.weight_scale" in generate(target)


@pytest.mark.parametrize("keep", [0.5, 0.0001, 0])
def test_a_target_that_is_cut(keep: float, target: Path) -> None:
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * keep)])
    message = generate(target)
    assert repr(str(target)) in message and "download or copy it again" in message


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_draft_that_is_cut(file: str, whole: Path, tmp_path: Path) -> None:
    draft = save_draft(tmp_path / "draft")
    if file == "pytorch_model.bin":
        torch.save(load_file(draft / "model.safetensors"), draft / file)
        (draft / "model.safetensors").unlink()
    content = (draft / file).read_bytes()
    (draft / file).write_bytes(content[: len(content) // 2])
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"conversations": chat}) + "\n")
    out = ("--out", tmp_path / "report.json", "--held-out", rows)
    message = refused("eval", "--target", whole, "--draft", f"kl={draft}", "--device", "cpu", *out)
    assert str(draft / file) in message and "download the draft again" in message
