"""The report of a phase, on disk after every row; and what the figures were measured on."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from benchmarks.measure import write_json

ROOT: Final = Path(__file__).resolve().parents[2]
#: Packages that figures depend on, beside torch.
PACKAGES: Final = ("triton", "numpy", "transformers", "specforge", "specforge-lk")
Item = TypeVar("Item")


def machine(device: str) -> dict[str, Any]:
    """Describe the card, its driver and the versions; a CPU is a rehearsal."""
    found: dict[str, Any] = {"card": "CPU", "python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    """Return the driver's version as nvidia-smi has it; None where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def folder_name(card: str) -> str:
    """Return the name of a card's folder: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@dataclass
class Record:
    """What a phase has measured, written after every row.

    Attributes:
        path: the JSON file.
        head: facts for its top.
        device: that the phase runs on.
        dry: whether everything is tiny, and no time means anything.
        deadline: of `time.monotonic`; nothing is begun after it.
        model: folder of the parts of the target that drafts are trained for.
        rows: what was measured.
        left_out: what there was no time for.
        ended: "under way", "whole", "out of time", "skipped", or what went wrong.
    """

    path: Path
    head: dict[str, Any]
    device: str
    dry: bool
    deadline: float
    model: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    ended: str = "under way"
    began: float = field(default_factory=time.monotonic)

    def row(self, **values: Any) -> None:
        """Add a row, print it, and write all of them."""
        self.rows.append(values)
        print("  " + ", ".join(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write the report as it is now."""
        content = {
            **self.head,
            "dry": self.dry,
            "ended": self.ended,
            "seconds": round(time.monotonic() - self.began, 1),
            "left_out": self.left_out,
            "rows": self.rows,
        }
        write_json(self.path, content)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items that there is time to begin; name the others."""
        for item in items:
            if time.monotonic() < self.deadline:
                yield item
            else:
                self.left_out.append(str(item))

    @contextmanager
    def guarded(self, **values: Any) -> Iterator[None]:
        """Go on after what raises: a row of these values says what it was, and is wrong."""
        try:
            yield
        except Exception as error:
            self.row(**values, failure=described(error), ok=False)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; at least 1."""
        return max(1.0, self.deadline - time.monotonic())

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows that were checked and are wrong."""
        return [row for row in self.rows if row.get("ok") is False]


def described(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    return str(value)


def unfinished(folder: Path, phases: Iterable[str], head: Mapping[str, Any]) -> list[str]:
    """Return the phases that have no whole report of this code on this machine.

    Those that were begun before come last: what went wrong may go wrong again.
    """
    begun, new = [], []
    for name in phases:
        try:
            found = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            new.append(name)
            continue
        same = all(found.get(fact) == head[fact] for fact in ("machine", "commit", "contents"))
        # A checkout with changes has no name that would tell it from others.
        named = head["contents"] is not None or not head["commit"].endswith("+")
        if not (same and named and found.get("dry") == head["dry"]):
            new.append(name)
        elif found["ended"] != "whole":
            begun.append(name)
    return new + begun


def code() -> dict[str, str | None]:
    """Return the commit of the code, and of a bundle the digest of what it holds."""
    bundle = ROOT / "bundle.json"
    if bundle.exists():
        packed = json.loads(bundle.read_text())
        return {"commit": packed["commit"], "contents": packed["contents"]}
    return {"commit": checked_out(), "contents": None}


def checked_out() -> str:
    """Return the commit that is checked out, with a ``+`` where files differ from it."""
    return _git("rev-parse", "HEAD").strip() + ("+" if _git("status", "--porcelain") else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout
