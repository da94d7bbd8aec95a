"""EAGLE-3 drafts of SpecForge and of engines: inference with a key/value cache, in plain torch.

One decoder layer reads, at position t, the embedding of token t + 1 beside a hidden state of
position t: the projected target features where the target has been (draft position 1), the layer's
own output of the previous step after that (draft positions 2..K). The state that is fed back is the
one BEFORE the output norm, whatever SpecForge's setting ``norm_output`` says about the norm; it is
the one after it in drafts of engines whose ``norm_output`` is true (EAGLE-3.1, arXiv 2605.09992;
vLLM 0.32.0, ``model_executor/models/llama_eagle3.py``). Norms of each captured layer (``fc_norm``)
are those of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from specforge_lk.decode.base import CachedDraft
from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.eagle_checkpoint import FEED_NORMALIZED, read_eagle3
from specforge_lk.decode.layers import EagleLayer, attend, rotary_tables
from specforge_lk.decode.sampling import choose
from specforge_lk.decode.target import Target
from specforge_lk.drafts.modules import Stack
from specforge_lk.serving import Sampling


class Eagle3Draft(CachedDraft):
    """An EAGLE-3 draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Args:
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        capture_layers: the target layers its features come from, three as a rule.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    algorithm = "eagle3"

    def __init__(
        self, config: Any, capture_layers: tuple[int, ...], draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__(config, 1, capture_layers, draft_ids)
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        size, eps = config.hidden_size, config.rms_norm_eps
        feature_size = getattr(config, "target_hidden_size", size)
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(len(capture_layers) * feature_size, size, bias=False)
        self.input_norm = (
            nn.RMSNorm(self.fc.in_features, eps)
            if getattr(config, "norm_before_fc", False)
            else None
        )
        self.fc_norm: Stack[nn.RMSNorm] | None = (
            Stack(nn.RMSNorm(feature_size, eps) for _ in capture_layers)
            if getattr(config, "fc_norm", False)
            else None
        )
        self.midlayer = EagleLayer(config, bias=bool(config.attention_bias))
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self._normalize = bool(getattr(config, "norm_output", True))
        self._feed_normalized = bool(getattr(config, FEED_NORMALIZED, False))
        self._logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._rotary = LlamaRotaryEmbedding(config)
        self._scale = config.head_dim**-0.5

    @classmethod
    def load(
        cls, path: Path, config: dict[str, Any], target: Target, layers: tuple[int, ...] | None
    ) -> Self:
        """Load a draft in SpecForge's or vLLM's layout; see `load_draft`."""
        read = read_eagle3(path, config, target, layers)
        return read.fill(cls(read.config, read.layers, read.draft_ids), target)

    def _project(
        self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and values, [B, n, heads, dim] each; the residual."""
        layer = self.midlayer
        embedded = self.embed_tokens(tokens).to(hidden.dtype)
        inputs, residual = layer.read(hidden, embedded)
        tables = rotary_tables(self._rotary, inputs, positions)
        key, value = layer.self_attn.keys_values(inputs, tables)
        return layer.self_attn.queries(inputs, tables), key, value, residual

    def _features(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            chunks = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat(
                [norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1
            )
        return self.fc(features)

    def _finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's output as it is fed back, from what its attention read."""
        hidden = self.midlayer.finish(residual, attended)
        return self.norm(hidden) if self._feed_normalized else hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normalize = self._normalize and not self._feed_normalized
        states = self.norm(hidden) if normalize else hidden
        return self._checked(self.lm_head(states) * self._logit_scale)

    # Decoding

    def _extend(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer on [B, n] entries, writing their keys and values to the cache."""
        query, key, value, residual = self._project(tokens, hidden, positions)
        self._write(0, (key, value), positions, valid)
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=tokens.device) <= positions[..., None]
        ((keys, values),) = self._read(length)
        return self._finish(residual, attend(query, keys, values, visible))

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        output = self._extend(tokens, self._features(features), positions, valid)
        self._start_chain(valid, output, positions)

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        hidden, position = self._chain
        indices: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        for step in range(heads):
            if step:
                hidden = self._extend(self.target_ids(indices[-1]), hidden, position + step)
            logits.append(self._logits(hidden))
            indices.append(choose(logits[-1], sampling, generator))
        index = torch.cat(indices, dim=1)
        return Proposal(index, self.target_ids(index), torch.cat(logits, dim=1))

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at all chain starts; see `Draft.teacher_forced`.

        At step i every position t is a chain of its own: its query sees the first-step states of
        positions 0..t, which come from the target, and the i states its own chain has added.
        """
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        hidden = self._features(features)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for step in range(heads):
            # Token t + 1 + step; what is rolled in from the front is beyond every chain start.
            inputs = tokens.roll(-1 - step, dims=1)
            query, key, value, residual = self._project(inputs, hidden, positions + step)
            keys.append(key.repeat_interleave(groups, dim=2))
            values.append(value.repeat_interleave(groups, dim=2))
            scores = torch.einsum("bqhd,bkhd->bhqk", query, keys[0]) * self._scale
            scores = scores.masked_fill(~causal, float("-inf"))
            if step:
                own = torch.stack([(query * k).sum(-1) for k in keys[1:]], dim=-1) * self._scale
                scores = torch.cat([scores, own.transpose(1, 2)], dim=-1)
            weights = scores.softmax(-1)
            attended = torch.einsum("bhqk,bkhd->bqhd", weights[..., :length], values[0])
            for i, v in enumerate(values[1:]):
                attended = attended + weights[..., length + i].transpose(1, 2)[..., None] * v
            hidden = self._finish(residual, attended)
            yield self._logits(hidden[starts])
