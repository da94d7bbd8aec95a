"""``make article``: the article's drafts and losses, on SmolLM2-135M-Instruct.

EAGLE-3, MEDUSA, MLP speculator and MTP, with the losses of the article's tables; its relative
gains over KL beside ours. Per draft every loss has one budget, and `training.loss` alone differs.
An MTP module is first trained for one position only, as a target's own pretraining leaves it
(``untuned``); every loss then fine-tunes that module for all positions.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from experiments.assets import prepare
from experiments.runner import ROOT, RUNS, Training, console, train
from experiments.study import BATCH, STUDY, capture, publish, train_and_evaluate

#: Optimizer steps from scratch.
STEPS = 96
NEW_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """A draft of the article.

    Attributes:
        losses: names of losses or of `experiments.runner.VARIANTS`, baseline first.
        tuning_steps: where every loss fine-tunes a module that was trained for one position, for
            how many steps; otherwise every loss trains from scratch.
    """

    losses: tuple[str, ...]
    tuning_steps: int | None = None

    def trainings(self, algorithm: str, seed: int) -> list[Training]:
        """The runs of one seed; what others start from comes first."""
        scratch = partial(Training, algorithm, seed=seed, parent=STUDY / "article", batch=BATCH)
        if self.tuning_steps is None:
            return [scratch(loss, max_steps=STEPS) for loss in self.losses]
        start = scratch("untuned", max_steps=STEPS)
        tuned = [scratch(loss, max_steps=self.tuning_steps, start=start) for loss in self.losses]
        return [start, *tuned]


LK: Final = ("kl", "lk_alpha", "lk_lambda")
PLANS: Final = {
    "eagle3": Plan(("kl", "tv", "lk_fixed", "lk_alpha", "lk_lambda")),
    "medusa": Plan(LK),
    "mlp_speculator": Plan(LK),
    "mtp": Plan(LK, tuning_steps=48),
}
#: The target whose gains in the article are put beside ours.
GAINS: Final = {
    "eagle3": "Llama-3.1-8B-Instruct",
    "medusa": "Llama-3.1-8B-Instruct",
    "mlp_speculator": "Llama-3.1-8B-Instruct",
    "mtp": "DeepSeek-V3-0324",
}


def main(
    drafts: Annotated[str, typer.Option(help="Drafts to train.")] = " ".join(PLANS),
    seeds: Annotated[str, typer.Option(help="Training seeds.")] = "0 1 2",
    gsm8k: Annotated[
        str,
        typer.Option(help="GSM8K's test questions: a JSONL file, or hub:REPO[:CONFIG][@SPLIT]."),
    ] = "hub:openai/gsm8k:main@test",
    to: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="Also write the report here: a .json, with .md and .png beside it.",
        ),
    ] = None,
) -> None:
    """Train and evaluate the article's drafts with the article's losses."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    report = STUDY / "article" / "report.json"
    assets = prepare(RUNS)
    benchmarks = {**assets.benchmarks, "gsm8k": gsm8k}
    for algorithm in drafts.split():
        plan = PLANS[algorithm]
        per_seed = [plan.trainings(algorithm, int(seed)) for seed in seeds.split()]
        trainings = [run for runs in per_seed for run in runs]
        console.print(f"\n[bold]{algorithm}[/]: {len(trainings)} drafts")
        capture(trainings[0], cores)
        if plan.tuning_steps:
            train([runs[0] for runs in per_seed], cores)
        train_and_evaluate(
            trainings, assets.target, benchmarks, report, new_tokens=NEW_TOKENS, cores=cores
        )
    console.print(f"[bold green]done[/] in {(time.monotonic() - started) / 60:.0f} minutes")
    if to is not None:
        publish(report, to, ["make", "article"], GAINS)


if __name__ == "__main__":
    typer.run(main)
