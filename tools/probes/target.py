"""Probes of the target head: its files, its logits, its precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tools.probes.common import TINY, Figures, outcome, scratch, supported


def target_head_files() -> Figures:
    from safetensors.torch import save_file

    weight = torch.randn(TINY["vocab_size"], TINY["hidden_size"])
    index = "model.safetensors.index.json"
    layouts: dict[str, tuple[bool, str, bool]] = {
        "an indexed checkpoint": (False, "lm_head.weight", True),
        "one model.safetensors": (False, "lm_head.weight", False),
        "one model.safetensors, tied embeddings": (True, "model.embed_tokens.weight", False),
        "an indexed checkpoint, tied embeddings": (True, "model.embed_tokens.weight", True),
    }
    figures: Figures = {}
    for name, (tied, key, indexed) in layouts.items():
        with scratch() as directory:
            save_file({key: weight}, directory / "model.safetensors")
            if indexed:
                content = json.dumps({"weight_map": {key: "model.safetensors"}})
                (directory / index).write_text(content)
            _write_target(directory, tie_word_embeddings=tied)
            figures[f"target head from {name}"] = outcome(lambda: _head(directory), "loads")
    return figures


def _write_target(directory: Path, **changes: Any) -> None:
    config = {**TINY, "architectures": ["LlamaForCausalLM"], **changes}
    (directory / "config.json").write_text(json.dumps(config))


def _head(directory: Path, **options: Any) -> Any:
    from specforge.modeling.target.target_head import TargetHead

    return supported(TargetHead.from_pretrained, model_path=str(directory), **options)


def target_logits() -> Figures:
    """Random targets that do more than multiply by a weight; loading rounds to bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, dict[str, Any]] = {
        "cohere": {"logit_scale": 0.0625},
        "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
        "granite": {"logits_scaling": 8.0},
        "phi": {},
    }
    figures: Figures = {}
    for family, setting in settings.items():
        sizes = {**TINY, "model_type": family, "pad_token_id": 0}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes, **setting)).eval()
        tokens = torch.arange(40)[None]
        with scratch() as directory, torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.copy_(torch.randn_like(parameter).bfloat16())
            states = model.get_decoder()(input_ids=tokens).last_hidden_state
            p = model(input_ids=tokens).logits.softmax(-1)
            model.save_pretrained(directory)
            head = _head(directory).float()
            q = head(states.to(head.fc.weight.device)).softmax(-1).cpu()
            distance = (p - q).abs().sum(-1).mean() / 2
        figures[f"total variation from a {family} target's own p"] = distance.item()
    return figures


def target_head_precision() -> Figures:
    """Weights and states that bfloat16 holds exactly, so that the logits alone are rounded."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = 256, 4096
    states = torch.randn(1, 512, hidden, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, hidden, generator=generator)
    # The largest logit of a position is then near 20.
    weight = (weight * (20 / (4 * hidden**0.5))).bfloat16()
    with scratch() as directory:
        save_file({"lm_head.weight": weight}, directory / "model.safetensors")
        _write_target(directory, hidden_size=hidden, vocab_size=vocabulary)
        head = _head(directory, dtype=torch.float32)
        with torch.no_grad():
            logits = head(states.to(head.fc.weight.dtype)).double()
    exact = states.double() @ weight.double().T
    p, q = exact.softmax(-1), logits.softmax(-1)
    likely = p > 0.01
    return {
        "largest logit of a position, median": exact.max(-1).values.median().item(),
        "largest relative error of a target probability above 0.01": (
            (q / p - 1).abs()[likely].max().item()
        ),
        "acceptance rate of the exact target as its own draft": (
            torch.minimum(p, q).sum(-1).mean().item()
        ),
    }
