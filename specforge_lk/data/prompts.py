"""Benchmark prompts from JSONL files and hub datasets."""

from __future__ import annotations

from pathlib import Path

from specforge_lk.data import conversations

#: How a benchmark names a dataset of the Hugging Face hub instead of a file.
HUB_PREFIX = "hub:"


class DataError(ValueError):
    """A benchmark or held-out file that cannot be read; the message says what to change."""


def read_rows(source: str) -> list[dict]:
    """Rows of a JSONL file (also gzipped), or of a hub dataset ``hub:REPO[:CONFIG][@SPLIT]``."""
    if source.startswith(HUB_PREFIX):
        from datasets import load_dataset

        name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
        repo, _, config = name.partition(":")
        return [dict(row) for row in load_dataset(repo, config or None, split=split or "test")]
    try:
        rows = list(conversations.read_rows(Path(source)))
    except FileNotFoundError as error:
        raise DataError(f"{error}; give a JSONL file or hub:REPO[:CONFIG][@SPLIT]") from error
    if not rows:
        raise DataError(f"{source}: the file has no rows")
    return rows


def user_turns(row: dict, source: str) -> list[str]:
    """User messages of a benchmark row: its ``turns``, ``prompt`` or ``question``, one or many."""
    for key in ("turns", "prompt", "question"):
        found = row.get(key)
        if isinstance(found, list) and found:
            return [str(turn) for turn in found]
        if isinstance(found, str):
            return [found]
    raise DataError(
        f"{source}: a row with the fields {sorted(row)} has none of turns, prompt, question; "
        "rename the field that holds the prompt"
    )
