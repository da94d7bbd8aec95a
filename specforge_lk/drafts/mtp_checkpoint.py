"""The MTP module in a Hugging Face checkpoint, which may hold a target beside it.

This has its config and its tensors, which training and decoding share: it needs transformers, but
not SpecForge.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

#: Settings that a config of these families has for each layer.
_PER_LAYER: Final = ("layer_types", "mlp_layer_types")
#: Kinds of layers that see a part of the text alone.
_WINDOWED: Final = ("sliding_attention", "chunked_attention")
_INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"


class MTPConfig(PreTrainedConfig):
    """The config of a target's family, made from a draft's config.json.

    config.json is the target's own, with ``architectures`` ``["MTPDraftModel"]``; engines read the
    number of modules, one, from ``num_nextn_predict_layers``.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the family's config.

        Raises:
            ValueError: transformers does not know the family, a setting does not fit MTP, or the
                target's last layer has a window.
        """
        family = config_dict.get("model_type")
        if family not in CONFIG_MAPPING:
            raise ValueError(
                f"model_type {family!r} is no model family of transformers; an MTP draft has the "
                "model_type of its target"
            )
        for name, wanted in (
            ("draft_vocab_size", config_dict.get("vocab_size")),
            ("num_nextn_predict_layers", 1),
        ):
            if config_dict.get(name, wanted) != wanted:
                raise ValueError(
                    f"{name}={config_dict[name]} must be {wanted}: an MTP draft is one module with "
                    "the target's vocabulary, used once for each draft position"
                )
        settings = {"num_nextn_predict_layers": 1, **config_dict}
        # Of a target released in fp8; the module is trained and exported as ordinary numbers.
        settings.pop("quantization_config", None)
        made = CONFIG_MAPPING[family].from_dict(settings, **options)
        # With ``return_unused_kwargs`` a pair.
        _refuse_window(made[0] if isinstance(made, tuple) else made)
        return made


def _refuse_window(config: PreTrainedConfig) -> None:
    """Refuse a config whose last layer, the module's kind, sees a part of the text alone.

    Training and decoding would give the module full attention without a word.

    Raises:
        ValueError: the last layer has a window that is shorter than the longest text.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds:
        # Qwen2 and others have a window that none of their layers uses.
        field, value, windowed = "layer_types[-1]", kinds[-1], kinds[-1] in _WINDOWED
    else:
        # Without types, as Mistral and Phi-3, all layers have the window if there is one.
        field, value, windowed = "sliding_window", window, bool(window)
    longest = getattr(config, "max_position_embeddings", None)
    if windowed and not (window and longest and window >= longest):
        raise ValueError(
            f"{field}={value!r}: the target's last layer attends to a window of the text, but an "
            "MTP module is trained and decoded with full attention; train another draft of this "
            "target, such as eagle3 or medusa"
        )


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a decoder of one layer, the module's, behind the target's last."""
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    for name in _PER_LAYER:
        if getattr(single, name, None):
            setattr(single, name, getattr(single, name)[-1:])
    if hasattr(single, "first_k_dense_replace"):
        single.first_k_dense_replace = 0
    return single


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
        The tensors by the rest of their names; none where there is no module.

    Raises:
        OSError: a file that should hold the module is missing.
        ValueError: the module is quantized in another way.
    """
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
    """Return the files that hold the module."""
    names = {"model.safetensors"}
    if index := cached_file(source, _INDEX, _raise_exceptions_for_missing_entries=False, **hub):
        where = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {file for name, file in where.items() if name.startswith(prefix)}
    return [Path(cached_file(source, name, **hub)) for name in sorted(names)]
