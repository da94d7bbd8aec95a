"""MTP modules in the layout of released checkpoints, with the target's own family as the layer.

At position t the module reads the embedding of token t + 1 beside a state of position t: the
target's last hidden state where the target has been (draft position 1), its own normalized output
of the previous step after that (draft positions 2..K).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from specforge_lk.decode.base import BaseDraft
from specforge_lk.decode.checkpoint import (
    DraftError,
    TargetFacts,
    check_tensors,
    damage_named,
    disagreement,
    refuse_layers,
    require_listed,
    require_sizes,
)
from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.draft_config import parse_config
from specforge_lk.decode.sampling import choose
from specforge_lk.decode.target import Target
from specforge_lk.drafts.mtp_checkpoint import MTPConfig, decoder_config, read_module
from specforge_lk.serving import Sampling

_OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")


class MTPDraft(BaseDraft):
    """An MTP module; see `specforge_lk.decode.draft.Draft` for the interface.

    Its cache has a slot for every entry it was given, whichever row that is valid in; entries of
    drafted tokens are taken out again after the proposal.

    Args:
        decoder: a transformers decoder of one layer, with the target's embedding and the module's
            norm.
        head: the target's LM head.
        projection: W, [H, 2 H].
        norms: of the embedding and of the state.
        last_layer: the target's last layer, whose captured state is the one after the final norm.
    """

    algorithm = "mtp"

    def __init__(
        self,
        decoder: Any,
        head: nn.Linear,
        projection: nn.Linear,
        norms: tuple[nn.Module, nn.Module],
        last_layer: int,
    ) -> None:
        super().__init__((last_layer,))
        self._decoder = decoder
        self._head = head
        self._projection = projection
        self._norm_e, self._norm_h = norms

    @classmethod
    def load(
        cls, path: Path, config: dict[str, Any], target: Target, layers: tuple[int, ...] | None
    ) -> Self:
        """Load an MTP draft from its module's tensors, which may stand among the target's.

        An exported draft has nothing else; the folder of a target that was released with a module
        has everything. What the module lacks of embedding and LM head is the target's. See
        `load_draft`.
        """
        refuse_layers(path, cls.algorithm, layers)
        parsed, weights = read_mtp(path, config, target)
        own = {name: weights.pop(name) for name in _OWN}
        embedding = weights.pop("embed_tokens.weight", target.model.get_input_embeddings().weight)
        lm_head = weights.pop("shared_head.head.weight", target.head.weight)
        state = {f"layers.0.{name}": value for name, value in weights.items()}
        state |= {"embed_tokens.weight": embedding, "norm.weight": own["shared_head.norm.weight"]}
        decoder = _decoder(path, parsed, state, target)
        norm_e, norm_h = (
            _norm(decoder, parsed, own[name], target) for name in ("enorm.weight", "hnorm.weight")
        )
        return cls(
            decoder,
            _linear(lm_head, target),
            _linear(own["eh_proj.weight"], target),
            (norm_e, norm_h),
            target.num_layers - 1,
        )

    def _run(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        cache: Any,
    ) -> torch.Tensor:
        """Return normalized output [B, n, H] of entries that see ``visible`` [B, n, slots]."""
        embedded = self._decoder.embed_tokens(tokens)
        states = states.to(embedded.dtype)
        mixed = torch.cat([self._norm_e(embedded), self._norm_h(states)], dim=-1)
        output = self._decoder(
            inputs_embeds=self._projection(mixed),
            attention_mask=visible[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    # Decoding

    def start(self, batch: int, capacity: int) -> None:
        """Make an empty cache; see `Draft.start`."""
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
        self._start_chain(valid, output, positions)

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        verified = self._slots.shape[1]
        state, position = self._chain
        tokens: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        for step in range(heads):
            if step:
                valid = torch.ones_like(position, dtype=torch.bool)
                state = self._extend(tokens[-1], state, position + step, valid)
            logits.append(self._checked(self._head(state)))
            tokens.append(choose(logits[-1], sampling, generator))
        self._cache.crop(verified)
        self._slots = self._slots[:, :verified]
        chosen = torch.cat(tokens, dim=1)
        return Proposal(chosen, chosen, torch.cat(logits, dim=1))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `Draft.keep_rows`."""
        super().keep_rows(rows)
        self._cache.batch_select_indices(rows)
        self._slots = self._slots[rows]

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at all chain starts; see `Draft.teacher_forced`.

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
            yield self._checked(self._head(states[starts]))


def read_mtp(
    path: Path, config: dict[str, Any], target: TargetFacts
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the family's config and the module's tensors, without what precedes their names.

    Raises:
        DraftError: there is no module, or one that does not fit the target.
    """
    parsed = parse_config(path / "config.json", MTPConfig, config)
    sizes = {name: getattr(parsed, name, None) for name in ("vocab_size", "hidden_size")}
    require_sizes(path, sizes, target)
    prefix = f"model.layers.{parsed.num_hidden_layers}."
    require_listed(path)
    with damage_named(path):
        weights = read_module(path, prefix)
    check_tensors(path, weights)
    if missing := [prefix + name for name in _OWN if name not in weights]:
        raise DraftError(
            f"draft {path}: {', '.join(missing)} missing; this is no checkpoint with an MTP "
            "module: give one that was released with it, or an export"
        )
    return parsed, weights


def _decoder(path: Path, config: Any, state: dict[str, torch.Tensor], target: Target) -> Any:
    """Return transformers' decoder of one layer with these tensors.

    Raises:
        DraftError: they are not those of the config's family.
    """
    from transformers import AutoModel

    single = decoder_config(config)
    try:
        decoder, found = type(AutoModel.from_config(single)).from_pretrained(
            None,
            config=decoder_config(config),
            state_dict={name: value.detach() for name, value in state.items()},
            dtype=target.head.weight.dtype,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise disagreement(path, error) from error
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise disagreement(path, wrong)
    return decoder.eval().to(target.device)


def _norm(decoder: Any, config: Any, weight: torch.Tensor, target: Target) -> nn.Module:
    norm: nn.Module = type(decoder.norm)(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(weight)
    return norm.to(device=target.device, dtype=target.head.weight.dtype)


def _linear(weight: torch.Tensor, target: Target) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    weight = weight.detach().to(device=target.device, dtype=target.head.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
