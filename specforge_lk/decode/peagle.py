"""P-EAGLE drafts as SpecForge exports them, in plain torch.

Several decoder layers read, at position t, the embedding of token t + 1 beside the projected target
features of t (depth 0). The further depths of a chain hold the mask token and a learned state
instead, at the positions after t: one pass proposes the whole chain, every depth from its own
logits. A depth attends to the verified positions and to the depths of its chain before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.decode.draft import DraftError, Proposal, last_valid
from specforge_lk.decode.eagle3 import read_checkpoint, rotate
from specforge_lk.decode.sampling import check_finite, choose
from specforge_lk.decode.target import Target

#: Chain starts whose depths are computed at once in teacher forcing.
_CHAINS = 32


class _Layer(nn.Module):
    """A decoder layer; the first one reads embedding and state side by side."""

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        query = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        width = 2 * size if first else size
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, query, bias=False),
                "k_proj": nn.Linear(width, shared, bias=False),
                "v_proj": nn.Linear(width, shared, bias=False),
                "o_proj": nn.Linear(query, size, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, inner, bias=False),
                "up_proj": nn.Linear(size, inner, bias=False),
                "down_proj": nn.Linear(inner, size, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(size, config.rms_norm_eps)
        if first:
            self.hidden_norm = nn.RMSNorm(size, config.rms_norm_eps)


class PEagleDraft(nn.Module):
    """A P-EAGLE draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Its cache slot is the position, as in `Eagle3Draft`; only verified positions are cached.

    Args:
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        mask_token: the token that stands for those not known yet.
        capture_layers: the three target layers its features come from.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    algorithm = "peagle"
    max_heads = None

    def __init__(
        self,
        config: Any,
        mask_token: int,
        capture_layers: tuple[int, ...],
        draft_ids: torch.Tensor | None,
    ) -> None:
        super().__init__()
        from transformers.activations import ACT2FN
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = config
        self.capture_layers = capture_layers
        self.mask_token = mask_token
        width = len(capture_layers) * getattr(config, "target_hidden_size", config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(
            _Layer(config, first=not index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        self._normalize_first = bool(getattr(config, "norm_before_residual", False))
        self._activation = ACT2FN[config.hidden_act]
        self._rotary = LlamaRotaryEmbedding(config)

    def _run(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attend: Any,
    ) -> torch.Tensor:
        """States [B, n, H] of [B, n] entries.

        Args:
            attend: (index of the layer, keys, values) -> keys, values [B, m, heads, dim] that the
                entries may see, and the mask [B, n, m].
        """
        hidden = self.fc(features.to(self.fc.weight.dtype))
        embedded = self.embed_tokens(tokens).to(hidden.dtype)
        tables = tuple(table.unsqueeze(2) for table in self._rotary(hidden, positions))
        for index, layer in enumerate(self.layers):
            if index:
                inputs = layer.input_layernorm(hidden)
            else:
                inner = layer.hidden_norm(hidden)
                hidden = inner if self._normalize_first else hidden
                inputs = torch.cat([layer.input_layernorm(embedded), inner], dim=-1)
            query, key, value = (
                layer.self_attn[name](inputs).unflatten(-1, (-1, self.config.head_dim))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            keys, values, mask = attend(index, rotate(key, *tables), value)
            attended = F.scaled_dot_product_attention(
                rotate(query, *tables).transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=mask[:, None],
                enable_gqa=True,
            )
            hidden = hidden + layer.self_attn["o_proj"](attended.transpose(1, 2).flatten(-2))
            inner = layer.post_attention_layernorm(hidden)
            gated = self._activation(layer.mlp["gate_proj"](inner)) * layer.mlp["up_proj"](inner)
            hidden = hidden + layer.mlp["down_proj"](gated)
        return hidden

    def _deeper(
        self,
        positions: torch.Tensor,
        depths: int,
        context: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """States [B, S, depths, H] of depths 1, 2, … of chains that start at ``positions`` [B, S].

        Args:
            context: keys and values [B, L, heads, dim] of every layer, slot = position.
        """
        batch, count = positions.shape
        depth = torch.arange(1, depths + 1, device=positions.device)
        at = (positions[..., None] + depth).flatten(1)
        tokens = torch.full_like(at, self.mask_token)
        features = self.mask_hidden.expand(batch, at.shape[1], -1)
        start = positions.repeat_interleave(depths, dim=1)
        chain = torch.arange(count, device=positions.device).repeat_interleave(depths)
        own = (chain[:, None] == chain) & (depth.repeat(count)[:, None] >= depth.repeat(count))

        def attend(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple:
            keys, values = context[layer]
            before = torch.arange(keys.shape[1], device=keys.device) <= start[..., None]
            return (
                torch.cat([keys, key], dim=1),
                torch.cat([values, value], dim=1),
                torch.cat([before, own.expand(batch, -1, -1)], dim=-1),
            )

        return self._run(tokens, features, at, attend).unflatten(1, (count, depths))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(self.norm(hidden))
        check_finite(
            logits, "the draft", "its training diverged or its file is damaged: use another one"
        )
        return logits if logits.dtype == torch.float64 else logits.float()

    # Decoding

    def start(self, batch: int, capacity: int) -> None:
        """Allocate the cache: one slot per position, and one more that takes invalid entries."""
        shape = (batch, capacity + 1, self.config.num_key_value_heads, self.config.head_dim)
        weight = self.fc.weight
        self._cache = [
            tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            for _ in self.layers
        ]

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        slots = torch.where(valid, positions, self._cache[0][0].shape[1] - 1)
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=tokens.device) <= positions[..., None]

        def attend(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple:
            keys, values = self._cache[layer]
            keys[rows, slots], values[rows, slots] = key, value
            return keys[:, :length], values[:, :length], visible

        output = self._run(tokens, features, positions, attend)
        self._hidden, self._position = last_valid(valid, output, positions)

    def propose(
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        hidden = self._hidden
        if heads > 1:
            length = int(self._position.max()) + 1
            context = [tuple(states[:, :length] for states in layer) for layer in self._cache]
            deeper = self._deeper(self._position, heads - 1, context)[:, 0]
            hidden = torch.cat([hidden, deeper], dim=1)
        logits = self._logits(hidden)
        index = choose(logits, temperature, greedy, generator)
        tokens = index if self.draft_ids is None else self.draft_ids[index]
        return Proposal(index, tokens, logits)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows only."""
        self._cache = [tuple(states[rows] for states in layer) for layer in self._cache]
        self._hidden, self._position = self._hidden[rows], self._position[rows]

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at all chain starts; see `Draft.teacher_forced`."""
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        causal = (positions[..., None] >= positions[:, None]).clone()
        context = []

        def attend(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple:
            context.append((key, value))
            return key, value, causal

        first = self._run(tokens.roll(-1, dims=1), features, positions, attend)
        yield self._logits(first[starts])
        chains = []
        for row in range(batch if heads > 1 else 0):
            own = [tuple(states[row : row + 1] for states in layer) for layer in context]
            for some in starts[row].nonzero().squeeze(1).split(_CHAINS):
                if len(some):
                    chains.append(self._deeper(some[None], heads - 1, own)[0])
        for head in range(heads - 1):
            empty = first.new_zeros(0, first.shape[-1])
            yield self._logits(torch.cat([empty, *(chain[:, head] for chain in chains)]))


def load_peagle(
    path: Path, config: dict, target: Target, layers: tuple[int, ...] | None
) -> PEagleDraft:
    """Build a `PEagleDraft` from ``specforge export --to hf`` output; see `load_draft`."""
    read = read_checkpoint(path, config, target, layers)
    scaling = getattr(read.config, "rope_parameters", None) or {}
    if (kind := scaling.get("rope_type", "default")) != "default":
        raise DraftError(
            f"{path / 'config.json'}: rope_type {kind!r}, but SpecForge trains P-EAGLE with plain "
            "rotary embeddings of rope_theta, and engines would scale them: remove the scaling "
            "from the draft config"
        )
    if config.get("ptd_token_id") is None:
        raise DraftError(
            f"{path / 'config.json'}: ptd_token_id, the mask token of the training, is missing; "
            "export again, or set it to model.mask_token_id of the training"
        )
    draft = PEagleDraft(read.config, int(config["ptd_token_id"]), read.layers, read.draft_ids)
    return read.load_into(draft, path, target)
