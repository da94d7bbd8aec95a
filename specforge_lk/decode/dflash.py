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
from typing import Any, ClassVar, Self

import torch
from torch import nn

from specforge_lk.decode.base import CachedDraft, KeysValues
from specforge_lk.decode.checkpoint import DraftError, fill, read_weights, require_sizes
from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.draft_config import (
    are_distinct,
    listed_layers,
    parse_config,
    require_positive,
    require_token,
    section,
)
from specforge_lk.decode.layers import DecoderLayer, Rotary, attend, rotary_tables
from specforge_lk.decode.sampling import choose
from specforge_lk.decode.target import Target
from specforge_lk.drafts.modules import Stack
from specforge_lk.serving import Sampling

#: Chain starts whose blocks are computed at once in teacher forcing.
_BLOCKS = 32


class DFlashDraft(CachedDraft):
    """A DFlash draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Only verified positions are cached.

    Args:
        config: a transformers Qwen3Config with ``block_size`` and ``dflash_config``.
        target: lends its embeddings and its LM head.
    """

    algorithm = "dflash"
    #: First slot that predicts a token.
    first_slot = 1
    #: Sizes in ``dflash_config``.
    sizes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, target: Target) -> None:
        options = config.dflash_config
        super().__init__(config, config.num_hidden_layers, tuple(options["target_layer_ids"]))
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        size, eps = config.hidden_size, config.rms_norm_eps
        bias = bool(config.attention_bias)
        self.block_size = int(config.block_size)
        self.mask_token = int(options["mask_token_id"])
        self.layers: Stack[DecoderLayer] = Stack(
            DecoderLayer(config, bias=bias, norms=True) for _ in range(config.num_hidden_layers)
        )
        self.fc = nn.Linear(len(self.capture_layers) * size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.norm = nn.RMSNorm(size, eps)
        self._rotary = Qwen3RotaryEmbedding(config)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers)
        self._windows = [
            config.sliding_window if kind == "sliding_attention" else None for kind in kinds
        ]
        # In a tuple, so that nn.Module does not register the target as a submodule.
        self._target = (target,)
        self._init_head(options)
        # The slots of a block that predict.
        self.max_heads = self.block_size - self.first_slot

    @classmethod
    def load(
        cls, path: Path, config: dict[str, Any], target: Target, layers: tuple[int, ...] | None
    ) -> Self:
        """Load a draft from ``specforge export --to hf``; see `load_draft`."""
        from transformers import Qwen3Config

        file = path / "config.json"
        options = section(file, config, "dflash_config")
        for name in ("target_layer_ids", "mask_token_id", *cls.sizes):
            if options.get(name) is None:
                raise DraftError(f"{file}: dflash_config.{name} is missing; export again")
        captured = listed_layers(file, options, "target_layer_ids") or []
        if layers is not None and layers != tuple(captured):
            raise DraftError(
                f"draft {path}: --aux-layers {list(layers)} are not its target layers "
                f"{captured}; leave the option out"
            )
        parsed = parse_config(file, Qwen3Config, config)
        require_positive(file, {name: options[name] for name in cls.sizes})
        require_positive(file, {"block_size": config.get("block_size")})
        if "sliding_attention" in (parsed.layer_types or ()) and not parsed.sliding_window:
            raise DraftError(
                f"{file}: layer_types has sliding_attention, but there is no sliding_window; set "
                "it, with use_sliding_window, or export again"
            )
        sizes = {"vocab_size": parsed.vocab_size, "hidden_size": parsed.hidden_size}
        require_sizes(path, sizes, target)
        mask, size = options["mask_token_id"], target.vocab_size
        require_token(file, "dflash_config.mask_token_id", mask, size)
        if not are_distinct(captured, target.num_layers):
            raise DraftError(
                f"draft {path}: target layers {captured} are not different ones of a target of "
                f"{target.num_layers} layers; give the target the draft was trained for"
            )
        # DSpark's confidence head decides how much to draft; it has no part in what is drafted.
        tensors = {
            name: value
            for name, value in read_weights(path).items()
            if not name.startswith("confidence_head.")
        }
        return fill(cls(parsed, target), tensors, path, target)

    def _init_head(self, options: dict[str, Any]) -> None:
        """Add what an algorithm corrects its logits with."""

    def _corrected(
        self, logits: torch.Tensor, hidden: torch.Tensor, tokens: torch.Tensor, slot: int
    ) -> torch.Tensor:
        """Return the logits [N, V] that a slot draws from.

        Args:
            logits: [N, V] the slot's, from the target's LM head.
            hidden: [N, block, H] the block's states.
            tokens: [N, block] the tokens from the anchor on; those at or after the slot's own
                prediction have no influence.
            slot: the slot in the block.
        """
        return logits

    # The layers

    def _context(self, features: torch.Tensor, positions: torch.Tensor) -> list[KeysValues]:
        """Return keys and values [B, n, kv_heads, dim] of features [B, n, F] for every layer."""
        states = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        tables: Rotary = rotary_tables(self._rotary, states, positions)
        return [layer.self_attn.keys_values(states, tables) for layer in self.layers]

    def _blocks(
        self, anchors: torch.Tensor, positions: torch.Tensor, context: list[KeysValues]
    ) -> torch.Tensor:
        """Return the states [B, S, block, H] of blocks after the final norm.

        Args:
            anchors: [B, S] anchor tokens.
            positions: [B, S] their positions.
            context: keys and values [B, L, kv_heads, dim] of every layer, slot = position.
        """
        batch, count = anchors.shape
        size, target = self.block_size, self._target[0]
        offsets = torch.arange(size, device=anchors.device)
        tokens = torch.full((batch, count, size), self.mask_token, device=anchors.device)
        tokens[..., 0] = anchors
        embedded = target.embed(tokens.flatten(1))
        hidden = embedded.to(self.fc.weight.dtype)
        slots = (positions[..., None] + offsets).flatten(1)
        tables = rotary_tables(self._rotary, hidden, slots)
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
            inputs, residual = layer.read(hidden, embedded)
            own_keys, own_values = layer.self_attn.keys_values(inputs, tables)
            attended = attend(
                layer.self_attn.queries(inputs, tables),
                torch.cat([keys, own_keys], dim=1),
                torch.cat([values, own_values], dim=1),
                torch.cat([seen, own], dim=-1),
            )
            hidden = layer.finish(residual, attended)
        return self.norm(hidden).unflatten(1, (count, size))

    def _logits(self, hidden: torch.Tensor, tokens: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the logits [N, V] of a slot; `_corrected` explains the arguments."""
        base = self._target[0].lent_logits(hidden[:, slot])
        return self._checked(self._corrected(base, hidden, tokens, slot))

    # Decoding

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        for layer, states in enumerate(self._context(features, positions)):
            self._write(layer, states, positions, valid)
        # The token after the last position is the anchor.
        self._start_chain(valid, tokens, positions + 1)

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        anchor, position = self._chain
        hidden = self._blocks(anchor, position, self._read(int(position.max())))[:, 0]
        tokens = anchor.repeat(1, self.block_size + 1)
        logits: list[torch.Tensor] = []
        for step in range(heads):
            logits.append(self._logits(hidden, tokens[:, :-1], self.first_slot + step))
            tokens[:, step + 1] = choose(logits[-1], sampling, generator)
        drafted = tokens[:, 1 : heads + 1]
        return Proposal(drafted, drafted, torch.stack(logits, dim=1))

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at all chain starts; see `Draft.teacher_forced`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        context = self._context(features, positions)
        blocks, chains = [], []
        for row in range(len(tokens)):
            own = [(keys[row : row + 1], values[row : row + 1]) for keys, values in context]
            for anchors in (starts[row].nonzero().squeeze(1) + 1).split(_BLOCKS):
                blocks.append(self._blocks(tokens[row][anchors][None], anchors[None], own)[0])
                offsets = torch.arange(self.block_size, device=tokens.device)
                # What lies beyond the sequence is beyond every draft position that is asked for.
                index = (anchors[:, None] + offsets).clamp(max=tokens.shape[1] - 1)
                chains.append(tokens[row][index])
        if not blocks:
            size = self._target[0].vocab_size
            yield from (features.new_zeros(0, size) for _ in range(heads))
            return
        hidden, chain = torch.cat(blocks), torch.cat(chains)
        for step in range(heads):
            yield self._logits(hidden, chain, self.first_slot + step)


class DominoDraft(DFlashDraft):
    """Domino: a GRU over the drafted tokens corrects the logits of all but the first slots."""

    algorithm = "domino"
    sizes = ("gru_hidden_dim", "emb_dim")

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
            state = output = torch.zeros_like(latent)
            for step in range(slot + 1):
                before = head["markov_w1"](tokens[:, step])
                inputs = torch.cat([state, before, hidden[:, step]], dim=-1)
                gate, candidate, output = head["joint_proj"](inputs).chunk(3, dim=-1)
                gate = torch.sigmoid(gate)
                state = gate * state + (1 - gate) * torch.tanh(candidate)
            latent = torch.tanh(output)
        return logits + head["markov_w2"](latent)
