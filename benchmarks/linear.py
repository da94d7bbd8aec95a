"""`linear_overlap` against the same with logits: what fusing it with the LM head costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.baselines import OURS, loss_of
from benchmarks.measure import (
    Results,
    distribution,
    limited_memory,
    peak_allocated,
    peak_resident,
    repeats_for,
    shuffled_rounds,
    timed,
    touch,
)
from specforge_lk.cli.progress import each
from specforge_lk.overlap import OverlapTerms, Projection, linear_overlap, overlap_terms

#: SmolLM2-135M's hidden size.
HIDDEN: Final = 576
SOURCES: Final = ("benchmarks.baselines", "benchmarks.linear")


@dataclass(frozen=True)
class Cell:
    """A size: N positions of hidden size H, V_d tokens; float32, all positions supervised."""

    tokens: int
    vocabulary: int
    hidden: int = HIDDEN

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden} to {self.vocabulary}"


GRID: Final = tuple(Cell(tokens, 32000) for tokens in (512, 2048, 8192))
QUICK: Final = (Cell(128, 4096, hidden=32),)


class Inputs:
    """Hidden states [1, N, H] and LM heads [V_d, H] of draft and target, and target logits."""

    def __init__(self, cell: Cell) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        target = drawn(1, cell.tokens, cell.hidden)
        target_head = drawn(cell.vocabulary, cell.hidden).mul_(2 * cell.hidden**-0.5)
        self.projection = Projection(target, target_head)
        self.y = F.linear(*self.projection)
        # In parts: a softmax of all logits at once would take as much again.
        parts = [part.logsumexp(-1) for part in self.y.split(256, dim=1)]
        self.log_coverage = torch.full((1, cell.tokens), 0.85).log()
        self.log_normalizer = torch.cat(parts, dim=1) - self.log_coverage
        self.mask = torch.ones(1, cell.tokens, dtype=torch.bool)
        self.hidden = (target + 0.5 * drawn(*target.shape)).requires_grad_()
        self.head = target_head.clone().requires_grad_()

    def unfused(self, head: torch.Tensor) -> OverlapTerms:
        logits = F.linear(self.hidden, head)
        return overlap_terms(logits, self.y, self.log_normalizer, log_coverage=self.log_coverage)

    def fused(self, head: torch.Tensor, target: torch.Tensor | Projection) -> OverlapTerms:
        return linear_overlap(
            self.hidden, head, target, self.log_normalizer, log_coverage=self.log_coverage
        )

    def step(self, loss: str, overlap: Callable[[], OverlapTerms]) -> None:
        """Run forward and backward of the mean loss."""
        loss_of(OURS[loss], overlap(), self.mask).backward()

    def release(self) -> None:
        self.hidden.grad = self.head.grad = None


def run(
    path: Path, grid: tuple[Cell, ...], *, budget: float, fresh: bool, console: Console
) -> None:
    """Measure the cells that ``path`` does not hold yet; arguments as for `operation.run`."""
    with limited_memory() as limit:
        results = Results(
            path, *SOURCES, fresh=fresh, memory_limit=limit, minimum_budget_seconds=budget
        )
        waiting = [cell for cell in grid if not results.has(asdict(cell))]
        for cell in each("linear", waiting, console):
            results.add(asdict(cell), implementations=_measure(Inputs(cell), budget))


def _measure(inputs: Inputs, budget: float) -> dict[str, dict[str, Any]]:
    frozen = inputs.head.detach()
    overlaps = {
        "unfused": partial(inputs.unfused, inputs.head),
        "fused": partial(inputs.fused, inputs.head, inputs.y),
        "fused with target head": partial(inputs.fused, inputs.head, inputs.projection),
        "unfused, frozen head": partial(inputs.unfused, frozen),
        "fused, frozen head": partial(inputs.fused, frozen, inputs.y),
    }
    steps = {
        f"{overlap} {loss}": partial(inputs.step, loss, overlaps[overlap])
        for overlap in overlaps
        for loss in ("kl", "lk_lambda")
    }
    found = {name: _first_calls(inputs, step) for name, step in steps.items()}
    wanted = {name: repeats_for(found[name]["first_seconds"], budget) for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in shuffled_rounds(wanted):
        inputs.release()
        touch(found[name]["memory"]["allocated"])
        seconds[name].append(timed(steps[name]))
    return {name: found[name] | distribution(seconds[name]) for name in steps}


def _first_calls(inputs: Inputs, step: Callable[[], None]) -> dict[str, Any]:
    inputs.release()
    with peak_resident() as grown:
        begun = time.perf_counter()
        allocated = peak_allocated(step)
        taken = time.perf_counter() - begun
        resident = grown()
    gradient = sum(t.grad.nbytes for t in (inputs.hidden, inputs.head) if t.grad is not None)
    memory = {"allocated": allocated, "resident": resident, "gradient": gradient}
    return {"first_seconds": taken, "memory": memory}
