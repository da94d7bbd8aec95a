"""P-EAGLE drafts as SpecForge exports them, in plain torch.

Several decoder layers read, at position t, the embedding of token t + 1 beside the projected target
features of t (depth 0). The further depths of a chain hold the mask token and a learned state
instead, at the positions after t: one pass proposes the whole chain, every depth from its own
logits. A depth attends to the verified positions and to the depths of its chain before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from specforge_lk.decode.base import CachedDraft, KeysValues
from specforge_lk.decode.checkpoint import DraftError
from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.draft_config import require_token
from specforge_lk.decode.eagle_checkpoint import read_eagle
from specforge_lk.decode.layers import DecoderLayer, EagleLayer, attend, rotary_tables
from specforge_lk.decode.sampling import choose
from specforge_lk.decode.target import Target
from specforge_lk.drafts.modules import Stack
from specforge_lk.serving import Sampling

#: Chain starts whose depths are computed at once in teacher forcing.
_CHAINS = 32
#: (index of the layer, keys and values of the entries) -> keys and values [B, m, kv_heads, dim]
#: that the entries may see, and the mask [B, n, m].
_Sight = Callable[[int, KeysValues], tuple[KeysValues, torch.Tensor]]


class PEagleDraft(CachedDraft):
    """A P-EAGLE draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Only verified positions are cached.

    Args:
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        mask_token: the token that stands for those not known yet.
        capture_layers: the three target layers its features come from.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    algorithm = "peagle"

    def __init__(
        self,
        config: Any,
        mask_token: int,
        capture_layers: tuple[int, ...],
        draft_ids: torch.Tensor | None,
    ) -> None:
        super().__init__(config, config.num_hidden_layers, capture_layers, draft_ids)
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.mask_token = mask_token
        size = config.hidden_size
        width = len(capture_layers) * getattr(config, "target_hidden_size", size)
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(width, size, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, width))
        further = (DecoderLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.layers: Stack[DecoderLayer] = Stack([EagleLayer(config), *further])
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self._rotary = LlamaRotaryEmbedding(config)

    @classmethod
    def load(
        cls, path: Path, config: dict[str, Any], target: Target, layers: tuple[int, ...] | None
    ) -> Self:
        """Load a draft from ``specforge export --to hf``; see `load_draft`."""
        read = read_eagle(path, config, target, layers)
        scaling = getattr(read.config, "rope_parameters", None) or {}
        if (kind := scaling.get("rope_type", "default")) != "default":
            raise DraftError(
                f"{path / 'config.json'}: rope_type {kind!r}, but SpecForge trains P-EAGLE with "
                "plain rotary embeddings of rope_theta, and engines would scale them: remove the "
                "scaling from the draft config"
            )
        if config.get("ptd_token_id") is None:
            raise DraftError(
                f"{path / 'config.json'}: ptd_token_id, the mask token of the training, is "
                "missing; export again, or set it to model.mask_token_id of the training"
            )
        file, token = path / "config.json", config["ptd_token_id"]
        token = require_token(file, "ptd_token_id", token, target.vocab_size)
        draft = cls(read.config, token, read.layers, read.draft_ids)
        return read.fill(draft, target)

    def _run(
        self, tokens: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, sight: _Sight
    ) -> torch.Tensor:
        """Return the states [B, n, H] of [B, n] entries that see what ``sight`` says."""
        hidden = self.fc(features.to(self.fc.weight.dtype))
        embedded = self.embed_tokens(tokens).to(hidden.dtype)
        tables = rotary_tables(self._rotary, hidden, positions)
        for index, layer in enumerate(self.layers):
            inputs, residual = layer.read(hidden, embedded)
            attention = layer.self_attn
            (keys, values), visible = sight(index, attention.keys_values(inputs, tables))
            attended = attend(attention.queries(inputs, tables), keys, values, visible)
            hidden = layer.finish(residual, attended)
        return hidden

    def _deeper(
        self, positions: torch.Tensor, depths: int, context: list[KeysValues]
    ) -> torch.Tensor:
        """Return states [B, S, depths, H] of depths 1, 2, … of chains from ``positions`` [B, S].

        Args:
            positions: [B, S] where the chains start.
            depths: how many of each.
            context: keys and values [B, L, kv_heads, dim] of every layer, slot = position.
        """
        batch, count = positions.shape
        depth = torch.arange(1, depths + 1, device=positions.device)
        at = (positions[..., None] + depth).flatten(1)
        tokens = torch.full_like(at, self.mask_token)
        features = self.mask_hidden.expand(batch, at.shape[1], -1)
        start = positions.repeat_interleave(depths, dim=1)
        chain = torch.arange(count, device=positions.device).repeat_interleave(depths)
        own = (chain[:, None] == chain) & (depth.repeat(count)[:, None] >= depth.repeat(count))

        def sight(layer: int, states: KeysValues) -> tuple[KeysValues, torch.Tensor]:
            keys, values = context[layer]
            before = torch.arange(keys.shape[1], device=keys.device) <= start[..., None]
            visible = torch.cat([before, own.expand(batch, -1, -1)], dim=-1)
            both = torch.cat([keys, states[0]], dim=1), torch.cat([values, states[1]], dim=1)
            return both, visible

        return self._run(tokens, features, at, sight).unflatten(1, (count, depths))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._checked(self.lm_head(self.norm(hidden)))

    # Decoding

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=tokens.device) <= positions[..., None]

        def sight(layer: int, states: KeysValues) -> tuple[KeysValues, torch.Tensor]:
            self._write(layer, states, positions, valid)
            return self._read(length)[layer], visible

        output = self._run(tokens, features, positions, sight)
        self._start_chain(valid, output, positions)

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        hidden, position = self._chain
        if heads > 1:
            context = self._read(int(position.max()) + 1)
            hidden = torch.cat([hidden, self._deeper(position, heads - 1, context)[:, 0]], dim=1)
        logits = self._logits(hidden)
        index = choose(logits, sampling, generator)
        return Proposal(index, self.target_ids(index), logits)

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at all chain starts; see `Draft.teacher_forced`."""
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        causal = (positions[..., None] >= positions[:, None]).clone()
        context: list[KeysValues] = []

        def sight(layer: int, states: KeysValues) -> tuple[KeysValues, torch.Tensor]:
            context.append(states)
            return states, causal

        first = self._run(tokens.roll(-1, dims=1), features, positions, sight)
        yield self._logits(first[starts])
        chains = []
        for row in range(batch if heads > 1 else 0):
            own = [(keys[row : row + 1], values[row : row + 1]) for keys, values in context]
            for some in starts[row].nonzero().squeeze(1).split(_CHAINS):
                if len(some):
                    chains.append(self._deeper(some[None], heads - 1, own)[0])
        for depth in range(heads - 1):
            empty = first.new_zeros(0, first.shape[-1])
            yield self._logits(torch.cat([empty, *(chain[:, depth] for chain in chains)]))
