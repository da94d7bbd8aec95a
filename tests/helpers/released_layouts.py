"""Exported drafts rewritten in the layouts of engines and of releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def rewrite(
    source: Path,
    path: Path,
    config: dict[str, Any],
    rename: Callable[[str], str] = lambda name: name,
    **tensors: torch.Tensor | None,
) -> Path:
    """Copy a draft with another config and other names and tensors; None drops one."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors") | tensors
    renamed = {rename(k): v.contiguous() for k, v in weights.items() if v is not None}
    save_file(renamed, path / "model.safetensors")
    return path


def config_of(path: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a draft with changes; None drops a setting."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    return {name: value for name, value in config.items() if value is not None}


def engine_name(name: str) -> str:
    """The name of an EAGLE-3 draft's tensor in vLLM."""
    return name.replace("midlayer.", "layers.0.")


def vllm_config(path: Path) -> dict[str, Any]:
    """An EAGLE-3 draft's config as vLLM has it: layers counted from 1."""
    return config_of(
        path,
        architectures=["Eagle3LlamaForCausalLM"],
        eagle_config=None,
        eagle_aux_hidden_state_layer_ids=[2, 3, 5],
        norm_output=False,  # not what it is in SpecForge
    )


def speculators_config(path: Path) -> dict[str, Any]:
    """As vLLM's package `speculators` writes it: the layer's settings apart."""
    config = config_of(path, eagle_config=None, architectures=None)
    size = config.pop("draft_vocab_size")
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": size,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 5],
        "transformer_layer_config": config,
    }


def numbered_name(name: str) -> str:
    """The name of a MEDUSA draft's tensor in older releases."""
    part, head, *rest = name.split(".")
    if part == "lm_heads":
        return f"{head}.1.weight"
    return f"{head}.{rest[1]}.linear.{rest[2]}"


def as_torch_file(path: Path) -> Path:
    """Store a draft's tensors as pytorch_model.bin, as EAGLE's authors did."""
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path
