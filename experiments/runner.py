"""Comparable `specforge train` runs: started side by side, continued when interrupted, exported.

Every run is a command of SpecForge on a config of ``configs/smollm2-135m/``, with what differs
between runs on the command line. A run that was made from other inputs is made again.
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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
import yaml
from rich.console import Console
from specforge.losses import installed_loss_registry

from experiments.assets import RESPONSES, SAMPLES
from specforge_lk.cli.progress import Bar, ProgressBars
from specforge_lk.cli.shell import find_device
from specforge_lk.evaluate.render import write_all
from specforge_lk.evaluate.report import Training as TrainingRecord
from specforge_lk.evaluate.report import read_report

ROOT = Path(__file__).parent.parent
RUNS = Path("runs")
CONFIGS = Path("configs/smollm2-135m")
#: Where the configs have captured features and draft vocabulary.
FEATURES = RUNS / "features"

#: The name of a run without `training.loss`: SpecForge's own objective.
STOCK = "stock"
#: The name of the draft that every loss of the demo fine-tunes.
START = "start"
#: Runs that are more than a registered loss, and the settings they stand for.
VARIANTS = {
    STOCK: (),
    "lk_fixed": (
        "training.loss=lk_lambda",
        "training.loss_options.lambda_scope=fixed",
        "training.loss_options.lambda_fixed=0.5",
    ),
    START: ("training.loss=kl",),
    # A module that knows one position only, as a target's own pretraining leaves it.
    "untuned": ("training.loss=kl", "training.ttt_length=1"),
}

#: Settings of glibc's allocator; elsewhere they mean nothing.
ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", f"trim_threshold={1 << 34}")
)

console = Console(highlight=False, soft_wrap=True)

#: ``--device`` of every experiment.
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(
        help="Where features are captured and drafts trained and measured; auto takes a GPU if "
        "there is one. CUDA_VISIBLE_DEVICES chooses among several."
    ),
]


def chosen_device(name: str) -> str:
    """Return the device that ``--device`` names, ``auto`` being what is there.

    Raises:
        typer.BadParameter: it cannot be used here.
    """
    try:
        return find_device(name)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; leave the option out to take what there is") from None


def hardware(device: str) -> str:
    """Return what a report calls the device: "a CPU", or the name of the card."""
    return "a CPU" if device == "cpu" else torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class Training:
    """One `specforge train`: an algorithm, a loss or variant and a seed, below ``parent``.

    ``epochs`` and ``batch`` (samples per optimizer step) replace those of the config, ``max_steps``
    ends a run before its last pass is complete; the draft of ``start`` is where it starts from.
    ``settings`` are further overrides. ``objective`` are those that ``loss`` is a name for, where
    it is neither a registered loss nor a variant. ``captured`` is the folder of captured features
    and draft vocabulary, in place of the config's ``runs/features``.
    """

    algorithm: str
    loss: str
    seed: int
    parent: Path
    epochs: int | None = None
    batch: int | None = None
    max_steps: int | None = None
    start: Training | None = None
    settings: tuple[str, ...] = ()
    objective: tuple[str, ...] | None = None
    captured: Path = FEATURES

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.loss} {self.seed}"

    @property
    def directory(self) -> Path:
        return self.parent / f"{self.algorithm}-{self.loss}-seed{self.seed}"

    @property
    def draft(self) -> Path:
        return self.directory / "draft"

    @property
    def log(self) -> Path:
        return self.directory / "train.log"

    @property
    def made_from(self) -> Path:
        """Record of the command and of a digest of everything the draft was made from."""
        return self.directory / "made-from.json"

    @property
    def seconds_path(self) -> Path:
        return self.directory / "seconds.json"

    @property
    def seconds(self) -> float | None:
        """Wall clock of the training; None where it was interrupted."""
        return json.loads(self.seconds_path.read_text()) if self.seconds_path.exists() else None

    @property
    def config_path(self) -> Path:
        return CONFIGS / f"{self.algorithm}.yaml"

    @cached_property
    def config(self) -> dict[str, dict]:
        return yaml.safe_load(self.config_path.read_text())

    @property
    def draft_config(self) -> Path:
        return Path(self.config["model"]["draft_model_config"])

    @property
    def vocab_mapping(self) -> Path | None:
        path = self.config["model"].get("vocab_mapping_path")
        return self.captured / Path(path).relative_to(FEATURES) if path else None

    @property
    def features(self) -> Path:
        path = Path(self.config["data"]["hidden_states_path"])
        return self.captured / path.relative_to(FEATURES)

    @property
    def samples(self) -> int:
        return len(list(self.features.glob("*.ckpt")))

    @property
    def budget(self) -> dict[str, int]:
        """What replaces settings of the config's training section."""
        # P-EAGLE takes one sample at a time and accumulates.
        accumulates = "accumulation_steps" in self.config["training"]
        size = "accumulation_steps" if accumulates else "batch_size"
        replaced = {
            "num_epochs": self.epochs,
            size: self.batch,
            # Of the run, and of the learning rate's schedule.
            "max_steps": self.max_steps,
            "total_steps": self.max_steps,
        }
        return {name: value for name, value in replaced.items() if value is not None}

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        training = self.config["training"] | self.budget
        per_step = training["batch_size"] * training.get("accumulation_steps", 1)
        return self.max_steps or self.samples // per_step * training["num_epochs"]

    @property
    def command(self) -> list[str]:
        objective = self.objective or VARIANTS.get(self.loss, (f"training.loss={self.loss}",))
        start = [f"model.draft_checkpoint_path={self.start.draft}"] if self.start else []
        return [
            *("specforge", "train", "--config", str(self.config_path), *objective, *start),
            *(f"training.{name}={value}" for name, value in self.budget.items()),
            *self._captured_elsewhere,
            *self.settings,
            f"training.seed={self.seed}",
            "training.log_interval=1",
            "training.save_interval=50",
            "training.max_checkpoints=1",
            f"run_id={self.loss}",
            f"output_dir={self.directory}",
        ]

    @property
    def _captured_elsewhere(self) -> list[str]:
        if self.captured == FEATURES:
            return []
        mapping = self.vocab_mapping
        return [
            f"data.hidden_states_path={self.features}",
            *([f"model.vocab_mapping_path={mapping}"] if mapping else []),
        ]

    def discard_if_outdated(self, device: str = "cpu") -> None:
        """Remove what another command, features, code or kind of device has left behind."""
        current = {"command": self.command, "inputs": self._digest_of_inputs()}
        # A CPU is not named, so that what was made before there was a choice is kept.
        current |= {} if device == "cpu" else {"device": device}
        if not self.made_from.exists() or json.loads(self.made_from.read_text()) != current:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self.made_from.write_text(json.dumps(current, indent=1))

    def _digest_of_inputs(self) -> str:
        """Return a digest of everything a trained draft depends on, beside its command line."""
        digest = hashlib.sha256()
        sources = [self.config_path, self.draft_config, self.features / "capture.json"]
        sources += [self.vocab_mapping] if self.vocab_mapping else []
        sources += [self.start.made_from] if self.start else []
        for path in [*sources, *code_of(self.algorithm)]:
            digest.update(path.read_bytes())
        digest.update(" ".join(sorted(path.name for path in self.features.glob("*.ckpt"))).encode())
        return digest.hexdigest()

    def resumable_command(self) -> list[str]:
        """The command, continuing from the last checkpoint if there is one."""
        if (self.directory / f"{self.loss}-latest").exists():
            # A checkpoint has more than the draft it started from, and SpecForge takes only one.
            no_start = ["model.draft_checkpoint_path="] if self.start else []
            return [*self.command, *no_start, f"training.resume_from={self.directory}"]
        return self.command

    def done_steps(self) -> int:
        """Return the last step in the log."""
        found = re.findall(r"^step (\d+):", self.log.read_text(errors="replace"), re.MULTILINE)
        return int(found[-1]) if found else 0

    def last_metrics(self) -> dict[str, float]:
        """Return what the last step in the log says."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("step ")]
        shown = dict(re.findall(r"'([a-z_0-9]+)': ([-+.0-9e]+)", lines[-1])) if lines else {}
        return {name: float(value) for name, value in shown.items()}

    def export(self) -> None:
        """Write the draft as a Hugging Face folder that engines and `specforge-lk eval` load."""
        temporary = self.draft.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        mapping = ["--vocab-mapping", self.vocab_mapping] if self.vocab_mapping else []
        command = [
            *("specforge", "export", "--to", "hf", "--checkpoint", self.directory),
            *("--draft-config", self.draft_config, *mapping),
            *("--embedding-source", self.config["model"]["target_model_path"]),
            *("--output-dir", temporary),
        ]
        log = self.directory / "export.log"
        if _start([str(word) for word in command], log, threads=1).wait():
            fail(f"export of {self.name} failed", log)
        temporary.rename(self.draft)


def code_of(algorithm: str) -> list[Path]:
    """Return the sources that a trained draft of an algorithm depends on."""
    drafts = Path("specforge_lk/drafts")
    own = (drafts / f"{algorithm}.py").exists()
    return [
        *(sorted(drafts.glob("*.py")) if own else []),
        *sorted(Path("patches").glob("specforge/*/*.patch")),
        *sorted(Path("specforge_lk/losses").glob("*.py")),
        *sorted(Path("specforge_lk/overlap").glob("*.[pc]*")),
    ]


def check_losses(losses: Sequence[str], option: str) -> None:
    """Raise typer.BadParameter unless every loss is registered, and named once."""
    known = [name for name in VARIANTS if name != START]
    known += installed_loss_registry().names
    unknown = [loss for loss in losses if loss not in known]
    if not losses or unknown or len(set(losses)) < len(losses):
        raise typer.BadParameter(
            f"{' '.join(losses)!r}: name losses once each, of {', '.join(known)}",
            param_hint=option,
        )


def capture(
    config: Path,
    features: Path,
    mapping: Path | None,
    *settings: str,
    threads: int,
    samples: int = SAMPLES,
    device: str = "auto",
    responses: Path = RESPONSES,
) -> None:
    """Store the features of the first responses that a config's training reads.

    Args:
        config: a training config of SpecForge.
        features: folder to store in; what is there is kept, what is missing is made.
        mapping: where to write the draft vocabulary; None where the draft has the target's.
        settings: overrides of the config.
        threads: of the process.
        samples: how many responses.
        device: torch device.
        responses: conversation rows.
    """
    vocabulary = ("--vocab-mapping", mapping) if mapping else ()
    execute(
        *("specforge-lk", "capture", "--config", config, "--responses", responses),
        *("--limit", samples, "--device", device, "--out", features, *vocabulary, *settings),
        threads=threads,
    )


def train(trainings: Sequence[Training], cores: int, device: str = "auto") -> None:
    """Train and export every run that has no draft yet, as many at once as there are cores.

    Runs of one length end together: where fewer are left than there are cores, they begin when
    all others have ended, and share the cores. On a GPU they share that.
    """
    device = find_device(device)
    for run in trainings:
        run.discard_if_outdated(device)
    waiting = [run for run in trainings if not run.draft.exists()]
    with ProgressBars(console) as bars:
        running: list[_Running] = []
        while waiting or running:
            together = 0 if running else min(cores, len(waiting))
            for _ in range(together):
                run = waiting.pop(0)
                command = run.resumable_command()
                process = _start(command, run.log, threads=cores // together, device=device)
                bar = bars.add(run.name, run.steps, "steps", done=run.done_steps())
                resumed = command != run.command
                running.append(_Running(run, process, bar, time.monotonic(), resumed))
            time.sleep(0.5)
            for job in list(running):
                job.bar.reach(job.run.done_steps())
                if job.process.poll() is None:
                    continue
                running.remove(job)
                if job.process.returncode:
                    for other in running:
                        other.process.terminate()
                    fail(f"training of {job.run.name} failed", job.run.log)
                if not job.resumed:
                    seconds = round(time.monotonic() - job.began, 1)
                    job.run.seconds_path.write_text(json.dumps(seconds))
                job.run.export()


@dataclass(frozen=True)
class _Running:
    """A training under way; only one that was not ``resumed`` has a time that says something."""

    run: Training
    process: subprocess.Popen[bytes]
    bar: Bar
    began: float
    resumed: bool


def record(path: Path, trainings: Sequence[Training]) -> None:
    """Add to the report at ``path`` how each draft was trained, and draw it again."""
    report = read_report(path)
    current = {(run.algorithm, run.loss, run.seed) for run in trainings}
    report.training = [
        old for old in report.training if (old.algorithm, old.loss, old.seed) not in current
    ]
    report.training += [
        TrainingRecord(
            algorithm=run.algorithm,
            loss=run.loss,
            seed=run.seed,
            command=shlex.join(run.command),
            steps=run.done_steps(),
            seconds=run.seconds,
            last_step=run.last_metrics(),
        )
        for run in trainings
    ]
    report.settings["training_samples"] = max(run.samples for run in trainings)
    write_all(report, path)


def _environment(threads: int, device: str) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Two processes with two threads each would slow each other down tenfold on two cores.
        "OMP_NUM_THREADS": str(threads),
        # Logits of tens of MB come and go in every step: kept in the process, and in huge pages,
        # they make these runs a quarter faster.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ALLOCATOR),
        # Compiling costs more than these short runs could gain.
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        # Where SpecForge trains; it would take a GPU whenever there is one.
        "SPECFORGE_DEVICE": find_device(device),
    }


def _start(
    command: list[str], log: Path, *, threads: int, device: str = "cpu"
) -> subprocess.Popen[bytes]:
    console.print(f"[dim]$ {shlex.join(command)}[/]")
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads, device)
        )


def execute(*command: object, threads: int, device: str = "auto") -> None:
    """Run a command of this interpreter's environment; end the program if it fails.

    ``device`` is where SpecForge's own commands train; those of this project have an option.
    """
    words = [str(word) for word in command]
    console.print(f"[dim]$ {shlex.join(words)}[/]")
    if subprocess.run(words, env=_environment(threads, device), check=False).returncode:
        fail(f"{words[0]} {words[1]} failed")


def fail(message: str, log: Path | None = None) -> None:
    """Show the end of ``log`` and end the program."""
    if log is not None:
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), markup=False)
        message += f"; the whole log is {log}"
    console.print(f"[bold red]{message}[/]")
    raise typer.Exit(1)
