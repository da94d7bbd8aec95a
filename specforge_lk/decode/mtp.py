"""MTP modules in the layout of released checkpoints, with the target's own family as the layer.

At position t the module reads the embedding of token t + 1 beside a state of position t: the
target's last hidden state where the target has been (head 1), its own normalised output of the
previous step after that (heads 2..K).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specforge_lk.decode.draft import DraftError, Proposal, last_valid
from specforge_lk.decode.sampling import check_finite, choose
from specforge_lk.decode.target import Target
from specforge_lk.drafts.mtp_checkpoint import MTPConfig, decoder_config, read_module


class MTPDraft:
    """An MTP module; see `specforge_lk.decode.draft.Draft` for the interface.

    Its cache has a slot for every entry it was given, whichever row that is valid in; entries of
    drafted tokens are taken out again after the proposal.

    Args:
        decoder: a transformers decoder of one layer, with the target's embedding and the module's
            norm.
        head: the target's head.
        projection: W, [H, 2 H].
        norms: of the embedding and of the state.
        last_layer: the target's last layer, whose captured state is the one after the final norm.
    """

    algorithm = "mtp"
    max_heads = None
    draft_ids = None

    def __init__(
        self,
        decoder: Any,
        head: nn.Linear,
        projection: nn.Linear,
        norms: tuple[nn.Module, nn.Module],
        last_layer: int,
    ) -> None:
        self.capture_layers = (last_layer,)
        self._decoder = decoder
        self._head = head
        self._projection = projection
        self._norms = norms

    def _run(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        cache: Any,
    ) -> torch.Tensor:
        """Normalised output [B, n, H] of [B, n] entries that see ``visible`` [B, n, slots]."""
        embedded = self._decoder.embed_tokens(tokens)
        norm_e, norm_h = self._norms
        states = states.to(embedded.dtype)
        output = self._decoder(
            inputs_embeds=self._projection(torch.cat([norm_e(embedded), norm_h(states)], dim=-1)),
            attention_mask=visible[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._head(states)
        check_finite(
            logits, "the draft", "its training diverged or its file is damaged: use another one"
        )
        return logits if logits.dtype == torch.float64 else logits.float()

    # Decoding

    def start(self, batch: int, capacity: int) -> None:
        """An empty cache; see `Draft.start`."""
        from transformers import DynamicCache

        self._cache = DynamicCache()
        device = self._projection.weight.device
        #: Position of every slot, beyond all others where the slot holds nothing.
        self._slots = torch.zeros(batch, 0, dtype=torch.long, device=device)

    def _extend(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """Run the module on [B, n] new slots."""
        nowhere = torch.iinfo(torch.long).max
        self._slots = torch.cat([self._slots, torch.where(valid, positions, nowhere)], dim=1)
        visible = self._slots[:, None] <= positions[..., None]
        # An invalid entry would see nothing, which is nan: it sees itself.
        own = torch.arange(tokens.shape[1], device=tokens.device)
        visible[:, own, own - tokens.shape[1]] = True
        return self._run(tokens, states, positions, visible, self._cache)

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        output = self._extend(tokens, features, positions, valid)
        self._state, self._position = last_valid(valid, output, positions)

    def propose(
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        verified = self._slots.shape[1]
        state, tokens, logits = self._state, [], []
        for head in range(heads):
            if head:
                position = self._position + head
                valid = torch.ones_like(position, dtype=torch.bool)
                state = self._extend(tokens[-1], state, position, valid)
            logits.append(self._logits(state))
            tokens.append(choose(logits[-1], temperature, greedy, generator))
        self._cache.crop(verified)
        self._slots = self._slots[:, :verified]
        chosen = torch.cat(tokens, dim=1)
        return Proposal(chosen, chosen, torch.cat(logits, dim=1))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows only."""
        self._cache.batch_select_indices(rows)
        self._slots = self._slots[rows]
        self._state, self._position = self._state[rows], self._position[rows]

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at all chain starts; see `Draft.teacher_forced`.

        At step i every position t is a chain of its own: it sees the first-step slots 0..t and the
        i slots that its chain has added.
        """
        from transformers import DynamicCache

        batch, length = tokens.shape
        index = torch.arange(length, device=tokens.device)
        positions = index.expand(batch, length)
        seen = [index[None] <= index[:, None]]
        cache, states = DynamicCache(), features
        for step in range(heads):
            visible = torch.cat(seen, dim=-1).expand(batch, -1, -1)
            # Token t + 1 + step; what is rolled in from the front is beyond every chain start.
            inputs = tokens.roll(-1 - step, dims=1)
            states = self._run(inputs, states, positions + step, visible, cache)
            seen.append(index[None] == index[:, None])
            yield self._logits(states[starts])


def load_mtp(path: Path, config: dict, target: Target, layers: tuple[int, ...] | None) -> MTPDraft:
    """Build an MTP draft from its module's tensors, which may stand among the target's.

    An exported draft has nothing else; the folder of a target that was released with a module has
    everything. What the module lacks of embedding and head is the target's. See `load_draft`.
    """
    from transformers import AutoModel

    file = path / "config.json"
    if layers is not None:
        raise DraftError(
            f"draft {path}: mtp reads the target's last hidden state; leave out --aux-layers"
        )
    try:
        parsed = MTPConfig.from_dict(config)
    except ValueError as error:
        raise DraftError(f"{file}: {error}") from error
    head = target.head.weight
    for name, wanted in zip(("vocab_size", "hidden_size"), head.shape, strict=True):
        if getattr(parsed, name, None) != wanted:
            raise DraftError(
                f"{file}: {name} {getattr(parsed, name, None)}, but the target's is {wanted}; give "
                "the target the draft was trained for"
            )
    prefix = f"model.layers.{parsed.num_hidden_layers}."
    try:
        weights = read_module(path, prefix)
    except ValueError as error:
        raise DraftError(f"draft {error}") from error
    own = {
        name: weights.pop(name, None)
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    if missing := [prefix + name for name, value in own.items() if value is None]:
        raise DraftError(
            f"draft {path}: {', '.join(missing)} missing; this is no checkpoint with an MTP module"
        )
    embedding = weights.pop("embed_tokens.weight", target.model.get_input_embeddings().weight)
    unembedding = weights.pop("shared_head.head.weight", head)
    state = {f"layers.0.{name}": value for name, value in weights.items()}
    state |= {"embed_tokens.weight": embedding, "norm.weight": own["shared_head.norm.weight"]}
    dtype, disagree = head.dtype, f"draft {path}: config.json and safetensors disagree"
    try:
        decoder, found = type(AutoModel.from_config(decoder_config(parsed))).from_pretrained(
            None,
            config=decoder_config(parsed),
            state_dict={name: value.detach() for name, value in state.items()},
            dtype=dtype,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise DraftError(f"{disagree} ({error})") from error
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise DraftError(f"{disagree} ({wrong})")
    norms = []
    for name in ("enorm.weight", "hnorm.weight"):
        norm = type(decoder.norm)(parsed.hidden_size, parsed.rms_norm_eps)
        norm.weight = nn.Parameter(own[name])
        norms.append(norm.to(device=target.device, dtype=dtype))
    return MTPDraft(
        decoder.eval().to(target.device),
        _linear(unembedding, target),
        _linear(own["eh_proj.weight"], target),
        tuple(norms),
        target.num_layers - 1,
    )


def _linear(weight: torch.Tensor, target: Target) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    weight = weight.detach().to(device=target.device, dtype=target.head.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
