"""What SpecForge's training forwards make of inputs, through what is private there.

A new release of SpecForge that moves something breaks this file, and no test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from specforge.algorithms.common import dflash_family_model as family
from specforge.algorithms.peagle import model as peagle
from tiny_target import VOCAB_SIZE


def eagle3_logits(
    draft: Any, tokens: torch.Tensor, features: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Return logits [B, L, V_d] of every TTT step, as OnlineEagle3Model has them with `sdpa`.

    Step i at position t reads token t + 1 + i: the data pipeline shifts by one before training, and
    the training loop once more per step.
    """
    batch, length = tokens.shape
    hidden = draft.project_hidden_states(features)
    mask = draft.prepare_decoder_attention_mask(
        torch.ones(batch, length, dtype=torch.bool), hidden, batch, length, 0
    )
    cache, logits = [[], []], []
    for _ in range(steps):
        tokens = torch.cat([tokens[:, 1:], tokens.new_zeros(batch, 1)], 1)
        hidden = draft.backbone(
            input_embeds=draft.embed_input_ids(tokens),
            hidden_states=hidden,
            cache_hidden=cache,
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
        )
        logits.append(draft.compute_logits(hidden))
    return logits


def dflash_logits(
    algorithm: str,
    draft: Any,
    target: Any,
    tokens: torch.Tensor,
    features: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """Return logits [N, block, V] of the blocks whose anchors follow the chains' starts.

    Args:
        algorithm: of the DFlash family.
        draft: its draft.
        target: the `Target` that lends head and embedding.
        tokens: [B, L].
        features: [B, L, layers · H].
        starts: [B, L], N of them.
    """
    block = draft.block_size
    model = {
        "dflash": family.OnlineDFlashModel,
        "domino": family.OnlineDominoModel,
        "dspark": family.OnlineDSparkModel,
    }[algorithm](
        draft_model=draft,
        target_lm_head=target.head,
        target_embed_tokens=target.model.get_input_embeddings(),
        mask_token_id=draft.mask_token_id,
        block_size=block,
        attention_backend="sdpa",
        **({"shift_label": draft.shift_label} if algorithm == "domino" else {}),
    )
    anchors = [row.nonzero().squeeze(1) + 1 for row in starts]
    most = max(len(row) for row in anchors)
    positions = torch.stack([torch.cat([a, a.new_zeros(most - len(a))]) for a in anchors])
    keep = torch.arange(most) < torch.tensor([[len(a)] for a in anchors])
    model._sample_anchor_positions = lambda *_: (positions, keep)
    _, _, hidden = model._forward_draft_blocks(tokens, features, torch.ones_like(tokens))
    hidden = hidden.view(len(tokens), most, block, -1)
    # Tokens from the anchor on: what Domino's and DSpark's heads are given in training.
    rows = torch.arange(len(tokens))[:, None, None]
    chain = tokens[rows, positions[..., None] + torch.arange(block)]
    head_inputs = {"domino": (chain, chain), "dspark": (chain,)}.get(algorithm, ())
    return model._draft_logits(hidden, *head_inputs)[""][keep]


def peagle_logits(
    draft: Any, tokens: torch.Tensor, features: torch.Tensor, depths: int, mask_token: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Return logits [V_d] of every chain of a row by its start and depth; shapes [1, L, ...]."""
    length = tokens.shape[1]

    def all_chains(seq_length: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.arange(seq_length)
        kept = [starts[: seq_length - depth] for depth in range(depths)]
        numbers = [torch.full_like(k, depth) for depth, k in enumerate(kept)]
        return torch.cat(kept), torch.cat(numbers)

    model = peagle.OnlinePEagleModel(
        draft, mask_token_id=mask_token, num_depths=depths, attention_backend="sdpa"
    )
    with (
        mock.patch.object(peagle, "generate_cod_sample_indices", all_chains),
        recorded_logits(draft) as logits,
    ):
        model(
            # The data pipeline shifts by one: position t reads token t + 1.
            input_ids=tokens.roll(-1, dims=1),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            target=torch.zeros(1, length, VOCAB_SIZE),
            loss_mask=torch.ones(1, length, dtype=torch.long),
            hidden_states=features,
        )
    starts, numbers = (part.tolist() for part in all_chains(length))
    return dict(zip(zip(starts, numbers, strict=True), logits[0][0], strict=True))


@contextmanager
def recorded_logits(draft: Any) -> Iterator[list[torch.Tensor]]:
    """Keep what ``compute_logits`` of a draft returns, call by call."""
    logits: list[torch.Tensor] = []
    compute = draft.compute_logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        output = compute(hidden)
        logits.append(output.detach())
        return output

    with mock.patch.object(draft, "compute_logits", record):
        yield logits


@contextmanager
def sampled_chains() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keep the anchors and depths that P-EAGLE's training draws."""
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    sample = peagle.generate_cod_sample_indices

    def record(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(sample(**arguments))
        return drawn[-1]

    with mock.patch.object(peagle, "generate_cod_sample_indices", record):
        yield drawn
