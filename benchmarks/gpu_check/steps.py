"""A whole training step of every algorithm at Llama-3.1-8B's size: time and peak memory.

SpecForge's own objective, the registered loss, and the registered loss without logits train the
same draft on the same random features, one after another.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.gpu_check.record import Record, described
from benchmarks.gpu_check.timing import peak_mib, tidy
from benchmarks.gpu_check.trainers import (
    ALGORITHMS,
    OPTIONAL,
    Drafted,
    Workshop,
    llama,
    tiny,
    ways_of,
)

#: Those first that the most is expected of.
_FIRST: Final = ("eagle3", "dflash", "mtp", "medusa")
ORDER: Final = (*_FIRST, *(name for name in ALGORITHMS if name not in _FIRST))
#: Timed steps, and the seconds after which there are no more.
STEPS: Final = 7
SECONDS: Final = 4.0


def run(record: Record) -> None:
    """Measure the algorithms, each in all its ways before the next."""
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)  # type: ignore[attr-defined]
        backend = "nccl" if record.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        size = tiny() if record.dry else llama()
        shop = Workshop(Path(scratch) / "size", size, record.device)
        for algorithm in record.each(ORDER):
            draft: Drafted | None = None
            for way in record.each(ways_of(algorithm)):
                row: dict[str, Any] = {"section": "step", "algorithm": algorithm, "way": way}
                row |= {"size": _said(shop, algorithm)}
                try:
                    draft = draft or shop.draft(algorithm)
                    row |= _measured(draft, way, record.device)
                except torch.OutOfMemoryError as error:  # which is a figure
                    row["failure"] = described(error)
                except ValueError as error:
                    # SpecForge names what an algorithm cannot do, such as a loss without logits.
                    row["failure"] = described(error)
                    row |= {} if way in OPTIONAL else {"ok": False}
                except Exception as error:
                    row |= {"failure": described(error), "ok": False}
                record.row(**row)
                tidy(record.device)
            del draft
            tidy(record.device)
        dist.destroy_process_group()


def _said(shop: Workshop, algorithm: str) -> str:
    size = shop.size
    batch = size.batch_of(algorithm)
    return f"{batch} x {size.length}, K {size.heads}, V {size.target['vocab_size']}"


def _measured(draft: Drafted, way: str, device: str) -> dict[str, Any]:
    trainer = draft.trainer(way)
    losses: list[float] = []

    def step() -> None:
        loss = trainer.step()
        losses.append(math.nan if loss is None else loss)

    first = _seconds(step, device)
    times: list[float] = []
    while not times or (device == "cuda" and len(times) < STEPS and sum(times) < SECONDS):
        times.append(_seconds(step, device))
    return {
        "step_ms": round(1e3 * statistics.median(times), 3),
        "steps": len(times),
        "first_ms": round(1e3 * first, 1),
        "peak_mib": peak_mib(step, device),
        "held_mib": _held(device),
        "loss": losses[0],
        "ok": all(map(math.isfinite, losses)),
    }


def _held(device: str) -> float | None:
    """Return what model, optimizer and batch take."""
    return None if device == "cpu" else round(torch.cuda.memory_allocated() / 2**20, 1)


def _seconds(step: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
