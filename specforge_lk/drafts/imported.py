"""Drafts in the layouts of engines and releases, rewritten in the form of SpecForge's own exports.

A draft is read by the functions that decoding reads it with, and written with config and tensors
of an export, so that ``model.draft_checkpoint_path`` takes it through the one path that takes
exports, whatever the algorithm; that it does is tried before the folder gets its name. What
training would not take over as it is, or would replace by the target's, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from specforge_lk.decode.checkpoint import DraftError, disagreement, read_config, refuse_layers
from specforge_lk.decode.eagle_checkpoint import FEED_NORMALIZED, read_eagle3
from specforge_lk.decode.heads import LastStateDraft, MedusaDraft, MLPSpeculatorDraft
from specforge_lk.decode.mtp import read_mtp
from specforge_lk.drafts import configs
from specforge_lk.drafts.target_files import TargetFiles
from specforge_lk.files import atomic_write
from specforge_lk.target import layer_ids_are_inputs

MAPPING: Final = "vocab_mapping.pt"
#: Settings of a speculators config that say where the draft comes from, not what it is.
_ORIGIN: Final = ("speculators_", "transformer_layer_config", "auto_map", "verifier", "algorithm")
#: Positions at which the rotary tables of training and decoding are compared.
_POSITIONS: Final = 512
_TABLE_ERROR: Final = 1e-3


@dataclass(frozen=True)
class Imported:
    """A draft in the form in which SpecForge trains it.

    Attributes:
        name: of the algorithm that trains it.
        config: its config.json.
        weights: its tensors by their names in training.
        ids: [V_d] target ids of the rows of its LM heads; None for the whole vocabulary in order.
        heads: names of its LM heads.
        mapping: whether its module has the buffers ``t2d`` and ``d2t``.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    ids: torch.Tensor | None
    heads: tuple[str, ...]
    mapping: bool

    def state(self, vocab_size: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a training checkpoint.

        Training selects the target's logits by a mask, in the order of the target's ids: the rows
        of the LM heads are put in that order, which changes no token's logit.

        Args:
            vocab_size: V.
        """
        if not self.mapping:
            return dict(self.weights)
        ids = torch.arange(vocab_size) if self.ids is None else self.ids
        ids, order = ids.sort()
        rows = {name: self.weights[name][order] for name in self.heads}
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids] = True
        return {**self.weights, **rows, "t2d": t2d, "d2t": ids - torch.arange(len(ids))}


Reader = Callable[[Path, dict[str, Any], TargetFiles, "tuple[int, ...] | None"], Imported]


def import_draft(
    source: Path, target: TargetFiles, out: Path, layers: tuple[int, ...] | None = None
) -> str:
    """Write a draft as `specforge export --to hf` would have, with the mapping of its vocabulary.

    Args:
        source: the draft's folder, in any layout that `specforge_lk.decode.draft.load_draft` reads.
        target: the target it drafts for.
        out: the folder to write; it must not exist.
        layers: captured target layers, overriding the draft's config.

    Returns:
        The algorithm that trains it, ``training.strategy``.

    Raises:
        DraftError: the folder is incomplete, does not fit itself or the target, or is of a draft
            that training would make another one of.
        ValueError: ``out`` exists, or the target cannot be read.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it, or give the name of a new folder")
    config, kind = read_config(source)
    reader = READERS.get(kind.name)
    if reader is None:
        raise DraftError(
            f"draft {source}: a {kind.title} is read in SpecForge's own layout only; give it as "
            "model.draft_checkpoint_path, as it is"
        )
    read = reader(source, config, target, layers)
    state = read.state(target.vocab_size)
    with atomic_write(out) as temporary:
        _write(source, read, state, temporary)
        if read.mapping and len(state["d2t"]) < target.vocab_size:
            torch.save({name: state[name] for name in ("t2d", "d2t")}, temporary / MAPPING)
    return read.name


def _write(source: Path, read: Imported, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write config.json and safetensors as SpecForge exports them, and start a training from them.

    Raises:
        DraftError: SpecForge does not build such a draft, or does not take over all of it.
    """
    from safetensors.torch import save_file
    from specforge.export.checkpoint_io import apply_legacy_rope_scaling
    from specforge.modeling.auto import AutoDraftModel
    from specforge.tensor_file import write_checksums
    from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model

    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(read.config))
    try:
        config = load_draft_config_source(str(file))
        draft = AutoDraftModel.from_config(config, torch_dtype=torch.float32)
        _check_layer(source, draft)
        _check_shapes(source, draft, state)
        config.dtype = state[read.heads[0]].dtype
        config.save_pretrained(folder)
        apply_legacy_rope_scaling(str(folder))
        # The names of engines, where they have others.
        named = draft.engine_state(state) if hasattr(draft, "engine_state") else state
        stored = {name: value.detach().contiguous().clone() for name, value in named.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        write_checksums(str(folder))
        found = warm_start_draft_model(
            draft, str(folder), draft_config=load_draft_config_source(str(file)), strategy=read.name
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, DraftError):
            raise
        # It names the temporary folder.
        reason = str(error).replace(str(folder), str(source))
        raise DraftError(f"draft {source}: SpecForge trains no such draft: {reason}") from error
    if found.missing_keys:
        raise DraftError(f"draft {source}: tensors {list(found.missing_keys)} are missing")


def _check_layer(source: Path, draft: Any) -> None:
    """Refuse an EAGLE-3 draft whose rotary embedding SpecForge would compute in another way.

    Raises:
        DraftError: its tables are not those of the config.
    """
    layer = getattr(draft, "midlayer", None)
    if layer is None:
        return
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    count = min(_POSITIONS, int(draft.config.max_position_embeddings))
    position = torch.arange(count)[None]
    theirs = torch.stack(LlamaRotaryEmbedding(draft.config)(torch.zeros(1), position))[:, 0]
    rotary = layer.self_attn.rotary_emb
    ours = torch.stack([rotary.cos_cached[0, 0, :count], rotary.sin_cached[0, 0, :count]])
    if (ours.float() - theirs).abs().max() > _TABLE_ERROR:
        raise _untrained(source, "rope_parameters", draft.config.rope_parameters)


def _check_shapes(source: Path, draft: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that the draft of this config does not have.

    Raises:
        DraftError: naming them.
    """
    if hasattr(draft, "engine_state"):
        return  # They have the names of engines; loading finds what does not fit.
    own = {name: list(value.shape) for name, value in draft.state_dict().items()}
    differing = [
        f"{name} has shape {list(value.shape)} instead of {own[name]}"
        if name in own
        else f"{name} has no place"
        for name, value in state.items()
        if own.get(name) != list(value.shape)
    ]
    if differing:
        raise disagreement(source, "; ".join(differing))


def _untrained(source: Path, name: str, value: object) -> DraftError:
    return DraftError(
        f"{source / 'config.json'}: SpecForge trains no draft with {name} {value!r}, and would "
        "train this one as another; train a draft of your own (docs/finetune.md)"
    )


def _require_plain(source: Path, config: Mapping[str, Any], **settings: object) -> None:
    """Refuse settings that training does not have, unless they change nothing.

    Args:
        source: the draft's folder.
        config: its config.
        settings: names, each with the value that changes nothing.

    Raises:
        DraftError: one has another value.
    """
    for name, plain in settings.items():
        if (config.get(name) or plain) != plain:
            raise _untrained(source, name, config[name])


def _lent(
    source: Path, name: str, own: torch.Tensor | None, lent: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Return a tensor that training takes from the target, the draft's own being the same one.

    Raises:
        DraftError: the draft's own is another.
    """
    theirs = lent()
    if own is None:
        return theirs
    if own.shape != theirs.shape or not torch.equal(own, theirs.to(own.dtype)):
        raise DraftError(
            f"draft {source}: its {name} is not the target's, which training puts in its place "
            "and leaves out of checkpoints; give the target the draft was trained for, or train "
            "a draft of your own (docs/finetune.md)"
        )
    return own


# ------------------------------------------------------------------------------- drafts


def _eagle3(
    path: Path, config: dict[str, Any], target: TargetFiles, layers: tuple[int, ...] | None
) -> Imported:
    read = read_eagle3(path, config, target, layers)
    found = {
        name: value for name, value in read.config.to_dict().items() if not name.startswith(_ORIGIN)
    }
    biased = found.get("attention_bias") or any(n.endswith("_proj.bias") for n in read.weights)
    fed = found.pop(FEED_NORMALIZED, False)  # its setting in the engines' layout is norm_output
    plain = {"logit_scale": 1, "norm_before_fc": False, "attention_bias": False}
    given = {**found, "attention_bias": biased, "norm_output": fed}
    _require_plain(path, given, **plain, norm_output=False)
    if len(read.layers) != 3:
        raise DraftError(
            f"draft {path}: it reads {len(read.layers)} layers of the target, and SpecForge "
            "captures three; train a draft of your own (docs/finetune.md)"
        )
    inputs = [layer + 1 for layer in read.layers]
    outputs = list(read.layers)
    found |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        # As specforge.export.checkpoint_io numbers them, for SGLang and for vLLM.
        "eagle_config": {
            **(found.get("eagle_config") or {}),
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": (
                inputs if layer_ids_are_inputs(target.config, outputs) else outputs
            ),
        },
        "eagle_aux_hidden_state_layer_ids": inputs,
    }
    embedding = "embed_tokens.weight"
    own = read.weights.get(embedding)
    weights = {**read.weights, embedding: _lent(path, embedding, own, target.embedding)}
    return Imported("eagle3", found, weights, read.draft_ids, ("lm_head.weight",), mapping=True)


def _heads(
    draft: type[LastStateDraft],
    path: Path,
    config: dict[str, Any],
    target: TargetFiles,
    layers: tuple[int, ...] | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    refuse_layers(path, draft.algorithm, layers)
    read, weights, ids = draft.read(path, config, target)
    _require_plain(path, read, logit_scale=1)
    size = draft.rows(weights)
    dropped = ("truncated_vocab_size", "auto_map")
    kept = {name: value for name, value in read.items() if name not in dropped}
    return {**kept, "draft_vocab_size": size}, weights, ids


def _medusa(
    path: Path, config: dict[str, Any], target: TargetFiles, layers: tuple[int, ...] | None
) -> Imported:
    config, weights, ids = _heads(MedusaDraft, path, config, target, layers)
    config |= {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "medusa_fc_bias": "blocks.0.layers.0.bias" in weights,
        "original_lm_head": "lm_head.weight" in weights,
    }
    heads = tuple(name for name in weights if name.startswith("lm_head"))
    if config["original_lm_head"]:
        kept = torch.arange(target.vocab_size) if ids is None else ids
        whole = torch.ones(target.vocab_size, dtype=torch.bool)
        name = "lm_head.weight"
        weights[name] = _lent(
            path, name, weights[name], lambda: target.weights.scaled_head(whole)[kept]
        )
    return Imported("medusa", config, weights, ids, heads, mapping=_truncates(config))


def _mlp_speculator(
    path: Path, config: dict[str, Any], target: TargetFiles, layers: tuple[int, ...] | None
) -> Imported:
    config, weights, ids = _heads(MLPSpeculatorDraft, path, config, target, layers)
    config |= {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
    }
    heads = tuple(name for name in weights if name.startswith("head."))
    return Imported("mlp_speculator", config, weights, ids, heads, mapping=_truncates(config))


def _truncates(config: Mapping[str, Any]) -> bool:
    return bool(config["draft_vocab_size"] < config["vocab_size"])


def _mtp(
    path: Path, config: dict[str, Any], target: TargetFiles, layers: tuple[int, ...] | None
) -> Imported:
    refuse_layers(path, "mtp", layers)
    parsed, weights = read_mtp(path, config, target)
    for name, lent in (
        ("embed_tokens.weight", target.embedding),
        ("shared_head.head.weight", target.lm_head_weight),
    ):
        weights[name] = _lent(path, name, weights.get(name), lent)
    dropped = ("quantization_config", "auto_map")
    kept = {name: value for name, value in config.items() if name not in dropped}
    prefix = f"model.layers.{parsed.num_hidden_layers}."
    return Imported(
        "mtp",
        configs.mtp(kept, None, 1),
        {prefix + name: value for name, value in weights.items()},
        None,
        (f"{prefix}eh_proj.weight",),
        mapping=False,
    )


#: How a draft is read, by the algorithm that trains it.
READERS: Final[Mapping[str, Reader]] = {
    "eagle3": _eagle3,
    "medusa": _medusa,
    "mlp_speculator": _mlp_speculator,
    "mtp": _mtp,
}
