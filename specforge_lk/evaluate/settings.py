"""What an evaluation is asked for, and what identifies its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: Part of every fingerprint; raise it when a change makes earlier figures incomparable.
MEASUREMENT = 2

#: Called with tokens processed, and with the share of the announced total they stand for.
Advance = Callable[[int, int], None]


class Progress(Protocol):
    """A progress display, such as `specforge_lk.cli.progress.ProgressBar`."""

    def advance(self, items: int, work: int) -> None:
        """Count ``items`` for the rate and ``work`` towards the total."""
        ...


#: Opens a progress display: (description, total).
Track = Callable[[str, int], AbstractContextManager[Progress]]


def silent(items: int, work: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation; part of each result's fingerprint.

    Attributes:
        heads: drafted tokens per verification step, K.
        max_new_tokens: longest response to a benchmark's prompt.
        limit: rows of each benchmark to use, from its start; None for all.
        held_out_limit: the same for held-out responses.
        batch_size: prompts (conversations) per batch.
        max_length: longest conversation, in tokens; longer ones are left out.
        turns: benchmark turns to answer (MT-bench has two).
        seed: of all sampling and of the bootstrap.
    """

    heads: int = 7
    max_new_tokens: int = 256
    limit: int | None = None
    held_out_limit: int | None = None
    batch_size: int = 32
    max_length: int = 2048
    turns: int = 1
    seed: int = 0

    def longest(self, max_positions: int) -> int:
        """Return how many tokens a conversation may have with a target of so many positions.

        What it is padded by for the last chains has positions, too.
        """
        return min(self.max_length, max_positions - self.heads - 1)

    def longest_prompt(self, max_positions: int) -> int:
        """Return how many tokens a prompt may have, so that any response to it fits."""
        return self.longest(max_positions) - self.max_new_tokens


def digest(source: str) -> str:
    """Return the identity of a file, a model folder or a hub name, by content where it is cheap."""
    path = Path(source)
    content = hashlib.sha256()
    if path.is_file():
        content.update(path.read_bytes())
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".safetensors", ".jinja", ".bin", ".pt"):
                content.update(file.name.encode())
                with file.open("rb") as handle:
                    content.update(hashlib.file_digest(handle, "sha256").digest())
    else:
        content.update(source.encode())
    return content.hexdigest()


def fingerprint(*parts: object) -> str:
    """Return 16 digits that change with any of the parts, which JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


__all__ = [
    "MEASUREMENT",
    "Advance",
    "Progress",
    "Settings",
    "Track",
    "digest",
    "fingerprint",
    "silent",
]
