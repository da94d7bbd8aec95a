"""Inputs of the operation on logits, as each framework is fed them."""

from __future__ import annotations

from functools import cached_property
from typing import Final

import torch
from specforge.core.target_distribution import TargetDistribution

#: Positions whose label is this are not supervised; torch's default.
IGNORED: Final = -100


class Inputs:
    """Tensors of one draft position's loss, each made when first asked for.

    Rows repeat with a period of `PERIOD`: times do not depend on values, and drawing 10^9 normal
    numbers takes longer than measuring.

    Args:
        tokens: N, positions.
        vocabulary: V_d, the draft vocabulary.
        dtype: of draft and target logits.
        supervised: share of positions that are supervised.
        target_dtype: of the target logits, where it is another.
        device: where they are.
    """

    PERIOD: Final = 64
    COVERAGE: Final = (0.75, 0.95)

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        dtype: torch.dtype,
        supervised: float,
        target_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.tokens, self.vocabulary, self.dtype = tokens, vocabulary, dtype
        self.device = device
        generator = torch.Generator().manual_seed(0)
        rows = min(self.PERIOD, tokens)
        y, noise = torch.randn(2, rows, vocabulary, generator=generator)
        self._y = (2 * y).to(device, target_dtype or dtype)
        self._z = (1.2 * y + noise).to(device, dtype)
        low, high = self.COVERAGE
        covered = torch.empty(rows).uniform_(low, high, generator=generator)
        self._log_coverage = covered.log().to(device)
        self._log_normalizer = self._y.float().logsumexp(-1) - self._log_coverage
        self._generator = generator
        self.supervise(supervised)

    def supervise(self, share: float) -> None:
        """Choose the supervised positions, a ``share`` of all."""
        self.mask = torch.zeros(1, self.tokens, dtype=torch.bool)
        self.n_supervised = round(share * self.tokens)
        chosen = torch.randperm(self.tokens, generator=self._generator)
        self.mask[0, chosen[: self.n_supervised]] = True
        self.mask = self.mask.to(self.device)
        # SpecForge's and speculators' forms of it, and hard labels.
        self.position_mask = self.mask[..., None].int()
        labels = self._repeated(self._y.argmax(-1))[0]
        self.labels = labels.masked_fill(~self.mask[0], IGNORED)

    def hold(self, names: tuple[str, ...], *, only: bool) -> None:
        """Make these large tensors now; ``only``: after dropping all others."""
        for name in LARGE if only else ():
            if name not in names:
                self.__dict__.pop(name, None)
        for name in names:
            getattr(self, name)

    def release(self) -> None:
        """Drop the gradient of the previous call."""
        self.z.grad = None

    @cached_property
    def z(self) -> torch.Tensor:
        return self._repeated(self._z).requires_grad_()

    @cached_property
    def y(self) -> torch.Tensor:
        return self._repeated(self._y)

    @cached_property
    def target_p(self) -> torch.Tensor:
        """SpecForge: p~ in float32, whatever the logits have."""
        return self._repeated(self._y.float().softmax(-1))

    @cached_property
    def target_p_on_draft(self) -> torch.Tensor:
        """SpecForge: p, not renormalized, in float32."""
        return self._repeated((self._y.float() - self._log_normalizer[:, None]).exp())

    @cached_property
    def gradient(self) -> torch.Tensor:
        """Memory that the floor writes to."""
        return torch.zeros_like(self.y)

    @cached_property
    def scratch(self) -> torch.Tensor:
        """A copy of z for what overwrites its logits with their gradient."""
        return self.z.detach().clone().requires_grad_()

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log Z and log coverage, [1, N]."""
        return self._repeated(self._log_normalizer), self._repeated(self._log_coverage)

    def target(self) -> TargetDistribution:
        return TargetDistribution(self.y, *self.rows, token_ids=self.labels[None])

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        whole = rows.new_empty(self.tokens, *rows.shape[1:])
        for part in whole.split(len(rows)):
            part.copy_(rows[: len(part)])
        return whole[None]


#: Tensors [1, N, V_d] of `Inputs`.
LARGE: Final = ("z", "y", "target_p", "target_p_on_draft", "gradient", "scratch")
