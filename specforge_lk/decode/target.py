"""A Hugging Face causal language model as the target of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from specforge_lk.decode.sampling import check_finite

_Module = TypeVar("_Module", bound=nn.Module)

_FULL, _SLIDING = "full_attention", "sliding_attention"
_LONGEST_PROBE = 1024
_REMEDY = "check that the target's weights are complete, and load it with --dtype float32"


@dataclass(frozen=True)
class TargetOutput:
    """States of one target forward.

    Attributes:
        hidden: [B, n, H] last hidden state, after the final norm: what the LM head reads.
        features: [B, n, len(layers) * H] outputs of the captured decoder layers, concatenated.
    """

    hidden: torch.Tensor
    features: torch.Tensor


class Target:
    """Decoder, LM head and tokenizer of a Hugging Face target, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device = self.head.weight.device
        config = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := kinds - {_FULL, _SLIDING}:
            raise ValueError(
                f"target layer_types {sorted(unknown)}: only full and sliding attention can be "
                "evaluated with transformers here; measure this target's drafts in a serving engine"
            )
        window = getattr(config, "sliding_window", None)
        # Without types, as Mistral and Phi-3, all layers have the window if there is one.
        self._window = int(window) if window and (not kinds or _SLIDING in kinds) else None
        self._mask_by_kind = bool(kinds)
        self._check()

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype = torch.float32, device: str | None = None
    ) -> Target:
        """Load a target and its tokenizer from a directory or a hub id."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # A hub id is one "organisation/name"; anything else is meant as a path on this machine.
        if not Path(path).exists() and len(Path(path).parts) != 2:
            raise FileNotFoundError(
                f"target {path!r} does not exist; give the directory of a Hugging Face model"
            )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return cls(model.to(device or "cpu"), AutoTokenizer.from_pretrained(path))

    @torch.inference_mode()
    def _check(self) -> None:
        """Refuse targets whose decoding this module would get wrong."""
        # Longer than a window, whose masks are this module's own; of long ones just their form.
        length = 4 + min(self._window or 0, _LONGEST_PROBE)
        probe = torch.arange(length, device=self.device)[None] % self.vocab_size
        ones = torch.ones_like(probe, dtype=torch.bool)
        logits = self.model(input_ids=probe).logits
        check_finite(logits, "the target", _REMEDY)
        ours = self.head(self.forward(probe, ones).hidden)
        if not torch.allclose(ours, logits, rtol=1e-2, atol=1e-2):
            raise ValueError(
                "the target's logits are not its LM head applied to the last hidden state "
                "(soft-capped or scaled logits), or its attention is not that of its config; "
                "measure this target's drafts in a serving engine"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head, padding included."""
        return int(self.head.weight.shape[0])

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a response: the generation config's, or else the tokenizer's."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in listed if i is not None)

    @property
    def max_positions(self) -> int:
        """Longest sequence the target was configured for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Any | None = None,
        layers: tuple[int, ...] = (),
    ) -> TargetOutput:
        """Run the decoder on [B, n] tokens, without the LM head.

        Args:
            input_ids: [B, n].
            mask: [B, cached + n] bool, slots that may be attended.
            positions: [B, n] position of every token.
            cache: a transformers cache to read and extend.
            layers: decoder layers to capture; layer k is HF ``hidden_states[k + 1]``, so the last
                one is captured after the final norm, as in SpecForge.
        """
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=None if mask is None else self._attended(mask, input_ids.shape[1]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=bool(layers),
        )
        hidden = output.last_hidden_state
        captured = [output.hidden_states[layer + 1] for layer in layers]
        return TargetOutput(hidden, torch.cat(captured, -1) if captured else hidden[..., :0])

    def place(self, draft: _Module) -> _Module:
        """Put a draft on the target's device, its parameters in the target's dtype.

        Buffers keep theirs: rotary frequencies in bfloat16 are those of other positions.
        """
        for parameter in draft.parameters():
            parameter.data = parameter.data.to(self.head.weight.dtype)
        return draft.eval().to(self.device)

    def _attended(self, mask: torch.Tensor, count: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask of ``count`` new tokens in the form that the decoder takes.

        transformers counts a sliding window in slots of the cache. Between them there are slots of
        rejected tokens here, so where there are windows they are counted in positions.
        """
        if self._window is None:
            return mask.long()
        held = mask.cumsum(1, dtype=torch.int32) - 1  # position of the token in every slot
        slots = torch.arange(mask.shape[1], device=mask.device)
        new = slots[-count:, None]
        visible = mask[:, None] & (slots <= new)
        near = held[:, -count:, None] - held[:, None] < self._window
        # A row without any key would be nan: padding sees itself.
        kinds = {_FULL: visible | (slots == new), _SLIDING: visible & near | (slots == new)}
        masks = {kind: self._as_attended(seen[:, None]) for kind, seen in kinds.items()}
        return masks if self._mask_by_kind else masks[_SLIDING]

    def _as_attended(self, visible: torch.Tensor) -> torch.Tensor:
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return visible
        dtype = self.head.weight.dtype
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """LM head in at least float32: [..., H] -> [..., V]; raises `NonFiniteLogits`."""
        logits = self.head(hidden)
        check_finite(logits, "the target", _REMEDY)
        return logits if logits.dtype == torch.float64 else logits.float()
