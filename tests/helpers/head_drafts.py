"""Inputs of drafts that read the target's last hidden state, and what training makes of them."""

from __future__ import annotations

import functools

import torch
from draft_inputs import draft_inputs
from tiny_target import VOCAB_SIZE, draft_config

from specforge_lk.drafts.medusa import MedusaConfig, MedusaModel
from specforge_lk.drafts.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel
from specforge_lk.drafts.model import HeadDraftModel

LENGTH, HEADS = 15, 3
inputs = functools.partial(draft_inputs, LENGTH, HEADS)
DRAFT_VOCAB = 40
CLASSES = {
    "medusa": (MedusaConfig, MedusaModel),
    "mlp_speculator": (MLPSpeculatorConfig, MLPSpeculatorPreTrainedModel),
}
VARIANTS = {
    "medusa": ("medusa", {}),
    "medusa, the target's head": ("medusa", {"original_lm_head": True, "num_hidden_layers": 2}),
    "medusa, biases": ("medusa", {"medusa_fc_bias": True}),
    "mlp": ("mlp_speculator", {}),
    "mlp, tied": ("mlp_speculator", {"tie_weights": True, "scale_input": False}),
}


@torch.no_grad()
def trained_logits(
    model: HeadDraftModel, tokens: torch.Tensor, features: torch.Tensor
) -> list[torch.Tensor]:
    """Logits [B, L, V_d] of every head, by the training forward."""
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    return list(model.head_logits(features, following, torch.ones_like(tokens), HEADS))


def build(variant, path, draft_vocab=DRAFT_VOCAB):
    """A draft with random weights, as `specforge export` saves it."""
    algorithm, changes = VARIANTS[variant]
    config, model = CLASSES[algorithm]
    settings = {**draft_config(draft_vocab, algorithm, HEADS), **changes}
    torch.manual_seed(0)
    draft = model(config.from_dict(settings))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if draft_vocab < VOCAB_SIZE:
        ids = torch.randperm(VOCAB_SIZE)[:draft_vocab].sort().values
        draft.d2t.copy_(ids - torch.arange(draft_vocab))
        draft.t2d.zero_()[ids] = True
    draft.save_pretrained(path)
    return draft.eval()
