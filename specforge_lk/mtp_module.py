"""The MTP module in a Hugging Face checkpoint, which may hold a target beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"


def read_module(source: str | Path, prefix: str, **hub: Any) -> dict[str, torch.Tensor]:
    """Read the tensors below ``prefix``, and no others.

    Matrices that were released in fp8, as DeepSeek-V3's, have a scale for every block; what they
    stand for is returned in bfloat16, as DeepSeek's own conversion does. transformers' divides the
    rows evenly among the scales instead, which is wrong where the last block is not a whole one:
    DeepSeek-V3's ``kv_a_proj_with_mqa`` has 576 rows in blocks of 128.

    Args:
        source: a directory or a hub id; only the files that hold the module are fetched and read.
        prefix: ``model.layers.<L>.``, L being the target's number of layers.
        hub: settings of transformers' ``cached_file``, such as ``cache_dir``.

    Returns:
        By the rest of their names; empty where there is no module.

    Raises:
        OSError: a file that should hold the module is missing.
        ValueError: the module is quantised in another way.
    """
    from safetensors import safe_open
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(str(source), **hub)
    blocks = (config.get("quantization_config") or {}).get("weight_block_size")
    weights = {}
    for file in _files(source, prefix, hub):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefix):
                    weights[name.removeprefix(prefix)] = tensors.get_tensor(name)
    for name in [name for name in weights if name.endswith(_SCALE)]:
        scale, weight = weights.pop(name).float(), weights[name.removesuffix(_SCALE)]
        for axis, block in enumerate(blocks or weight.shape):
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, weight.shape[axis])
        weights[name.removesuffix(_SCALE)] = (weight.float() * scale).bfloat16()
    for name, weight in weights.items():
        # Cast without its scales it would be other weights, and nothing would say so.
        if weight.dtype.itemsize < 2:
            raise ValueError(
                f"{source}: {prefix}{name} has type {weight.dtype}, and no {name}{_SCALE}; give a "
                "checkpoint in bfloat16, or in fp8 with scales of blocks as DeepSeek-V3's"
            )
    return weights


def _files(source: str | Path, prefix: str, hub: dict[str, Any]) -> list[Path]:
    """The files that hold the module."""
    from transformers.utils import cached_file

    names = {"model.safetensors"}
    if index := cached_file(source, _INDEX, _raise_exceptions_for_missing_entries=False, **hub):
        where = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {file for name, file in where.items() if name.startswith(prefix)}
    return [Path(cached_file(source, name, **hub)) for name in sorted(names)]
