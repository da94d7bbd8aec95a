"""A Hugging Face causal language model as the target of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from specforge_lk.decode.sampling import check_finite

_Module = TypeVar("_Module", bound=nn.Module)

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
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
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
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"target layer_types {sorted(kinds)}: only full attention can be evaluated with "
                "transformers here; measure this target's drafts in a serving engine"
            )
        probe = torch.arange(4, device=self.device)[None]
        logits = self.model(input_ids=probe).logits
        check_finite(logits, "the target", _REMEDY)
        if not torch.allclose(self.head(self.forward(probe).hidden), logits, rtol=1e-2, atol=1e-2):
            raise ValueError(
                "the target's logits are not its LM head applied to the last hidden state "
                "(soft-capped or scaled logits); measure this target's drafts in a serving engine"
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
            attention_mask=None if mask is None else mask.long(),
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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """LM head in at least float32: [..., H] -> [..., V]; raises `NonFiniteLogits`."""
        logits = self.head(hidden)
        check_finite(logits, "the target", _REMEDY)
        return logits if logits.dtype == torch.float64 else logits.float()
