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


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for the drafts of `save_draft`."""
    return save_target(tmp_path_factory.mktemp("deep"))


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


def test_files_of_a_target_that_are_missing_or_no_json(target: Path) -> None:
    (target / "generation_config.json").write_text('{"eos_token_id": 2')
    message = generate(target)
    assert "generation_config.json is not JSON" in message and "copy it again" in message
    (target / "generation_config.json").write_text('{"eos_token_id": "2"}')
    assert "eos_token_id is '2', not token ids" in generate(target)
    (target / "generation_config.json").write_text('{"eos_token_id": [999, -1]}')
    assert "eos_token_id is [999, -1], outside the target's vocabulary of 264" in generate(target)
    (target / "generation_config.json").unlink()
    (target / "model.safetensors").unlink()
    message = generate(target)
    assert repr(str(target)) in message and "copy it again" in message and "http" not in message


def test_other_files_of_a_target_that_are_not_whole(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"hidden_act": "silo"}))
    assert "it does not know 'silo'" in generate(target)
    (target / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    assert "not a multiple of the number of attention heads" in generate(target)
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not JSON" in generate(target)


def evaluate(target: Path, draft: Path) -> str:
    rows = draft.parent / "rows.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"conversations": chat}) + "\n")
    out = ("--out", draft.parent / "report.json", "--held-out", rows)
    return refused("eval", "--target", target, "--draft", f"kl={draft}", "--device", "cpu", *out)


def imported(target: Path, draft: Path) -> str:
    out = draft.parent / "imported"
    message = refused("import-draft", draft, "--target", target, "--out", out)
    assert not out.exists()
    return message


COMMANDS = {"eval": evaluate, "import-draft": imported}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_draft_that_is_cut(file: str, whole: Path, tmp_path: Path) -> None:
    draft = save_draft(tmp_path / "draft")
    if file == "pytorch_model.bin":
        torch.save(load_file(draft / "model.safetensors"), draft / file)
        (draft / "model.safetensors").unlink()
    content = (draft / file).read_bytes()
    (draft / file).write_bytes(content[: len(content) // 2])
    message = evaluate(whole, draft)
    assert str(draft / file) in message and "download the draft again" in message


#: Changes of a draft's config -> what the error has to say of them.
CONFIGS = {
    "two layers": ({"num_hidden_layers": 2}, "num_hidden_layers 2", "set it to 1"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "no rotary base": ({"rope_theta": 0}, "rope_theta is 0, not above 0"),
    "a rotary base of nan": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "scaling without a factor": ({"rope_scaling": {"rope_type": "yarn"}}, "'factor'"),
    "scaling by nothing": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "finite"),
    "unknown scaling": ({"rope_scaling": {"rope_type": "foo"}}, "'foo'"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "a size in words": ({"draft_vocab_size": "96"}, "draft_vocab_size is '96'"),
    "the same layer": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 1]}},
        "captured layers [1, 1, 1] are not 3 different ones of a target of 6 layers",
    ),
    "layers in words": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "1,2,3"}},
        "'1,2,3', not a list of layers",
    ),
    "a section in words": ({"eagle_config": "none"}, "eagle_config is 'none'"),
    "a switch in words": ({"norm_output": "no"}, "norm_output is 'no', not true or false"),
    "a scale of nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number above"),
    "one architecture": ({"architectures": "LlamaForCausalLMEagle3"}, "not a list"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_draft_config_that_no_draft_has(
    command: str, kind: str, deep: Path, tmp_path: Path
) -> None:
    changes, *words = CONFIGS[kind]
    draft = save_draft(tmp_path / "draft")
    config = draft / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    message = COMMANDS[command](deep, draft)
    assert str(draft) in message and "; " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_draft_weights_that_are_not_finite(
    command: str, value: float, deep: Path, tmp_path: Path
) -> None:
    draft = save_draft(tmp_path / "draft")
    weights = load_file(draft / "model.safetensors")
    weights["fc.weight"][3, 5] = value
    save_file(weights, draft / "model.safetensors")
    message = COMMANDS[command](deep, draft)
    assert str(draft) in message and "fc.weight has numbers that are nan" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_byte_of_a_draft_that_changed(command: str, deep: Path, tmp_path: Path) -> None:
    """Found where the export listed what it wrote."""
    from specforge.tensor_file import write_checksums

    draft = save_draft(tmp_path / "draft")
    write_checksums(str(draft))
    weights = draft / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    message = COMMANDS[command](deep, draft)
    assert str(weights) in message and "remove SHA256SUMS" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_draft_weights_of_another_type(command: str, deep: Path, tmp_path: Path) -> None:
    for name, dtype in (
        ("fc.weight", torch.float8_e4m3fn),
        ("fc.weight", torch.int32),
        ("d2t", torch.float32),
    ):
        draft = save_draft(tmp_path / "draft")
        weights = load_file(draft / "model.safetensors")
        weights[name] = weights[name].to(dtype)
        save_file(weights, draft / "model.safetensors")
        message = COMMANDS[command](deep, draft)
        assert f"{name} has type {dtype}, not" in message and "export it again" in message


def test_an_import_lists_what_it_writes(deep: Path, tmp_path: Path) -> None:
    draft, out = save_draft(tmp_path / "draft"), tmp_path / "imported"
    arguments = ["import-draft", str(draft), "--target", str(deep), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert not done.exit_code, done.output
    assert (out / "SHA256SUMS").read_text().endswith("  model.safetensors\n")


def test_a_shard_of_a_draft_that_is_missing(deep: Path, tmp_path: Path) -> None:
    draft = save_draft(tmp_path / "draft")
    names = load_file(draft / "model.safetensors")
    index = draft / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "1.safetensors")}))
    assert "1.safetensors of model.safetensors.index.json is missing" in evaluate(deep, draft)
    index.write_text("{}")
    message = evaluate(deep, draft)
    assert str(index) in message and "download the draft again" in message
