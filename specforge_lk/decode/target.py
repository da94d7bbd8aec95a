"""A Hugging Face causal language model as the target of speculative decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.data.conversations import Chat
from specforge_lk.decode.sampling import check_finite
from specforge_lk.drafts.modules import float32_buffers_kept
from specforge_lk.target import eos_ids, load_target

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
    """Decoder, LM head and tokenizer of a Hugging Face target, in evaluation mode.

    Logits are made by the model's own code from states of its decoder, so that they have whatever
    it does to them: scales, soft caps, biases, LM heads of several layers. Nothing here
    describes it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, chat_template_args: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat_template_args = dict(chat_template_args or {})
        _ = self.chat  # refuses arguments that the template does not read
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device = self.head.weight.device
        config = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        kinds = set(getattr(config, "layer_types", None) or ())
        known = kinds <= {_FULL, _SLIDING}
        window = getattr(config, "sliding_window", None)
        # Without types, as Mistral and Phi-3, all layers have the window if there is one.
        windowed = known and (not kinds or _SLIDING in kinds)
        self._window = int(window) if window and windowed else None
        self._mask_by_kind = bool(kinds)
        #: What the decoder returns, set by the check below.
        self._output: type = dict
        self._check()
        #: Whether its cache can leave out rejected tokens, as speculative decoding asks.
        self.rewinds = known and self._forgets()

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        trust_remote_code: bool = False,
        chat_template_args: Mapping[str, Any] | None = None,
    ) -> Target:
        """Load a target and its tokenizer from a folder or a hub id; see `load_target`."""
        name = str(dtype).removeprefix("torch.")
        loaded = load_target(path, name, device, trust_remote_code=trust_remote_code)
        return cls(*loaded, chat_template_args)

    @torch.inference_mode()
    def _check(self) -> None:
        """Refuse targets whose decoding this module would get wrong."""
        # Probe past the sliding window, whose masks we build; for very long windows check the
        # mask's form only.
        length = 4 + min(self._window or 0, _LONGEST_PROBE)
        probe = torch.arange(length, device=self.device)[None] % self.vocab_size
        ones = torch.ones_like(probe, dtype=torch.bool)
        seen: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            logits = self.model(input_ids=probe).logits
        finally:
            hook.remove()
        check_finite(logits, "the target", _REMEDY)
        states = getattr(seen[0], "last_hidden_state", None) if len(seen) == 1 else None
        if states is not None:
            self._output = type(seen[0])
        # The same arithmetic on the same states: equal but for the order of sums.
        if states is None or self._distance(self.head_logits(states), logits) > self._rounding(1):
            raise ValueError(
                f"{type(self.model).__name__} does not make its logits from its decoder's last "
                "hidden states alone; measure this target's drafts in a serving engine"
            )
        ours = self.forward(probe, ones).hidden
        if self._distance(ours, states) > self._rounding(self.num_layers):
            raise ValueError(
                "the target's attention is not that of its config; measure this target's drafts "
                "in a serving engine"
            )

    @torch.inference_mode()
    def _forgets(self) -> bool:
        """Return whether a token masked in the cache has no influence on those after it."""
        from transformers import DynamicCache

        tokens = torch.arange(6, device=self.device)[None] % self.vocab_size
        positions = torch.arange(6, device=self.device)[None]
        seen = torch.ones(1, 7, dtype=torch.bool, device=self.device)
        seen[0, 5] = False  # the slot of a rejected token, at the position of the one after it
        rejected = torch.cat([tokens[:, 4:5], tokens[:, :1]], dim=1)
        cache = DynamicCache()
        try:
            self.forward(tokens[:, :4], seen[:, :4], positions[:, :4], cache)
            self.forward(rejected, torch.ones_like(seen[:, :6]), positions[:, 4:6], cache)
            after = self.forward(tokens[:, 5:], seen, positions[:, 5:], cache).hidden
        except Exception:  # whatever a recurrent layer makes of a cache of keys and values
            return False
        plain = self.forward(tokens, torch.ones_like(tokens, dtype=torch.bool)).hidden
        return self._distance(after, plain[:, 5:]) <= self._rounding(self.num_layers)

    @staticmethod
    def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Return the largest relative difference of any position's vector."""
        gap = torch.linalg.vector_norm((ours - theirs).double(), dim=-1)
        size = torch.linalg.vector_norm(theirs.double(), dim=-1)
        # A padding token's state may be zero: no gap is none there, too.
        return float((gap / size.clamp(min=torch.finfo(size.dtype).tiny)).max())

    def _rounding(self, layers: int) -> float:
        """Return how far apart, relative to the result, two orders of the same sums may come.

        Layers round independently of one another, so their errors add up as squares do. In
        float32 that is far below what any other attention or LM head would change.
        """
        return max(4 * math.sqrt(layers) * torch.finfo(self.head.weight.dtype).eps, 1e-3)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head, padding included."""
        return int(self.head.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Columns of the LM head."""
        return int(self.head.weight.shape[1])

    @property
    def config(self) -> Any:
        """The model's Hugging Face config."""
        return self.model.config

    def lm_head_weight(self) -> torch.Tensor:
        """Return the LM head's weight [V, H], without gradient."""
        return self.head.weight.detach()

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        return eos_ids(self.model.generation_config, self.tokenizer)

    @property
    def chat(self) -> Chat:
        """Its chat template, and how conversations become tokens."""
        return Chat(self.tokenizer, self.eos_ids, self.chat_template_args)

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
        """Put a draft on the target's device, its parameters in the target's dtype."""
        with float32_buffers_kept(draft):
            return draft.eval().to(device=self.device, dtype=self.head.weight.dtype)

    def _attended(self, mask: torch.Tensor, count: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask of ``count`` new tokens in the form that the decoder takes.

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
        """Return the target's logits in at least float32: [..., H] -> [..., V].

        Raises:
            NonFiniteLogits: a logit is nan or infinite.
        """
        logits = self.head_logits(hidden)
        check_finite(logits, "the target", _REMEDY)
        return logits if logits.dtype == torch.float64 else logits.float()

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the model's logits of last hidden states in its dtype: [..., H] -> [..., V]."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        # Placeholder tokens: `_decoded` answers in the decoder's place.
        tokens = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        with self._decoded(rows):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits.view(*hidden.shape[:-1], -1)

    def lent_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a draft's logits of its own states by the target's LM head: [..., H] -> [..., V].

        This is the matrix alone, as engines lend it and SpecForge trains with it: a scale, cap or
        bias is part of the target's logits, not of a draft's.
        """
        return F.linear(hidden, self.head.weight)

    @contextmanager
    def _decoded(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let the decoder return these states without running."""

        def answer(*args: Any, **options: Any) -> Any:
            return self._output(last_hidden_state=hidden)

        own = vars(self.decoder).get("forward")
        self.decoder.forward = answer
        try:
            yield
        finally:
            del self.decoder.forward
            if own is not None:
                self.decoder.forward = own

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return rows of the embedding matrix, which is lent to drafts: [...] -> [..., H].

        This is the matrix alone, too: what a target scales its embeddings by (Gemma) is its own.
        """
        return F.embedding(tokens, self.model.get_input_embeddings().weight)
