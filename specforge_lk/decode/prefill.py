"""The target's states of prompts, which several drafts and temperatures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specforge_lk.decode.target import Target


@dataclass(frozen=True)
class Prefill:
    """The target's states of one batch of prompts, padded on the left to P tokens.

    Attributes:
        ids: [B, P] prompt tokens.
        mask: [B, P] bool, where they are.
        positions: [B, P].
        logits: [B, V] after the last token of every prompt.
        features: [B, P, H] by captured layer.
        states: keys and values by decoder layer.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    features: dict[int, torch.Tensor]
    states: list[tuple[torch.Tensor, torch.Tensor]]

    def cache(self) -> Any:
        """Return a transformers cache with the prompts; extending it leaves these states alone."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.states):
            cache.update(keys, values, layer)
        return cache

    def features_of(self, layers: tuple[int, ...]) -> torch.Tensor:
        """Return [B, P, len(layers) * H] for a draft that captures these layers."""
        return torch.cat([self.features[layer] for layer in layers], -1)

    @property
    def size(self) -> int:
        """Size in bytes of all tensors."""
        tensors = [self.logits, *self.features.values(), *(t for pair in self.states for t in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Prefills:
    """Prefills of batches, kept so that several drafts and temperatures share them.

    On a CPU the prompts take longer than the responses of a short benchmark.

    Args:
        target: the target model.
        layers: decoder layers to capture, for all drafts that will be asked about.
        limit: bytes to keep at most; what does not fit is computed anew each time.
    """

    def __init__(self, target: Target, layers: Iterable[int], limit: int = 1 << 30) -> None:
        self._target = target
        self._layers = tuple(sorted(set(layers)))
        self._left = limit
        self._kept: dict[tuple[tuple[int, ...], ...], Prefill] = {}

    def of(self, prompts: Sequence[Sequence[int]]) -> Prefill:
        """Return the prefill of a batch of prompts."""
        key = tuple(map(tuple, prompts))
        if key in self._kept:
            return self._kept[key]
        prefill = self._compute(prompts)
        if prefill.size <= self._left:
            self._left -= prefill.size
            self._kept[key] = prefill
        return prefill

    @torch.inference_mode()
    def _compute(self, prompts: Sequence[Sequence[int]]) -> Prefill:
        from transformers import DynamicCache

        target, longest = self._target, max(map(len, prompts))
        # Padded on the left, so that the last column is the last token of every prompt.
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=target.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=target.device)
            mask[row, longest - len(prompt) :] = True
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        output = target.forward(ids, mask, positions, cache, self._layers)
        parts = output.features.chunk(len(self._layers), -1)
        return Prefill(
            ids,
            mask,
            positions,
            target.logits(output.hidden[:, -1]),
            dict(zip(self._layers, parts, strict=True)),
            [(layer.keys, layer.values) for layer in cache.layers],
        )
