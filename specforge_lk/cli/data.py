"""``specforge-lk data``: released prompts and completions to SpecForge conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge_lk.cli.shell import MOST_LEFT_OUT, errors, max_left_out_option

EXAMPLE = (
    "specforge-lk data --source nebius/Llama-3.1-8B-Instruct-Infinity-Instruct-0625 "
    "--out conversations.jsonl"
)


@errors()
def run(
    source: Annotated[
        str,
        typer.Option(
            help="Hub id of a data set, a folder in a hub data set's layout, or a .parquet, .jsonl "
            "or .jsonl.gz file."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="JSONL of conversations to write. An interrupted run continues it.")
    ],
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a data set that has several.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    completion: Annotated[
        str, typer.Option(help="Field of the completion, where a row has those of several targets.")
    ] = "generated_message",
    prompts_only: Annotated[
        bool,
        typer.Option("--prompts-only", help="Write prompts for `generate`, without completions."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of the data set.")
    ] = None,
    skip_malformed: Annotated[
        bool,
        typer.Option("--skip-malformed", help="Leave out rows that lack a field, and count them."),
    ] = False,
    max_left_out: Annotated[float, max_left_out_option()] = MOST_LEFT_OUT,
) -> None:
    """Turn prompts and completions into SpecForge conversations, which `capture` reads.

    Rows have an id, the messages of a conversation, and the completion: the layout of the sets
    that the authors of the LK losses released. They are streamed: nothing is downloaded whole.
    Run the same command again after an interruption, or with a larger --limit: rows that are
    there are kept.
    """
    from specforge_lk.cli.progress import ProgressBar
    from specforge_lk.data import released
    from specforge_lk.data.jsonl import open_lines

    layout = released.Layout(completion, prompts_only)
    settings = {
        "source": source,
        "subset": subset,
        "split": split,
        "completion": None if prompts_only else completion,
    }
    try:
        rows = released.open_rows(source, subset, split)
        total = min(filter(None, (limit, released.known_size(rows))), default=None)
        with open_lines(out, settings) as lines, ProgressBar("reading", total, "rows/s") as bar:
            counts = released.convert(
                rows,
                lines,
                layout,
                limit=limit,
                skip_malformed=skip_malformed,
                advance=bar.advance,
            )
    except released.MalformedRow as error:
        raise ValueError(
            f"{source}: {error}; all rows before it are in {out}, and --skip-malformed goes on"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {error}" if source not in str(error) else error) from error
    read = counts.before + counts.added + counts.left_out
    what = "prompts" if prompts_only else "conversations"
    if counts.left_out > max_left_out * read:
        raise ValueError(
            f"{source}: {counts.left_out} of {read} rows were left out, more than a share of "
            f"{max_left_out:g}; all others are in {out}. Mend the source, or allow more with "
            "--max-left-out"
        )
    typer.echo(f"{read} rows read, {counts.added} new {what}, {counts.left_out} left out: {out}")
