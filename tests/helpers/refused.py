"""Commands that refuse what they are given, and damage to give them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from training_run import Finished, Setup


def assert_named(finished: Finished, *words: str) -> None:
    """The command failed without a traceback, and its last line holds all words."""
    assert finished.returncode and "Traceback" not in finished.output, finished.tail(20)
    for word in words:
        assert word in finished.tail(1), finished.tail(20)


def assert_refused(finished: Finished, *words: str) -> None:
    """The same, before any step."""
    assert_named(finished, *words)
    assert not finished.steps, finished.tail()


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        torch.save(change(torch.load(path, weights_only=True)), path)

    return damage


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def draft_with(setup: Setup, name: str, **changes: object) -> Path:
    path = setup.root / f"{name}.json"
    path.write_text(json.dumps(json.loads(setup.draft_config.read_text()) | changes))
    return path
