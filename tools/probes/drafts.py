"""Probes of drafts: their vocabulary, what an export records, their rotary angles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.probes.common import TINY, Figures, outcome, scratch


def vocabulary_mapping() -> Figures:
    from safetensors.torch import load_file
    from specforge.export.to_hf import export_to_hf
    from specforge.export.to_sglang import export_to_sglang
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    kept = 16

    def mapping(path: Path, first: int = 0, contradiction: int = 0) -> str:
        mask = torch.zeros(TINY["vocab_size"], dtype=torch.bool)
        mask[first : first + kept] = True
        offsets = torch.full((kept,), first + contradiction)
        torch.save({"t2d": mask, "d2t": offsets}, path)
        return str(path)

    with scratch() as directory:
        config = directory / "draft.json"
        content = {**TINY, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": kept}
        config.write_text(json.dumps(content))
        draft = AutoDraftModel.from_config(
            AutoDraftModelConfig.from_file(str(config)), torch_dtype=torch.float32
        )
        contradictory = mapping(directory / "contradictory.pt", contradiction=1)
        figures: Figures = {
            "training with t2d and d2t that disagree": outcome(
                lambda: draft.load_vocab_mapping(contradictory)
            )
        }
        draft.load_vocab_mapping(mapping(directory / "trained.pt"))
        checkpoint = directory / "training_state.pt"
        torch.save({"strategy": "eagle3", "draft_state_dict": draft.state_dict()}, checkpoint)
        other = mapping(directory / "other.pt", first=5)
        for form, export in (("sglang", export_to_sglang), ("hf", export_to_hf)):
            name = f"of {kept} draft tokens, those that mean another one, exported to {form}"
            try:
                export(str(checkpoint), str(config), str(directory), vocab_mapping_path=other)
            except ValueError as error:
                figures[f"{name} with another mapping"] = f"refused: {type(error).__name__}"
                continue
            exported = load_file(directory / "model.safetensors")["d2t"]
            figures[f"{name} with another mapping"] = int((exported != draft.d2t).sum())
    return figures


def exported_settings() -> Figures:
    from specforge.export.checkpoint_io import materialize_draft
    from specforge.modeling.draft import resolve_draft
    from transformers import LlamaConfig, Qwen3Config

    token, layers = 5, (0, 2, 4)

    def export(strategy: str, architecture: str, config: Any, **trained: Any) -> Any:
        draft = resolve_draft(architecture)(config)
        state = {"strategy": strategy, "draft_state_dict": draft.state_dict(), **trained}
        with scratch() as directory:
            path = directory / "config.json"
            content = {**config.to_dict(), "architectures": [architecture]}
            path.write_text(json.dumps(content))
            return materialize_draft(state, str(path)).config

    shared = {name: value for name, value in TINY.items() if name != "model_type"}
    llama = LlamaConfig(**shared, draft_vocab_size=16, ptd_token_id=1)
    dflash = Qwen3Config(**shared, head_dim=8, layer_types=["full_attention"])
    dflash.block_size, dflash.num_target_layers = 4, 6
    dflash.dflash_config = {"target_layer_ids": [2]}
    peagle = export("peagle", "PEagleDraftModel", llama, peagle_mask_token_id=token)
    dflash = export("dflash", "DFlashDraftModel", dflash, dflash_mask_token_id=token)
    key = "eagle_aux_hidden_state_layer_ids"

    def streamed(target: str, layers: Sequence[int]) -> tuple[str, str]:
        """What eagle_config names, and what vLLM takes from the export as inputs of layers."""
        with scratch() as source:
            (source / "config.json").write_text(json.dumps({"architectures": [target]}))
            provenance = {
                "capture_layers": tuple(layers),
                "target_model": ("directory-stat-v2", str(source), ()),
            }
            exported = export(
                "eagle3",
                "LlamaForCausalLMEagle3",
                llama,
                specforge_model_provenance=tuple(provenance.items()),
            )
        named = (getattr(exported, "eagle_config", None) or {}).get(key)
        return _listed(named), _listed(getattr(exported, key, named))

    named, inputs = streamed("LlamaForCausalLM", layers)
    _, deepseek = streamed("DeepseekV3ForCausalLM", (2, 30, 58))
    return {
        f"P-EAGLE: exported mask token, trained with {token}, draft config with 1": (
            peagle.ptd_token_id
        ),
        f"DFlash: exported mask token, trained with {token}": dflash.dflash_config.get(
            "mask_token_id", "none"
        ),
        f"EAGLE-3, streamed with the outputs of layers {_listed(layers)}: outputs exported": named,
        f"EAGLE-3, streamed with the outputs of layers {_listed(layers)}: inputs that vLLM takes "
        "from the export": inputs,
        "EAGLE-3, streamed from a DeepSeek V3 with the inputs of layers 2, 30, 58: inputs that "
        "vLLM takes from the export": deepseek,
    }


def _listed(layers: Sequence[int] | None) -> str:
    return ", ".join(map(str, layers)) if layers else "none"


def rotary_angles() -> Figures:
    from specforge.modeling.auto import AutoDraftModel
    from transformers import Qwen3Config

    distance, size, base = 1000, 128, 1e6
    shared = {name: value for name, value in TINY.items() if name != "model_type"}
    rope = {"rope_type": "default", "rope_theta": base}
    config = Qwen3Config(
        **shared, head_dim=size, layer_types=["full_attention"], rope_parameters=rope
    )
    config.architectures = ["DFlashDraftModel"]
    config.block_size, config.num_target_layers = 4, 6
    config.dflash_config = {"target_layer_ids": [2]}
    draft = AutoDraftModel.from_config(config, torch_dtype=torch.bfloat16)
    exact = base ** -(torch.arange(0, size, 2).double() / size)
    error = (draft.rotary_emb.inv_freq.double() - exact).abs().max() * distance
    name = f"rotary angle in bfloat16, largest error over {distance} tokens [rad]"
    return {name: round(error.item(), 3)}
