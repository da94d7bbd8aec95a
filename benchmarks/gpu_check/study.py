"""The first rows of the fine-tuning study on the device, by the command that makes the others.

A KL draft of SmolLM2-135M-Instruct is fine-tuned with KL, with LK losses and for the chain, at more
steps than the rows of a CPU have, and measured under every serving rule.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu_check.record import ROOT, Record
from experiments.assets import TARGET_PACKAGE
from experiments.gains.results import Results
from specforge_lk.files import atomic_write

#: Options of `make gains`, and of its rehearsal.
SIZE: Final = {
    "--architectures": "eagle3",
    "--objectives": "lk_lambda-10 tau tv",
    "--seeds": "0",
    "--start-steps": "1536",
    "--steps": "384",
}
TINY: Final = {
    **SIZE,
    "--objectives": "tv",
    "--start-steps": "2",
    "--steps": "2",
    "--samples": "8",
    "--conversations": "2",
}


def run(record: Record) -> None:
    """Train, measure, and copy what every draft accepts into the report."""
    if not _target_is_there(record.model):
        reason = "the model's parts are not there: make gpu-bundle GPU=--model, then --model DIR"
        record.row(section="study", skipped=reason)
        record.ended = "skipped"
        return
    rows = record.path.with_name("gains.json").resolve()
    options = [word for option in (TINY if record.dry else SIZE).items() for word in option]
    command = [sys.executable, "-m", "experiments.gains", "fine-tune", *options]
    command += ["--device", record.device, "--results", str(rows)]
    log = record.path.with_name("study.log")
    with log.open("w") as output:
        ended = _run(command, record.seconds_left, output)
    found = Results.read(rows).rows if rows.exists() else []
    for row in found:
        taus = {rule: measured.tau for rule, measured in row.measured.items()}
        gains = {
            rule: [measured.gain.difference, *measured.gain.ci]
            for rule, measured in row.measured.items()
            if measured.gain and measured.gain.ci
        }
        record.row(
            section="study",
            architecture=row.architecture,
            objective=row.objective,
            start_steps=row.start_steps,
            steps=row.steps,
            device=row.device,
            seconds=row.seconds,
            tau=taus,
            gain_over_kl=gains,
        )
    if ended != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        late = ended is None
        if late:
            record.left_out.append("the rest of the study")
        record.row(section="study", ended="out of time" if late else "failed", log=tail, ok=late)


def _target_is_there(model: Path | None) -> bool:
    """Join the parts of the target's package where they are given; whether there is a target."""
    name, version = TARGET_PACKAGE.split("==")
    wheels = ROOT / "runs" / "assets"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if (ROOT / "runs" / "target").exists() or list(wheels.glob(pattern)):
        return True
    parts = sorted(model.glob(f"{pattern}.*-of-*")) if model else []
    if not parts or len(parts) != int(parts[0].name.rpartition("-")[2]):
        return False
    with atomic_write(wheels / parts[0].name.rpartition(".")[0]) as whole:
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    return True


def _run(command: list[str], seconds: float, output: Any) -> int | None:
    """Return the status of a command; None where it was ended for being late."""
    # In the phase's group, which is ended as a whole if the phase must be.
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        # Of the whole group, its trainings too, but for this process.
        kept = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        process.wait()
        signal.signal(signal.SIGTERM, kept)
        return None
