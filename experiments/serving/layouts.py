"""Drafts in the form that vLLM reads, where it is not the one SpecForge exports.

MTP: vLLM has a class for some families only, chosen by the draft's config, and builds its layer
with the sizes of the TARGET. Its class for MiMo has a dense layer of the Llama kind with biases in
the attention, and the forward of an exported module: only names, the order in what W reads, and
the biases differ. Embedding and head are the target's.

EAGLE-3.1: vLLM's ``norm_output`` feeds back the state after the output norm, which SpecForge trains
no draft with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_NAMES = {
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "shared_head.norm": "final_layernorm",
}
_OF_TARGET = ("embed_tokens.", "shared_head.head.")


def write_mimo(draft: Path, folder: Path) -> None:
    """Write the module exported at ``draft`` to ``folder`` as vLLM's ``mimo_mtp`` loads it.

    Raises:
        ValueError: the module is not dense, or its heads are not as wide as vLLM assumes.
    """
    config = json.loads((draft / "config.json").read_text())
    size, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim", size // heads) != size // heads:
        raise ValueError(
            f"{draft / 'config.json'}: head_dim {config['head_dim']} is not hidden_size / "
            f"num_attention_heads = {size // heads}, which vLLM's mimo_mtp takes for granted"
        )
    prefix = f"model.layers.{config['num_hidden_layers']}."
    exported = {name.removeprefix(prefix): tensor for name, tensor in _tensors(draft).items()}
    module = {n: t for n, t in exported.items() if not n.startswith(_OF_TARGET)}
    if "mlp.gate_proj.weight" not in module:
        raise ValueError(f"draft {draft}: no dense MLP below {prefix}; mimo_mtp has no other")
    tensors = {}
    for name, tensor in module.items():
        stem, _, kind = name.rpartition(".")
        tensors[f"model.mtp_layers.0.{_NAMES.get(stem, stem)}.{kind}"] = tensor
    projection = "model.mtp_layers.0.input_proj.weight"
    # [embedding; state] here, [state; embedding] there.
    tensors[projection] = torch.cat(tensors[projection].split(size, dim=1)[::-1], dim=1)
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.mtp_layers.0.self_attn.{name}"
        # vLLM leaves parameters that no tensor fills as the memory was.
        tensors.setdefault(
            f"{path}.bias", tensors[f"{path}.weight"].new_zeros(len(tensors[f"{path}.weight"]))
        )
    # "mimo" is no model_type of transformers; vLLM goes by the architecture.
    changed = {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"]}
    _write(folder, config | changed, tensors)


def write_eagle3_1(draft: Path, folder: Path) -> None:
    """Write the EAGLE-3 draft exported at ``draft`` as vLLM's, with ``norm_output`` true.

    It was not trained to read such states: it shows that both sides read them in the same way.
    """
    config = json.loads((draft / "config.json").read_text())
    changed = {"architectures": ["Eagle3LlamaForCausalLM"], "norm_output": True}
    _write(folder, config | changed, _tensors(draft))


def _tensors(draft: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(draft.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
