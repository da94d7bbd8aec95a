"""Read prompts: those to sample responses to, and those of benchmarks."""

from __future__ import annotations

from pathlib import Path

from specforge_lk.data.jsonl import read_jsonl

#: How a benchmark names a data set of the Hugging Face hub instead of a file.
HUB_PREFIX = "hub:"


class DataError(ValueError):
    """A benchmark or held-out file that cannot be read; the message says what to change."""


def read_prompts(path: Path) -> list[dict[str, str]]:
    """Read ``{"id", "prompt"}`` rows; without an id the line's number is the id.

    Raises:
        ValueError: a row has no prompt text, or an id occurs twice.
    """
    prompts: dict[str, dict[str, str]] = {}
    for number, row in enumerate(read_jsonl(path)):
        key = str(row.get("id", number))
        if not isinstance(row.get("prompt"), str):
            raise ValueError(
                f"{path}: row {key!r} has no text in its field 'prompt'; "
                "specforge-lk data --prompts-only writes such rows"
            )
        if key in prompts:
            raise ValueError(
                f"{path}: id {key!r} occurs twice; give every row an id of its own, or leave ids "
                "out: then a row's number in the file is its id"
            )
        prompts[key] = {"id": key, "prompt": row["prompt"]}
    return list(prompts.values())


def read_rows(source: str) -> list[dict]:
    """Read the rows of a benchmark.

    Args:
        source: A JSONL file (also gzipped), or a hub data set ``hub:REPO[:CONFIG][@SPLIT]``.

    Raises:
        DataError: there is no such file, or it has no rows.
        ValueError: a line is not a JSON object.
    """
    if source.startswith(HUB_PREFIX):
        from datasets import load_dataset

        name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
        repo, _, config = name.partition(":")
        return [dict(row) for row in load_dataset(repo, config or None, split=split or "test")]
    try:
        rows = list(read_jsonl(Path(source)))
    except FileNotFoundError as error:
        raise DataError(f"{error}; give a JSONL file or hub:REPO[:CONFIG][@SPLIT]") from error
    if not rows:
        raise DataError(f"{source}: the file has no rows")
    return rows


def user_turns(row: dict, source: str) -> list[str]:
    """Return the user messages of a benchmark row: its ``turns``, ``prompt`` or ``question``.

    Raises:
        DataError: the row has none of these fields.
    """
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
