"""How engines read an exported draft, where that is not how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specforge_lk.decode.target import Target
from specforge_lk.doctor import edits
from specforge_lk.doctor.measure import Condition, Edit
from specforge_lk.drafts.table import DraftType
from specforge_lk.target import layer_ids_are_inputs

#: The drafts whose layers `eagle_config` names.
EAGLE = ("eagle3", "peagle")
#: The drafts that make a block of tokens with the target's LM head.
BLOCK = ("dflash", "domino", "dspark")

Config = Mapping[str, Any]


def default_layers(count: int) -> tuple[int, ...]:
    """Return the layers that SpecForge and both engines take where none are named."""
    return 1, count // 2 - 1, count - 4


def layers_of(engine: str, config: Config, target: Target) -> tuple[int, ...]:
    """Return the captured layers k, outputs counted from 0, that an engine takes.

    vLLM takes its numbers for inputs, whichever key they come from, its own key first.
    """
    eagle = config.get("eagle_config") or {}
    ours = eagle.get("eagle_aux_hidden_state_layer_ids")
    theirs = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get("layer_ids")
    if engine == "vllm" and (named := theirs or ours):
        return tuple(layer - 1 for layer in named)
    if engine == "sglang" and ours:
        inputs = layer_ids_are_inputs(target.model.config, ours)
        return tuple(layer - 1 for layer in ours) if inputs else tuple(ours)
    return default_layers(target.num_layers)


def as_served(engine: str | None, kind: DraftType, config: Config, target: Target) -> Condition:
    """Return the condition in which an engine serves a draft; as it loads here without one."""
    served = Condition()
    if kind.name in EAGLE and engine:
        wanted = layers_of(engine, config, target)
        if all(0 <= layer < target.num_layers for layer in wanted):
            served = served.but(edits.layers(wanted))
    if engine == "vllm" and kind.name == "eagle3" and (edit := output_norm_of_vllm(config)):
        served = served.but(edit)
    if engine == "vllm" and kind.name == "mtp":
        served = served.but(edits.ZERO_FIRST, edits.LEND_EMBEDDINGS, edits.LEND_HEAD)
    return served


def output_norm_of_vllm(config: Config) -> Edit | None:
    """Return what vLLM makes of ``norm_output`` otherwise than SpecForge; None without the setting.

    SpecForge's meaning is whether there is a norm before the LM head. vLLM always has that, and
    takes the setting for whether the state after it is fed back.
    """
    if "norm_output" not in config:
        return None
    return edits.FEED_NORMALIZED if config["norm_output"] else edits.NORMALIZE_OUTPUT


__all__ = ["BLOCK", "EAGLE", "as_served", "default_layers", "layers_of", "output_norm_of_vllm"]
