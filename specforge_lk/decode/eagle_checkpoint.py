"""Exported drafts of the EAGLE family: in SpecForge's layout, and EAGLE-3's in vLLM's.

vLLM, and its `speculators` package, have other names of the same tensors and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from specforge_lk.decode.checkpoint import (
    DraftError,
    TargetFacts,
    draft_vocabulary,
    fill,
    read_weights,
    require_matrices,
    require_sizes,
)
from specforge_lk.decode.draft_config import are_distinct, listed_layers, parse_config, section
from specforge_lk.decode.target import Target
from specforge_lk.target import layer_ids_are_inputs

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_NEEDED = ("lm_head.weight", "fc.weight", "norm.weight")
#: What ``norm_output`` is in engines, in a config that has SpecForge's meaning of that setting.
FEED_NORMALIZED: Final = "feed_normalized"


_Draft = TypeVar("_Draft", bound=nn.Module)


@dataclass(frozen=True)
class EagleCheckpoint:
    """An exported draft of the EAGLE family, checked to fit itself and the target.

    Attributes:
        path: its folder.
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        layers: the captured target layers.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
        weights: tensors of the draft's module by name.
    """

    path: Path
    config: Any
    layers: tuple[int, ...]
    draft_ids: torch.Tensor | None
    weights: dict[str, torch.Tensor]

    def fill(self, draft: _Draft, target: Target) -> _Draft:
        """Give ``draft`` its weights, and the target's embeddings if it has none of its own."""
        weights = dict(self.weights)
        if "embed_tokens.weight" not in weights:
            # The matrix, not the target's module, which may scale what it looks up (Gemma).
            shared = target.model.get_input_embeddings().weight.detach()
            draft.embed_tokens = nn.Embedding.from_pretrained(shared)
            weights["embed_tokens.weight"] = shared
        return fill(draft, weights, self.path, target)


def read_eagle(
    path: Path, config: dict[str, Any], target: TargetFacts, layers: tuple[int, ...] | None
) -> EagleCheckpoint:
    """Read a draft of the EAGLE family in SpecForge's layout; see `load_draft`."""
    return _checked(path, config, read_weights(path), target, layers)


def read_eagle3(
    path: Path, config: dict[str, Any], target: TargetFacts, layers: tuple[int, ...] | None
) -> EagleCheckpoint:
    """Read an EAGLE-3 draft in SpecForge's or vLLM's layout; see `load_draft`."""
    config = _specforge_config(path, config)
    weights = {_specforge_name(name): tensor for name, tensor in read_weights(path).items()}
    return _checked(path, config, weights, target, layers)


def _checked(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    target: TargetFacts,
    layers: tuple[int, ...] | None,
) -> EagleCheckpoint:
    from transformers import LlamaConfig

    file = path / "config.json"
    if "draft_vocab_size" not in config:
        raise DraftError(f"{file}: draft_vocab_size is missing; export again")
    parsed = parse_config(file, LlamaConfig, config)
    # transformers 5 has `rope_parameters`, 4 has `rope_scaling` (None for the default).
    scaling = getattr(parsed, "rope_parameters", None) or getattr(parsed, "rope_scaling", None)
    rope = (scaling or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise DraftError(
            f"{file}: rope_type {rope!r} is not supported here; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    width = getattr(parsed, "target_hidden_size", None)
    wide = {"hidden_size": parsed.hidden_size} if width is None else {"target_hidden_size": width}
    require_sizes(path, {"vocab_size": parsed.vocab_size, **wide}, target)
    if missing := sorted(set(_NEEDED) - set(weights)):
        raise DraftError(f"draft {path}: tensors {missing} are missing; export again")
    require_matrices(path, weights, ("lm_head.weight", "fc.weight", "embed_tokens.weight"))
    rows = len(weights["lm_head.weight"])
    if rows != parsed.draft_vocab_size:
        raise DraftError(
            f"{file}: lm_head.weight has {rows} rows, draft_vocab_size is "
            f"{parsed.draft_vocab_size}; export again with the draft config of the training"
        )
    ids = draft_vocabulary(path, weights, rows, parsed.vocab_size)
    count = target.num_layers
    layers = layers or _captured_layers(file, config, target) or (1, count // 2 - 1, count - 4)
    needed = weights["fc.weight"].shape[1] // target.hidden_size
    if len(layers) != needed or not are_distinct(layers, count):
        raise DraftError(
            f"draft {path}: captured layers {list(layers)} are not {needed} different ones of a "
            f"target of {count} layers; "
            "set eagle_config.eagle_aux_hidden_state_layer_ids in its config.json, or --aux-layers "
            f"({needed} layers, as in model.aux_hidden_state_layer_ids of the training)"
        )
    tensors = {name: value for name, value in weights.items() if name not in ("d2t", "t2d")}
    return EagleCheckpoint(path, parsed, layers, ids, tensors)


def _captured_layers(
    file: Path, config: Mapping[str, Any], target: TargetFacts
) -> tuple[int, ...] | None:
    """Return the layers k that a config names, if any.

    SpecForge and SGLang count them in eagle_config, from 0. vLLM reads another place and counts
    from 1: its layer k + 1 is the input of decoder layer k + 1, which is the output of layer k.
    So does SGLang for the targets of `LAYER_IDS_OF_INPUTS`.
    """
    eagle, name = section(file, config, "eagle_config"), "eagle_aux_hidden_state_layer_ids"
    ours = listed_layers(file, eagle, name)
    theirs = listed_layers(file, config, name) or listed_layers(file, eagle, "layer_ids")
    named = []
    if ours:
        inputs = layer_ids_are_inputs(target.config, ours)
        named = [[layer - 1 for layer in ours] if inputs else list(ours)]
    named += [[layer - 1 for layer in theirs]] if theirs else []
    if len(named) == 2 and named[0] != named[1]:
        raise DraftError(
            f"{file}: eagle_config names the captured layers {ours} (from 0), and vLLM's setting "
            f"{theirs} (from 1) names others; say which with --aux-layers"
        )
    return tuple(named[0]) if named else None


def _specforge_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with SpecForge's meaning of every setting.

    Raises:
        DraftError: it asks for what is not decoded here.
    """
    config, speculators = dict(config), "speculators_model_type" in config
    if not speculators and "LlamaForCausalLMEagle3" in config["architectures"]:
        if config.get("num_hidden_layers", 1) != 1:
            raise DraftError(
                f"{path / 'config.json'}: num_hidden_layers {config['num_hidden_layers']!r}, but "
                "SpecForge's EAGLE-3 draft has one decoder layer, and engines would build as many "
                "as this says; set it to 1, or export the draft again"
            )
        return config
    if speculators:
        inner = section(path / "config.json", config, "transformer_layer_config")
        # The layer's own sizes come from the inner config; vLLM's default of one setting differs.
        config = {"norm_before_residual": True, **config, **inner}
    layers, kind = config.get("num_hidden_layers", 1), config.get("model_type", "llama")
    unsupported = {
        "num_hidden_layers": layers if layers != 1 else None,
        "model_type": kind if kind not in ("llama", "eagle") else None,
    }
    for name, value in unsupported.items():
        if value:
            raise DraftError(
                f"{path / 'config.json'}: {name} {value!r} is not supported here; measure this "
                "draft in a serving engine"
            )
    # A norm before the LM head is always there; if true, the state after it is fed back.
    config[FEED_NORMALIZED] = config.pop("norm_output", None) or False
    if config.get("draft_vocab_size") is None:
        config["draft_vocab_size"] = config.get("vocab_size")
    return config


def _specforge_name(name: str) -> str:
    """Return the name that a tensor has in SpecForge's exports."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name
