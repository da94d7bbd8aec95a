"""``make algorithms`` and ``make paper``: many drafts of SmolLM2-135M-Instruct on one budget.

Drafts of one algorithm have the same responses, steps, batch and learning rate: between those of
one seed `training.loss` alone differs. Everything is kept under ``runs/study``; an interrupted
study continues where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from experiments.assets import HELD_OUT, HELD_OUT_GREEDY, prepare
from experiments.runner import (
    ROOT,
    RUNS,
    Device,
    Training,
    capture,
    check_losses,
    chosen_device,
    console,
    execute,
    record,
    train,
)
from specforge_lk.evaluate.render import write_all
from specforge_lk.evaluate.report import Result, read_report

HEADS = 4
#: Samples per optimizer step.
BATCH = 2
PROMPTS = 16
#: Held-out responses to measure exactly; the draws of the bootstrap are whole conversations.
CONVERSATIONS = 64


@dataclass(frozen=True)
class Plan:
    """What one algorithm is trained with.

    Attributes:
        losses: names of losses or of `experiments.runner.VARIANTS`, baselines first.
        epochs: passes over the samples.
        steps: optimizer steps; they end a run before its last pass is complete.
        tuning_steps: where a draft is first trained for one position only, as a target's own
            pretraining leaves an MTP module (``untuned``), for how many steps every loss then
            fine-tunes it for all positions.
    """

    losses: tuple[str, ...]
    epochs: int | None = None
    steps: int | None = None
    tuning_steps: int | None = None

    def trainings(self, algorithm: str, seed: int, parent: Path) -> list[Training]:
        """Return the runs of one seed below ``parent``; what others start from comes first."""
        scratch = partial(
            Training, algorithm, seed=seed, parent=parent, epochs=self.epochs, batch=BATCH
        )
        if self.tuning_steps is None:
            return [scratch(loss, max_steps=self.steps) for loss in self.losses]
        start = scratch("untuned", max_steps=self.steps)
        tuned = [scratch(loss, max_steps=self.tuning_steps, start=start) for loss in self.losses]
        return [start, *tuned]


@dataclass(frozen=True)
class Study:
    """One command's drafts, and what they are measured on.

    Attributes:
        plans: by algorithm.
        seeds: of training.
        new_tokens: longest response on a benchmark.
        directory: where drafts and report are kept.
        benchmarks: sources beside the benchmarks of `experiments.assets`, by name.
        gains: by algorithm, the target whose gains in the paper are put beside these.
    """

    plans: Mapping[str, Plan]
    seeds: tuple[int, ...]
    new_tokens: int
    directory: Path
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, str] = field(default_factory=dict)


STOCK: Final = Plan(("stock", "kl", "lk_alpha", "lk_lambda"), epochs=1)
LK: Final = Plan(("kl", "lk_alpha", "lk_lambda"), steps=96)
#: By name, which is that of the target of make and of the report.
STUDIES: Final = {
    # Every algorithm of SpecForge with its own loss, with KL and with LK losses.
    "algorithms": Study(
        plans=dict.fromkeys(("eagle3", "dflash", "dspark", "domino", "peagle"), STOCK),
        seeds=(0, 1),
        new_tokens=32,
        directory=RUNS / "study",
    ),
    # The paper's drafts with the losses of its tables, and its relative gains over KL beside ours.
    "paper": Study(
        plans={
            "eagle3": Plan(("kl", "tv", "lk_fixed", "lk_alpha", "lk_lambda"), steps=96),
            "medusa": LK,
            "mlp_speculator": LK,
            "mtp": Plan(LK.losses, steps=96, tuning_steps=48),
        },
        seeds=(0, 1, 2),
        new_tokens=16,
        # Named so by the first runs, which go on there.
        directory=RUNS / "study" / "article",
        benchmarks={"gsm8k": "hub:openai/gsm8k:main@test"},
        gains={
            "eagle3": "Llama-3.1-8B-Instruct",
            "medusa": "Llama-3.1-8B-Instruct",
            "mlp_speculator": "Llama-3.1-8B-Instruct",
            "mtp": "DeepSeek-V3-0324",
        },
    ),
}


def main(
    name: Annotated[str, typer.Argument(metavar="|".join(STUDIES), help="The study.")],
    drafts: Annotated[
        str | None, typer.Option(help="Algorithms to train; by default all of the study.")
    ] = None,
    losses: Annotated[
        str | None, typer.Option(help="Losses to train each with, baselines first.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds.")] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SOURCE of a further benchmark, or of one of the study's: a JSONL file, or "
            "hub:REPO, a hub data set, with :CONFIG and @SPLIT after REPO where it has several. "
            "`gsm8k` of the study `paper` comes from the hub."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="Also write the report here: a .json, with .md and .png beside it.",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train and evaluate every algorithm × seed × loss of a study."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    if name not in STUDIES:
        raise typer.BadParameter(f"{name!r}: name one of {', '.join(STUDIES)}")
    study = STUDIES[name]
    chosen = drafts.split() if drafts else list(study.plans)
    if unknown := [algorithm for algorithm in chosen if algorithm not in study.plans]:
        raise typer.BadParameter(
            f"{' '.join(unknown)}: name drafts of {', '.join(study.plans)}", param_hint="--drafts"
        )
    plans = {algorithm: study.plans[algorithm] for algorithm in chosen}
    if losses is not None:
        plans = {a: replace(plan, losses=tuple(losses.split())) for a, plan in plans.items()}
    for plan in plans.values():
        check_losses(plan.losses, "--losses")
    used = chosen_device(device)
    report = study.directory / "report.json"
    assets = prepare(RUNS)
    sources: dict[str, object] = {**assets.benchmarks, **study.benchmarks}
    for value in benchmark or []:
        label, equals, source = value.partition("=")
        if not equals:
            raise typer.BadParameter(f"{value}: give NAME=SOURCE", param_hint="--benchmark")
        sources[label] = source
    captured: set[tuple[Path, Path | None]] = set()
    for algorithm, plan in plans.items():
        numbers = seeds.split() if seeds else study.seeds
        per_seed = [plan.trainings(algorithm, int(n), study.directory) for n in numbers]
        trainings = [run for runs in per_seed for run in runs]
        console.print(f"\n[bold]{algorithm}[/]: {len(trainings)} drafts")
        first = trainings[0]
        if (made := (first.features, first.vocab_mapping)) not in captured:
            captured.add(made)
            # With a loss set, DFlash and Domino need the target's states too.
            loss = "training.loss=lk_lambda"
            capture(first.config_path, *made, loss, threads=cores, device=used)
        if plan.tuning_steps:
            train([runs[0] for runs in per_seed], cores, used)
        train(trainings, cores, used)
        evaluate(trainings, assets.target, sources, report, study.new_tokens, cores, used)
    console.print(f"[bold green]done[/] in {(time.monotonic() - started) / 60:.0f} minutes")
    if to is not None:
        publish(report, to, ["make", name], study.gains)


def evaluate(
    trainings: Sequence[Training],
    target: Path,
    benchmarks: Mapping[str, object],
    report: Path,
    new_tokens: int,
    cores: int,
    device: str = "auto",
) -> None:
    """Measure drafts of one algorithm at T = 0 and 1, and add them to ``report``."""
    execute(
        *("specforge-lk", "eval", "--target", target, "--out", report),
        *(f"--draft={run.loss}@{run.seed}={run.draft}" for run in trainings),
        *(f"--benchmark={name}={source}" for name, source in benchmarks.items()),
        *("--held-out", HELD_OUT, "--held-out", HELD_OUT_GREEDY),
        *("--held-out-limit", CONVERSATIONS),
        *("--temperature", 0, "--temperature", 1, "--heads", HEADS, "--limit", PROMPTS),
        *("--max-new-tokens", new_tokens, "--max-length", 512, "--device", device),
        threads=cores,
    )
    # Whatever the report held before stays in it.
    record(report, trainings)


def publish(
    report: Path, path: Path, command: Sequence[str], gains: Mapping[str, str] | None = None
) -> None:
    """Write the report, its tables and its chart at ``path``, without the arrays.

    Of a study that is under way, what every draft of an algorithm has been measured on: means over
    some of them compare nothing.

    Args:
        report: what the study has measured so far.
        path: the .json to write; .md and .png appear beside it.
        command: the command that makes all of it.
        gains: by algorithm, the target whose gains in the paper are put beside these.
    """
    content = read_report(report)
    drafts: dict[str, set[tuple[str, int]]] = {}
    measured: dict[tuple[str, str, float], set[tuple[str, int]]] = {}
    for r in content.results:
        drafts.setdefault(r.algorithm, set()).add((r.loss, r.seed))
        measured.setdefault(_measurement(r), set()).add((r.loss, r.seed))
    incomplete = {cell for cell, done in measured.items() if done != drafts[cell[0]]}
    for algorithm, benchmark, temperature in sorted(incomplete):
        console.print(f"left out: {algorithm} on {benchmark}, T = {temperature:g}: not all drafts")
    content.results = [r for r in content.results if _measurement(r) not in incomplete]
    # Every algorithm was evaluated by a command of its own: this one makes them all.
    content.command = list(command)
    content.gains = {name: target for name, target in (gains or {}).items() if name in drafts}
    for written in write_all(content, path):
        console.print(f"  {written}")


def _measurement(result: Result) -> tuple[str, str, float]:
    return result.algorithm, result.benchmark, result.temperature


if __name__ == "__main__":
    typer.run(main)
