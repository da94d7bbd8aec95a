"""DFlash, Domino and DSpark drafts as SpecForge exports them, in plain torch.

A block of slots starts at the anchor, the newest token that is known: slot 0 holds the anchor,
the others the mask token. All slots see the target's features of every position before the anchor
and one another, and the target's own head makes their logits in one pass. DFlash samples every
slot from these; Domino and DSpark correct them by the tokens drafted so far, slot after slot.

DFlash's slot k predicts the token at anchor + k, so that its slot 0 predicts nothing. DSpark's, and
Domino's with ``shift_label``, predict the one after. That is how SpecForge trains them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.decode.draft import DraftError, Proposal, last_valid, read_weights
from specforge_lk.decode.eagle3 import rotate
from specforge_lk.decode.sampling import check_finite, choose
from specforge_lk.decode.target import Target

#: Chain starts whose blocks are computed at once in teacher forcing.
_BLOCKS = 32


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        query = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class DFlashDraft(nn.Module):
    """A DFlash draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Its cache slot is the position, as in `Eagle3Draft`; only verified positions are cached.

    Args:
        config: a transformers Qwen3Config with ``block_size`` and ``dflash_config``.
        target: lends its embeddings and its head.
    """

    algorithm = "dflash"
    draft_ids = None
    #: First slot that predicts a token.
    first_slot = 1

    def __init__(self, config: Any, target: Target) -> None:
        super().__init__()
        from transformers.activations import ACT2FN
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        options = config.dflash_config
        self.config = config
        self.capture_layers = tuple(options["target_layer_ids"])
        self.block_size = int(config.block_size)
        self.mask_token = int(options["mask_token_id"])
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(
            len(self.capture_layers) * config.hidden_size, config.hidden_size, bias=False
        )
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._activation = ACT2FN[config.hidden_act]
        self._rotary = Qwen3RotaryEmbedding(config)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers)
        self._windows = [
            config.sliding_window if kind == "sliding_attention" else None for kind in kinds
        ]
        # Not modules of its own: the target's weights are no weights of the draft.
        self._target = (target,)
        self._init_head(options)

    def _init_head(self, options: dict) -> None:
        """Add what an algorithm corrects its logits with."""

    @property
    def max_heads(self) -> int:
        """Longest chain: the slots of a block that predict."""
        return self.block_size - self.first_slot

    def _corrected(
        self, logits: torch.Tensor, hidden: torch.Tensor, tokens: torch.Tensor, slot: int
    ) -> torch.Tensor:
        """Logits [N, V] that a slot draws from.

        Args:
            logits: [N, V] the slot's, from the target's head.
            hidden: [N, block, H] the block's states.
            tokens: [N, block] the tokens from the anchor on; those at or after the slot's own
                prediction have no influence.
            slot: the slot in the block.
        """
        return logits

    # The layers

    def _context(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple]:
        """Rotated keys, and values, of features [B, n, F] for every layer: [B, n, heads, dim]."""
        states = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        tables = self._tables(states, positions)
        return [self._keys_values(layer, states, tables) for layer in self.layers]

    def _tables(self, states: torch.Tensor, positions: torch.Tensor) -> tuple:
        return tuple(table.unsqueeze(2) for table in self._rotary(states, positions))

    def _keys_values(self, layer: _Layer, states: torch.Tensor, tables: tuple) -> tuple:
        dim, attention = self.config.head_dim, layer.self_attn
        keys = attention.k_norm(attention.k_proj(states).unflatten(-1, (-1, dim)))
        return rotate(keys, *tables), attention.v_proj(states).unflatten(-1, (-1, dim))

    def _blocks(
        self,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        context: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """States [B, S, block, H] of blocks after the final norm.

        Args:
            anchors: [B, S] anchor tokens.
            positions: [B, S] their positions.
            context: keys and values [B, L, heads, dim] of every layer, slot = position.
        """
        batch, count = anchors.shape
        size, target = self.block_size, self._target[0]
        offsets = torch.arange(size, device=anchors.device)
        tokens = torch.full((batch, count, size), self.mask_token, device=anchors.device)
        tokens[..., 0] = anchors
        embedded = target.embed(tokens.flatten(1))
        hidden = embedded.to(self.fc.weight.dtype)
        slots = (positions[..., None] + offsets).flatten(1)
        tables = self._tables(hidden, slots)
        # Query [B, S * block]: its block, its offset, its anchor's position.
        block = torch.arange(count, device=anchors.device).repeat_interleave(size)
        offset = offsets.repeat(count)
        anchor = positions.repeat_interleave(size, dim=1)
        before = torch.arange(context[0][0].shape[1], device=anchors.device)
        for layer, window, (keys, values) in zip(self.layers, self._windows, context, strict=True):
            seen = before < anchor[..., None]
            own = (block[:, None] == block).expand(batch, -1, -1)
            if window is not None:
                first = anchor + offset - (window - 1)
                seen = seen & (before >= first[..., None])
                own = own & (offset <= offset[:, None])
            attention = layer.self_attn
            states = layer.input_layernorm(hidden)
            query = attention.q_proj(states).unflatten(-1, (-1, self.config.head_dim))
            query = rotate(attention.q_norm(query), *tables)
            own_keys, own_values = self._keys_values(layer, states, tables)
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                torch.cat([keys, own_keys], dim=1).transpose(1, 2),
                torch.cat([values, own_values], dim=1).transpose(1, 2),
                attn_mask=torch.cat([seen, own], dim=-1)[:, None],
                enable_gqa=True,
            )
            hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(-2))
            inner = layer.post_attention_layernorm(hidden)
            gated = self._activation(layer.mlp["gate_proj"](inner)) * layer.mlp["up_proj"](inner)
            hidden = hidden + layer.mlp["down_proj"](gated)
        return self.norm(hidden).unflatten(1, (count, size))

    def _logits(self, hidden: torch.Tensor, tokens: torch.Tensor, slot: int) -> torch.Tensor:
        """Logits [N, V] of a slot; `_corrected` explains the arguments."""
        base = self._target[0].lent_logits(hidden[:, slot])
        logits = self._corrected(base, hidden, tokens, slot)
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
        for cached, fresh in zip(self._cache, self._context(features, positions), strict=True):
            for cache, states in zip(cached, fresh, strict=True):
                cache[rows, slots] = states
        self._anchor, last = last_valid(valid, tokens, positions)
        self._position = last + 1

    def propose(
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        length = int(self._position.max())
        context = [tuple(states[:, :length] for states in layer) for layer in self._cache]
        hidden = self._blocks(self._anchor, self._position, context)[:, 0]
        tokens = self._anchor.repeat(1, self.block_size + 1)
        logits = []
        for head in range(heads):
            logits.append(self._logits(hidden, tokens[:, :-1], self.first_slot + head))
            tokens[:, head + 1] = choose(logits[-1], temperature, greedy, generator)
        drafted = tokens[:, 1 : heads + 1]
        return Proposal(drafted, drafted, torch.stack(logits, dim=1))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows only."""
        self._cache = [tuple(states[rows] for states in layer) for layer in self._cache]
        self._anchor, self._position = self._anchor[rows], self._position[rows]

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at all chain starts; see `Draft.teacher_forced`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        context = self._context(features, positions)
        blocks, chains = [], []
        for row in range(len(tokens)):
            own = [tuple(states[row : row + 1] for states in layer) for layer in context]
            for anchors in (starts[row].nonzero().squeeze(1) + 1).split(_BLOCKS):
                blocks.append(self._blocks(tokens[row][anchors][None], anchors[None], own)[0])
                offsets = torch.arange(self.block_size, device=tokens.device)
                # What lies beyond the sequence is beyond every head that is asked for.
                index = (anchors[:, None] + offsets).clamp(max=tokens.shape[1] - 1)
                chains.append(tokens[row][index])
        if not blocks:
            size = self._target[0].vocab_size
            yield from (features.new_zeros(0, size) for _ in range(heads))
            return
        hidden, chain = torch.cat(blocks), torch.cat(chains)
        for head in range(heads):
            yield self._logits(hidden, chain, self.first_slot + head)


class DominoDraft(DFlashDraft):
    """Domino: a GRU over the drafted tokens corrects the logits of all but the first slots."""

    algorithm = "domino"

    def _init_head(self, options: dict) -> None:
        self.first_slot = 0 if options.get("shift_label") else 1
        self._suffix = self.first_slot + int(options.get("pure_draft_prefix_len", 0))
        size, states = self.config.hidden_size, int(options["gru_hidden_dim"])
        self.prefix_gru = nn.GRU(size, states, batch_first=True, bias=False)
        self.embed_proj = nn.Sequential(
            nn.Linear(size + states, int(options["emb_dim"]), bias=False),
            nn.SiLU(),
            nn.Linear(int(options["emb_dim"]), self.config.vocab_size, bias=False),
        )

    def _corrected(
        self, logits: torch.Tensor, hidden: torch.Tensor, tokens: torch.Tensor, slot: int
    ) -> torch.Tensor:
        if slot < self._suffix:
            return logits
        # The tokens before the one that the slot predicts.
        known = tokens[:, : slot + 1 - self.first_slot]
        embedded = self._target[0].embed(known).to(hidden.dtype)
        _, state = self.prefix_gru(embedded)
        return logits + self.embed_proj(torch.cat([hidden[:, slot], state[0]], dim=-1))


class DSparkDraft(DFlashDraft):
    """DSpark: a Markov head corrects every slot's logits by the token before its own."""

    algorithm = "dspark"
    first_slot = 0

    def _init_head(self, options: dict) -> None:
        rank, size = int(options.get("markov_rank") or 0), self.config.hidden_size
        self._kind = str(options.get("markov_head_type", "vanilla")).lower() if rank else None
        if not rank:
            return
        head = {
            "markov_w1": nn.Embedding(self.config.vocab_size, rank),
            "markov_w2": nn.Linear(rank, self.config.vocab_size, bias=False),
        }
        if self._kind == "gated":
            head["gate_proj"] = nn.Linear(size + rank, rank)
        elif self._kind == "rnn":
            head["joint_proj"] = nn.Linear(2 * rank + size, 3 * rank)
        self.markov_head = nn.ModuleDict(head)

    def _corrected(
        self, logits: torch.Tensor, hidden: torch.Tensor, tokens: torch.Tensor, slot: int
    ) -> torch.Tensor:
        if self._kind is None:
            return logits
        head = self.markov_head
        latent = head["markov_w1"](tokens[:, slot])
        if self._kind == "gated":
            inputs = torch.cat([hidden[:, slot], latent], dim=-1)
            latent = torch.sigmoid(head["gate_proj"](inputs)) * latent
        elif self._kind == "rnn":
            state = torch.zeros_like(latent)
            for step in range(slot + 1):
                before = head["markov_w1"](tokens[:, step])
                inputs = torch.cat([state, before, hidden[:, step]], dim=-1)
                gate, candidate, output = head["joint_proj"](inputs).chunk(3, dim=-1)
                gate = torch.sigmoid(gate)
                state = gate * state + (1 - gate) * torch.tanh(candidate)
            latent = torch.tanh(output)
        return logits + head["markov_w2"](latent)


_CLASSES = {
    "DFlashDraftModel": DFlashDraft,
    "DominoDraftModel": DominoDraft,
    "DSparkDraftModel": DSparkDraft,
}


def load_dflash(
    path: Path, config: dict, target: Target, layers: tuple[int, ...] | None
) -> DFlashDraft:
    """Build a draft of the DFlash family from ``specforge export --to hf``; see `load_draft`."""
    from transformers import Qwen3Config

    file = path / "config.json"
    options = config.get("dflash_config") or {}
    for name in ("target_layer_ids", "mask_token_id"):
        if options.get(name) is None:
            raise DraftError(f"{file}: dflash_config.{name} is missing; export again")
    if layers is not None and layers != tuple(options["target_layer_ids"]):
        raise DraftError(
            f"draft {path}: --aux-layers {list(layers)} are not its target layers "
            f"{options['target_layer_ids']}; leave the option out"
        )
    parsed = Qwen3Config.from_dict(config)
    if parsed.vocab_size != target.vocab_size:
        raise DraftError(
            f"{file}: vocab_size {parsed.vocab_size}, but the target's LM head has "
            f"{target.vocab_size} rows; give the target the draft was trained for"
        )
    if max(options["target_layer_ids"]) >= target.num_layers:
        raise DraftError(
            f"draft {path}: target layers {options['target_layer_ids']} do not fit a target of "
            f"{target.num_layers} layers; give the target the draft was trained for"
        )
    draft = _CLASSES[config["architectures"][0]](parsed, target)
    # DSpark's confidence head decides how much to draft; it has no part in what is drafted.
    tensors = {
        name: value
        for name, value in read_weights(path).items()
        if not name.startswith("confidence_head.")
    }
    try:
        draft.load_state_dict(tensors)
    except RuntimeError as error:
        raise DraftError(
            f"draft {path}: config.json and safetensors disagree ({error}); export again"
        ) from error
    return target.place(draft)
