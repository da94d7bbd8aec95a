"""Probes of a running training: its metrics, and its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tools.probes.common import LENGTH, Figures, scratch


def acceptance_metric() -> Figures:
    """32 samples of unlike length and difficulty, evaluated in batches of 4 in two orders."""
    generator = torch.Generator().manual_seed(0)
    count, size = 32, 4
    lengths = torch.randint(40, 400, (count,), generator=generator)
    supervised = (lengths * (0.1 + 0.6 * torch.rand(count, generator=generator))).long()
    # Long samples are easier, as code and repetition are.
    rates = 0.3 + 0.5 * lengths / 400
    by_length = lengths.argsort()
    orders = {
        "batched by length": by_length,
        "batched at random": torch.randperm(count, generator=generator),
    }
    figures: Figures = {}
    for name, order in orders.items():
        samples = [(lengths[i], supervised[i], rates[i]) for i in order.tolist()]
        groups = [samples[i : i + size] for i in range(0, count, size)]
        figures[f"acceptance rate of one evaluation, {name}"] = _evaluated(groups)
    exact = (rates * supervised).sum() / supervised.sum()
    figures["mean of the acceptance rate over the supervised positions"] = exact.item()
    return figures


def _evaluated(groups: Sequence[Sequence[tuple[torch.Tensor, ...]]]) -> float:
    from specforge.eval import Evaluator
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import StepOutput

    def forward(batch: TrainBatch) -> StepOutput:
        group = groups[int(batch.sample_ids[0])]
        lengths, supervised, rates = (
            torch.stack(column).double() for column in zip(*group, strict=True)
        )
        denominator = supervised.sum()
        metrics = {
            "acc_corrects": [torch.zeros(())],
            "acc_denoms": [denominator],
            "acceptance_rates": [(rates * supervised).sum() / denominator],
            "plosses": [torch.ones(())],
            "metric_losses": [torch.ones(())],
            # Stock KL's own denominator: the batch, padding included.
            "metric_loss_denoms": [torch.tensor(float(len(lengths) * lengths.max()))],
        }
        return StepOutput(loss=torch.ones(()), metrics=metrics)

    batches = [
        TrainBatch(sample_ids=[str(index)], strategy="eagle3", tensors={}, metadata={})
        for index in range(len(groups))
    ]
    return Evaluator().run(forward, batches)["eval/acceptance_rate_0"]


def evaluation_random_numbers() -> Figures:
    """4 steps of training with the real samplers, and an evaluation after every step or none."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.algorithms.peagle.model import generate_cod_sample_indices
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.controller import TrainerController, TrainerCore
    from specforge.training.strategies.base import StepOutput

    class Strategy:
        """Keeps the positions that it samples."""

        name = "recording"

        def __init__(self, sample: Callable[[], torch.Tensor]) -> None:
            self.sample, self.model = sample, torch.nn.Linear(1, 1)
            self.trained: list[list[int]] = []
            self.evaluated: list[list[int]] = []

        def trainable_module(self) -> torch.nn.Module:
            return self.model

        def forward_loss(self, _batch: Any, _ctx: Any = None) -> StepOutput:
            kept = self.trained if self.model.training else self.evaluated
            kept.append(self.sample().tolist())
            return StepOutput(loss=self.model(torch.ones(1)).sum(), metrics={})

        def checkpoint_state_filter(self, state: dict[str, Any]) -> dict[str, Any]:
            return state

    class Backend:
        name = "plain"

        def backward(self, loss: torch.Tensor, *, is_boundary: bool = True) -> None:
            loss.backward()

        def step(self) -> torch.Tensor:
            return torch.tensor(1.0)

        def state_dict(self) -> dict[str, Any]:
            return {"model": {"w": torch.ones(1)}, "optimizer": None, "rng": {}}

    def batches(count: int) -> list[TrainBatch]:
        return [TrainBatch(["s"], strategy="s", tensors={}, metadata={}) for _ in range(count)]

    def run(sample: Callable[[], torch.Tensor], eval_interval: int) -> Strategy:
        strategy = Strategy(sample)
        torch.manual_seed(3)
        with scratch() as directory:
            TrainerController(
                TrainerCore(strategy, Backend(), accumulation_steps=1),
                run_id="run",
                output_dir=str(directory),
                max_steps=4,
                eval_interval=eval_interval,
                eval_data_factory=lambda: batches(1),
            ).fit(batches(4))
        return strategy

    mask = torch.ones(1, LENGTH, dtype=torch.long)
    dflash = OnlineDFlashModel.__new__(OnlineDFlashModel)
    torch.nn.Module.__init__(dflash)
    dflash.num_anchors = 8
    samplers = {
        "P-EAGLE": lambda: torch.cat(generate_cod_sample_indices(LENGTH, mask, num_depths=4)),
        "DFlash": lambda: dflash._sample_anchor_positions(LENGTH, mask, mask.device)[0],
    }
    figures: Figures = {}
    for name, sample in samplers.items():
        alone, beside = run(sample, 0), run(sample, 1)
        figures[f"{name}: of 4 steps, those that train on other positions if evaluated"] = sum(
            one != other for one, other in zip(alone.trained, beside.trained, strict=True)
        )
        figures[f"{name}: of 4 evaluations, those of other positions than the first"] = sum(
            positions != beside.evaluated[0] for positions in beside.evaluated
        )
    return figures
