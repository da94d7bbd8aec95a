"""A whole EAGLE-3 training step of the demo's draft: losses of this project and SpecForge's own.

Patched and unpatched SpecForge have the same package name, so each lives in a process of its own
(`step_worker`). This process gives them their turns, one step at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.measure import Results, distribution
from specforge_lk import patching
from specforge_lk.cli.progress import each
from specforge_lk.files import atomic_write
from tools.wheels import SPECFORGE, WHEELS, wheel

SOURCES: Final = ("benchmarks.training_step", "benchmarks.step_worker", "tools.wheels")
ROOT: Final = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cell:
    """A size: batch of sequences, training-time-test steps (``heads``), draft vocabulary.

    Half of each sequence is supervised: its end, as a response is.
    """

    batch: int
    sequence: int
    heads: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.sequence}, {self.heads} heads, V_d {self.vocabulary}"


GRID: Final = tuple(Cell(4, 256, 4, vocabulary) for vocabulary in (4096, 32000))
QUICK: Final = (Cell(1, 16, 2, 256),)

ROUNDS: Final = 7

#: Turns of a round: which SpecForge, and its loss.
TURNS: Final = (
    *(("patched", loss) for loss in ("kl", "lk_alpha", "lk_lambda", "tau")),
    *(("unpatched", loss) for loss in ("kl", "lk_alpha", "lk_lambda")),
)
NOTE: Final = (
    "unpatched: the wheel with the first patch only, which gives its KL a PyTorch fallback, since "
    "its Triton kernel does not run on CPUs; the target head is float32 in both"
)


def run(
    path: Path, grid: tuple[Cell, ...], *, budget: float, fresh: bool, console: Console
) -> None:
    """Measure the cells that ``path`` does not hold yet; arguments as for `operation.run`.

    ``budget`` changes nothing here: a step is long, and differences between losses are small.
    """
    results = Results(path, *SOURCES, fresh=fresh, note=NOTE, specforge=SPECFORGE)
    waiting = [cell for cell in grid if not results.has(asdict(cell))]
    for cell in each("training step", waiting, console):
        results.add(asdict(cell), implementations=_measure(cell))


def _measure(cell: Cell) -> dict[str, dict[str, Any]]:
    with _worker(cell, None) as patched, _worker(cell, _unpatched()) as unpatched:
        workers = {"patched": patched, "unpatched": unpatched}

        def one_round() -> dict[str, dict[str, float]]:
            return {f"{which} {loss}": _step(workers, which, loss) for which, loss in TURNS}

        first = one_round()  # compiles
        rounds = [one_round() for _ in range(ROUNDS)]
    return {
        name: {
            **distribution([steps[name]["seconds"] for steps in rounds]),
            "first_seconds": first[name]["seconds"],
            "memory": {"resident": max(steps[name]["resident"] for steps in rounds)},
            "loss": first[name]["loss"],
        }
        for name in first
    }


def _unpatched() -> Path:
    """Return a directory of SpecForge with the Triton-less loss as its only patch."""
    directory = WHEELS / f"{SPECFORGE.replace('==', '-')}-cpu"
    if not directory.exists():
        first = patching.load_series(patching.SPECFORGE).patches[0]
        with atomic_write(directory) as temporary:
            shutil.copytree(wheel(SPECFORGE), temporary)
            patching.git_apply(temporary, first, "--include=specforge/*")
    return directory


Worker = subprocess.Popen[str]


@contextmanager
def _worker(cell: Cell, specforge: Path | None) -> Iterator[Worker]:
    """Start a `step_worker`; ``specforge``: where its SpecForge is, if not the installed one."""
    path = [ROOT] if specforge is None else [specforge, ROOT]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step_worker", json.dumps(asdict(cell))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(p.resolve()) for p in path),
            "PYTHONWARNINGS": "ignore",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            # The end of its input ends it.
            process.communicate()


def _step(workers: dict[str, Worker], which: str, loss: str) -> dict[str, float]:
    worker = workers[which]
    assert worker.stdin is not None and worker.stdout is not None  # pipes: see `_worker`
    print(loss, file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the {which} worker ended in a step of {loss}; its errors are above")
    answer = json.loads(line)
    if answer["patched"] != (which == "patched"):
        raise RuntimeError(f"the {which} worker found another SpecForge: set it up anew")
    return answer
