"""Modules that several drafts are made of, under the names of their checkpoints' tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Cosines and sines of rotary embeddings, [B, n, 1, head_dim] each.
Rotary = tuple[torch.Tensor, torch.Tensor]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to [B, n, heads, head_dim], in the layout of two halves."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_tables(rotary: Any, states: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """Return the tables of a rotary embedding of transformers for positions [B, n]."""
    cos, sin = rotary(states, positions)
    return cos.unsqueeze(2), sin.unsqueeze(2)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Return what queries attend to, [B, n, heads, head_dim].

    Args:
        query: [B, n, heads, head_dim].
        keys: [B, m, kv_heads, head_dim]; a group of query heads shares each.
        values: as ``keys``.
        visible: [B, n, m] bool, which keys a query sees.
    """
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None],
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


class Attention(nn.Module):
    """Projections of grouped-query attention.

    Args:
        config: a config of transformers with the sizes.
        width: size of the input.
        bias: whether the projections have biases.
        norms: whether queries and keys are normalized per attention head.
    """

    def __init__(self, config: Any, width: int, *, bias: bool = False, norms: bool = False) -> None:
        super().__init__()
        self._dim = int(config.head_dim)
        query = config.num_attention_heads * self._dim
        shared = config.num_key_value_heads * self._dim
        self.q_proj = nn.Linear(width, query, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(self._dim, config.rms_norm_eps) if norms else nn.Identity()
        self.k_norm = nn.RMSNorm(self._dim, config.rms_norm_eps) if norms else nn.Identity()

    def queries(self, states: torch.Tensor, tables: Rotary) -> torch.Tensor:
        """Return rotated queries [B, n, heads, head_dim] of states [B, n, width]."""
        return rotate(self.q_norm(self.q_proj(states).unflatten(-1, (-1, self._dim))), *tables)

    def keys_values(
        self, states: torch.Tensor, tables: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys, and values, [B, n, kv_heads, head_dim] each."""
        keys = self.k_norm(self.k_proj(states).unflatten(-1, (-1, self._dim)))
        return rotate(keys, *tables), self.v_proj(states).unflatten(-1, (-1, self._dim))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self._activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(self._activation(self.gate_proj(states)) * self.up_proj(states))


class DecoderLayer(nn.Module):
    """A decoder layer, split around its attention, which drafts do in different ways.

    Args:
        config: a config of transformers with the sizes.
        width: size of the attention's input; None for the hidden size.
        bias: whether the attention's projections have biases.
        norms: whether the attention normalizes queries and keys.
    """

    def __init__(
        self, config: Any, width: int | None = None, *, bias: bool = False, norms: bool = False
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, width or size, bias=bias, norms=norms)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)

    def read(
        self, hidden: torch.Tensor, embedded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention's input, and the residual that its output is added to.

        Args:
            hidden: [B, n, H].
            embedded: [B, n, H], embeddings of the tokens, which only an `EagleLayer` reads.
        """
        return self.input_layernorm(hidden), hidden

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, given its attention's [B, n, heads, head_dim]."""
        hidden = residual + self.self_attn.o_proj(attended.flatten(-2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleLayer(DecoderLayer):
    """A decoder layer that reads a token's embedding and a hidden state side by side."""

    def __init__(self, config: Any, *, bias: bool = False) -> None:
        super().__init__(config, 2 * config.hidden_size, bias=bias)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._normalize_residual = bool(getattr(config, "norm_before_residual", False))

    def read(
        self, hidden: torch.Tensor, embedded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DecoderLayer.read`."""
        normed = self.hidden_norm(hidden)
        inputs = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        return inputs, normed if self._normalize_residual else hidden
