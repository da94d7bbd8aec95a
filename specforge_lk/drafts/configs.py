"""config.json of every draft, from its target's: what recipes and tests start from.

Each function takes the target's config.json, the size V_d of the draft vocabulary and the number K
of draft positions, and returns the draft's. Drafts that have the whole vocabulary, or any number
of positions, ignore what does not concern them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Config = dict[str, Any]

_LAYER = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
)


def _named(target: Mapping[str, Any], names: Iterable[str]) -> Config:
    return {name: target[name] for name in names}


def _rope(target: Mapping[str, Any]) -> Config:
    """Return the target's rotary base, and its scaling where engines compute it as SpecForge does.

    For YaRN they do not (gpt-oss has truncate: false, which SpecForge's drafts lack); samples end
    before the length from which YaRN extends.
    """
    scaling = target["rope_scaling"]
    kept = scaling if scaling and scaling.get("rope_type") == "llama3" else None
    return {"rope_theta": target["rope_theta"], "rope_scaling": kept}


def eagle3(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return one dense decoder layer; beside experts as wide as those that a token activates.

    No `eagle_aux_hidden_state_layer_ids`: unnamed, SpecForge, SGLang and vLLM take the same three,
    the outputs of layers 1, L // 2 - 1 and L - 4.
    """
    experts = target.get("num_experts_per_tok", 1)
    width = target.get("moe_intermediate_size", target["intermediate_size"])
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **_named(target, (*_LAYER, "initializer_range")),
        "intermediate_size": experts * width,
        "num_hidden_layers": 1,
        **_rope(target),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab_size or target["vocab_size"],
        "eagle_config": {"use_aux_hidden_state": True},
    }


def peagle(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return two layers like EAGLE-3's one; the mask token comes from model.mask_token_id."""
    return {
        **eagle3(target, draft_vocab_size, heads),
        "architectures": ["PEagleDraftModel"],
        "num_hidden_layers": 2,
        "rope_scaling": None,
    }


def dflash(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return one layer and a block of the anchor and ``heads`` slots."""
    return _block("DFlashDraftModel", target, heads + 1, {})


def domino(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return DFlash's, with a GRU a quarter as wide as the target."""
    size = target["hidden_size"]
    options = {"emb_dim": size // 8, "gru_hidden_dim": size // 4}
    return _block("DominoDraftModel", target, heads + 1, options)


def dspark(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return DFlash's, with a Markov head; all slots of a block predict."""
    options = {"markov_rank": target["hidden_size"] // 8, "confidence_head_alpha": 1.0}
    return _block("DSparkDraftModel", target, heads, options)


def _block(
    architecture: str, target: Mapping[str, Any], block_size: int, options: Config
) -> Config:
    layers = target["num_hidden_layers"]
    return {
        "architectures": [architecture],
        "model_type": "qwen3",
        **_named(target, _LAYER),
        "intermediate_size": target["intermediate_size"],
        "num_hidden_layers": 1,
        **_rope(target),
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"],
        "block_size": block_size,
        "num_target_layers": layers,
        "dflash_config": {
            # The outputs of the same layers as EAGLE-3's.
            "target_layer_ids": [1, layers // 2 - 1, layers - 4],
            "mask_token_id": target.get("pad_token_id") or 0,
            **options,
        },
    }


def medusa(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return ``heads`` MEDUSA heads of one residual block each."""
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": target["hidden_size"],
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": draft_vocab_size or target["vocab_size"],
        "num_heads": heads,
        "num_hidden_layers": 1,
    }


def mlp_speculator(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return tied heads: an embedding of the whole vocabulary each would be most of the draft."""
    return {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": draft_vocab_size or target["vocab_size"],
        "emb_dim": target["hidden_size"],
        "inner_dim": target["hidden_size"],
        "n_predict": heads,
        "tie_weights": True,
        "scale_input": True,
    }


def mtp(target: Mapping[str, Any], draft_vocab_size: int | None, heads: int) -> Config:
    """Return the target's own config."""
    return {"architectures": [], **target} | {"architectures": ["MTPDraftModel"]}
