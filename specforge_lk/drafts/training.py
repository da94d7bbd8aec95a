"""One training model and one strategy for every draft of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from specforge.core.target_distribution import DeferredTarget, TargetDistribution
from specforge.losses.fused_head import FusedHead, fused_terms, window_rows
from specforge.losses.reduction import (
    DraftLoss,
    HeadLoss,
    draft_argmax,
    head_metrics,
    reduce_heads,
    target_shape,
    training_group,
)
from specforge.losses.supervision import supervised
from specforge.runtime.contracts import TrainBatch
from specforge.training.strategies.base import DraftTrainStrategy, StepContext, StepOutput
from torch import nn

from specforge_lk.drafts.model import HeadDraftModel, shifted
from specforge_lk.losses.contract import Terms

if TYPE_CHECKING:
    from specforge.modeling.target.target_head import TargetHead

#: Weight of draft position k is HEAD_DECAY ** k unless ``training.ploss_decay`` is set, as in
#: SpecForge's EAGLE-3 and in the paper (section 5).
HEAD_DECAY: Final = 0.8


class HeadModel(nn.Module):
    """Draft and loss: sum_k γ^k L_k, L_k the mean loss of draft position k where supervised.

    A loss that sees a whole chain weighs the draft positions itself: γ = 1.

    Draft position k = 0, 1, ... of position t proposes token t + 2 + k. It is compared with the
    target's distribution at t + 1 + k, and supervised where ``specforge.losses.supervision``,
    which counts from 1, says so for k + 1.

    Args:
        draft_model: the draft.
        heads: draft positions K to train.
        loss: a registered loss.
        loss_data_parallel: average the loss over all ranks.
        loss_fused_head: compute the loss without holding logits, the draft's or the target's.

    Raises:
        ValueError: ``loss_fused_head`` with a draft whose logits are no product of states and a
            weight.
    """

    def __init__(
        self,
        draft_model: HeadDraftModel,
        heads: int,
        loss: DraftLoss,
        loss_data_parallel: bool = False,
        loss_fused_head: bool = False,
    ) -> None:
        super().__init__()
        if loss_fused_head and not draft_model.projects:
            raise ValueError(
                f"training.loss_fused_head: {type(draft_model).__name__} implements no "
                "head_projections, so that its logits are held; remove the setting"
            )
        self.draft_model = draft_model
        self.heads = heads
        self.loss = loss
        self.loss_data_parallel = loss_data_parallel
        self.loss_fused_head = loss_fused_head

    def forward(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        following: torch.Tensor,
        target: TargetDistribution | DeferredTarget,
        decay: float,
    ) -> tuple[torch.Tensor, list[HeadLoss], list[torch.Tensor]]:
        """Return the loss, that of every draft position, and whether each agrees, [B, L].

        A draft position agrees where its likeliest token is the target's.

        Args:
            hidden: [B, L, H] the target's last hidden states.
            tokens: [B, L] the token following each position.
            attention_mask: [B, L].
            following: [B, L] whether that token is the response's.
            target: [B, L] the target's distribution one position later; deferred where no logits
                are held.
            decay: γ.
        """
        # The target's state at a position predicts the token after the one that follows it.
        labels = shifted(tokens, 1)
        target = target.with_labels(labels, self.draft_model.t2d)
        masks = [supervised(following, head + 1) for head in range(self.heads)]
        read = hidden, tokens, attention_mask, self.heads
        if isinstance(target, DeferredTarget):
            terms, correct = self._fused(target, masks, *read)
        else:
            terms, correct = self._held(target.pad(self.heads), masks, *read)
        group = training_group(self.loss_data_parallel)
        losses = reduce_heads(self.loss, terms, masks, group=group)
        total = sum(decay**head * loss.loss for head, loss in enumerate(losses))
        return total, losses, correct

    def _held(
        self, padded: TargetDistribution, masks: list[torch.Tensor], *read: Any
    ) -> tuple[list[Terms], list[torch.Tensor]]:
        """Return terms and agreement of every draft position, by its logits at every position."""
        terms, correct = [], []
        for head, logits in enumerate(self.draft_model.head_logits(*read)):
            goal = padded.window(head, masks[head].shape[1])
            terms.append(self.loss.terms(logits, goal, masks[head]))
            correct.append(self._correct(logits, goal, terms[-1])["correct"])
        return terms, correct

    def _fused(
        self, target: DeferredTarget, masks: list[torch.Tensor], *read: Any
    ) -> tuple[list[Terms], list[torch.Tensor]]:
        """Return the same, by logits of some supervised positions at a time."""
        heads = [
            FusedHead((projection,), mask, window_rows(mask, head, mask.shape[1]))
            for head, (projection, mask) in enumerate(
                zip(self.draft_model.head_projections(*read), masks, strict=True)
            )
        ]
        terms, observed = fused_terms(self.loss, heads, target, observe=self._correct)
        return terms, [vectors["correct"] for vectors in observed]

    @torch.no_grad()
    def _correct(
        self, logits: torch.Tensor, target: TargetDistribution, terms: Mapping[str, torch.Tensor]
    ) -> Terms:
        likeliest = self.draft_model.token_ids()[draft_argmax(terms, logits)]
        return {"correct": likeliest == target.token_ids}


class HeadTrainStrategy(DraftTrainStrategy):
    """A training step of `HeadModel` on captured or streamed last hidden states.

    Args:
        model: a `HeadModel`, wrapped by the backend.
        target_head: SpecForge's frozen ``TargetHead``.
        name: the algorithm's name.
        ploss_decay: the weight of draft position k is ploss_decay ** k. SpecForge logs the loss as
            the sum of their losses with these weights.
    """

    required_features: Final = {"input_ids", "attention_mask", "loss_mask", "hidden_state"}

    def __init__(
        self,
        model: nn.Module,
        *,
        target_head: TargetHead,
        name: str,
        ploss_decay: float = HEAD_DECAY,
    ) -> None:
        self.model = model
        self.target_head = target_head
        self.name = name
        self.ploss_decay = ploss_decay

    def trainable_module(self) -> nn.Module:
        """Return the module whose parameters are trained."""
        return self.model

    def forward_loss(self, batch: TrainBatch, ctx: StepContext | None = None) -> StepOutput:
        """Return loss and metrics of one batch."""
        self.validate_batch(batch)
        device = next(self.model.parameters()).device
        tensors = {name: batch.tensors[name].to(device) for name in self.required_features}
        # The draft's copy may be rounded; the target's distribution is made of what was captured.
        hidden = self.draft_features(tensors["hidden_state"])
        # SpecForge's shift: position t gets token t + 1, the state that the target, after that
        # token, predicts from, and whether the token is the response's.
        tokens, states, following = self.target_head.preprocess(
            tensors["input_ids"], tensors["hidden_state"], tensors["loss_mask"]
        )
        total, heads, correct = self.model(
            hidden=hidden,
            tokens=tokens,
            attention_mask=tensors["attention_mask"],
            following=following.squeeze(-1),
            target=self._target(states),
            decay=self.ploss_decay,
        )
        ratios = head_metrics(heads)
        counts = torch.stack([head.mask.sum() for head in heads])
        hits = torch.stack(
            [(right & head.mask).sum() for right, head in zip(correct, heads, strict=True)]
        )
        metrics = {
            "plosses": [head.loss.detach() for head in heads],
            "acces": list(hits / counts.clamp_min(1)),
            "acc_corrects": list(hits.float()),
            "acc_denoms": list(counts.float()),
            "metric_losses": [head.loss.detach() for head in heads],
            "metric_loss_denoms": list(counts.float()),
        }
        return StepOutput(loss=total, metrics=metrics, ratio_metrics=ratios, must_be_finite=True)

    @torch.no_grad()
    def _target(self, hidden: torch.Tensor) -> TargetDistribution | DeferredTarget:
        model = _unwrapped(self.model)
        draft, shape = model.draft_model, target_shape(model.loss)
        head = self.target_head
        hidden = hidden.to(head.fc.weight.dtype)
        t2d = None if len(draft.d2t) == len(draft.t2d) else draft.t2d
        if model.loss_fused_head:
            return DeferredTarget.of_head(hidden, head, t2d, shape=shape)
        if t2d is None:
            return TargetDistribution.from_logits(head(hidden), shape=shape)
        return TargetDistribution.from_hidden_states(hidden, head, t2d, shape=shape)

    def checkpoint_state_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the draft's tensors, but for those that checkpoints omit."""
        prefix = "draft_model."
        tied = _unwrapped(self.model).draft_model.tied_keys
        named = {
            name.split(prefix, 1)[1]: value for name, value in state_dict.items() if prefix in name
        }
        return {name: value for name, value in named.items() if name not in tied}


def _unwrapped(model: Any) -> HeadModel:
    """Return the model in a backend's wrapper, if there is one."""
    return model if isinstance(model, HeadModel) else model.module
