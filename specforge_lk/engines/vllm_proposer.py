"""MEDUSA heads and MLP speculators in vLLM, as a proposer of its method ``custom_class``.

    speculative_config={
        "method": "custom_class",
        "model": "specforge_lk.engines.vllm_proposer.LastStateProposer",
        "num_speculative_tokens": 4,
    },
    additional_config={"specforge_lk": {"draft": "DIR"}},

vLLM imports the class by its path, shows it the target once, and asks it for drafts after every
step; it verifies them as those of a greedy draft. It passes token ids only, while these drafts read
the target's last hidden state. A forward hook on the target keeps that. Nothing of vLLM is
replaced. vLLM calls the interface experimental: this is written for 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from specforge_lk.decode.checkpoint import DraftError, read_config
from specforge_lk.decode.heads import LastStateDraft
from specforge_lk.drafts.modules import float32_buffers_kept
from specforge_lk.serving import Sampling

_Module = TypeVar("_Module", bound=nn.Module)
#: The key of ``additional_config``.
OPTIONS = "specforge_lk"


@dataclass(frozen=True)
class _Forward:
    """What the target's last forward was given and returned.

    Attributes:
        hidden: [n, H] last hidden states of all tokens of the batch, request after request.
        positions: [n] position of each token in its request.
        layers: attention metadata of every layer.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    layers: Mapping[str, Any]

    def rows(self, requests: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
        """Return the rows [n] of ``hidden`` that belong to positions of requests.

        Args:
            requests: [n] places of requests in the batch.
            positions: [n] a position of each.
            count: requests of the batch, B.

        Raises:
            RuntimeError: they cannot be told, or are not among the tokens of this forward.
        """
        starts, first = self._starts(count).cpu(), self.positions
        if first.dim() == 1:
            begin, end = starts[requests], starts[requests + 1]
            rows = begin + positions - first[begin.to(first.device)].cpu()
            if ((rows >= begin) & (rows < end)).all():
                return rows.to(self.hidden.device)
        raise RuntimeError(
            "vLLM's positions are not those of its requests' last tokens; this proposer is "
            "written for vLLM 0.32 and 0.33, and for targets with one position per token"
        )

    def _starts(self, requests: int) -> torch.Tensor:
        """Return where the tokens of each request begin, and where the last ones end [B + 1].

        Raises:
            RuntimeError: the attention backend does not say.
        """
        for layer in self.layers.values():
            starts = getattr(layer, "query_start_loc", None)
            if starts is not None and len(starts) > requests:
                return starts[: requests + 1].long()
        kinds = ", ".join(sorted({type(layer).__name__ for layer in self.layers.values()}))
        raise RuntimeError(
            f"{kinds or 'no attention metadata'}: it has no query_start_loc, which says whose "
            "hidden states are whose; choose another attention backend, such as FLASH_ATTN"
        )


@dataclass(frozen=True)
class _Target:
    """vLLM's target, as far as a draft's files are read for it; see `TargetFacts`."""

    config: Any
    num_layers: int
    vocab_size: int
    hidden_size: int
    device: torch.device
    dtype: torch.dtype
    lm_head: Any

    def lm_head_weight(self) -> torch.Tensor:
        """Return the LM head [V, H], without the rows that vLLM pads it with.

        Raises:
            DraftError: it is sharded or quantized.
        """
        weight = getattr(self.lm_head, "weight", None)
        shape = (self.vocab_size, self.hidden_size)
        if weight is None or weight.shape[0] < shape[0] or weight.shape[1:] != shape[1:]:
            raise DraftError(
                "the draft has the target's LM head (original_lm_head), and vLLM's is sharded or "
                "quantized; serve it without tensor parallelism, or train LM heads of its own"
            )
        return weight.detach()[: self.vocab_size].to(self.dtype)

    def place(self, draft: _Module) -> _Module:
        with float32_buffers_kept(draft):
            return draft.eval().to(device=self.device, dtype=self.dtype)


class LastStateProposer:
    """Drafts greedily with MEDUSA heads or an MLP speculator, for vLLM's method ``custom_class``.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        ValueError: the draft is not named or not one of these, or vLLM would replay the target
            without calling it.
    """

    def __init__(self, vllm_config: Any) -> None:
        options = (vllm_config.additional_config or {}).get(OPTIONS)
        if not isinstance(options, Mapping) or not options.get("draft"):
            raise ValueError(
                f'additional_config has no draft: give {{"{OPTIONS}": {{"draft": DIR}}}}, where '
                "DIR is an exported draft"
            )
        graphs = vllm_config.compilation_config.cudagraph_mode
        if graphs is not None and graphs.has_full_cudagraphs():
            raise ValueError(
                f"cudagraph_mode {graphs.name}: the target's hidden states cannot be read from a "
                "full CUDA graph; give compilation_config={'cudagraph_mode': 'PIECEWISE'}"
            )
        self._path = Path(options["draft"])
        self._model = vllm_config.model_config
        self._heads = int(vllm_config.speculative_config.num_speculative_tokens)
        self._forward: _Forward | None = None

    def load_model(self, target: nn.Module) -> None:
        """Load the draft beside the target, and keep what the target returns from now on.

        Raises:
            DraftError: the folder is incomplete, or does not fit itself, the target or the number
                of drafted tokens.
        """
        config, kind = read_config(self._path)
        decoder = kind.decoder()
        if not issubclass(decoder, LastStateDraft):
            raise DraftError(
                f"draft {self._path}: {kind.title}; this proposer serves MEDUSA heads and MLP "
                "speculators, vLLM has methods of its own for others"
            )
        facts = _Target(
            config=self._model.hf_config,
            num_layers=int(self._model.hf_text_config.num_hidden_layers),
            vocab_size=self._model.get_vocab_size(),
            hidden_size=self._model.get_hidden_size(),
            device=next(target.parameters()).device,
            dtype=self._model.dtype,
            lm_head=getattr(target, "lm_head", None),
        )
        self._draft = decoder.load(self._path, config, facts, None)
        if self._draft.max_heads is not None and self._heads > self._draft.max_heads:
            raise DraftError(
                f"draft {self._path}: it has {self._draft.max_heads} draft positions; "
                f"num_speculative_tokens {self._heads} must be no more"
            )
        target.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, target: nn.Module, args: Any, given: Mapping[str, Any], output: Any) -> None:
        from vllm.forward_context import get_forward_context

        layers = get_forward_context().attn_metadata
        # Runs that only measure memory have no attention metadata. Two micro-batches have a list.
        usable = isinstance(layers, Mapping) and isinstance(output, torch.Tensor)
        self._forward = _Forward(output, given["positions"], layers) if usable else None

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft a chain for every request that has sampled a token.

        Args:
            sampled_token_ids: B times the tokens that the step has added to a request; none where
                its prompt is not through yet.
            num_tokens_no_spec: [B] tokens of each request, these included.
            token_ids_cpu: of no use here, as is ``slot_mappings``.

        Returns:
            B times K token ids, or none.

        Raises:
            RuntimeError: the hidden states that this step needs were not seen.
        """
        forward, self._forward = self._forward, None
        active = [i for i, tokens in enumerate(sampled_token_ids) if len(tokens)]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if not active:
            return drafts
        if forward is None:
            raise RuntimeError(
                "the target was run without being called, or in micro-batches: its hidden states "
                "are not known; switch off what replays or splits a step"
            )
        known = torch.tensor([int(num_tokens_no_spec[i]) for i in active])
        index = forward.rows(torch.tensor(active), known - 2, len(sampled_token_ids))
        features = forward.hidden[index][:, None]
        last = torch.tensor([[sampled_token_ids[i][-1]] for i in active], device=features.device)
        positions = known.to(features.device)[:, None] - 2
        self._draft.observe(last, features, positions, torch.ones_like(last).bool())
        proposal = self._draft.propose(self._heads, Sampling(0), None)
        for i, chain in zip(active, proposal.tokens.tolist(), strict=True):
            drafts[i] = chain
        return drafts


__all__ = ["LastStateProposer"]
