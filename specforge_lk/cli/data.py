"""``specforge-lk data``: released prompts and completions to SpecForge conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge_lk.cli.options import MOST_LEFT_OUT, MaxLeftOut, SkipMalformed, no_effect
from specforge_lk.cli.shell import check_out, errors, name_left_out

EXAMPLE = (
    "specforge-lk data --source nebius/Llama-3.1-8B-Instruct-Infinity-Instruct-0625 "
    "--out conversations.jsonl"
)


@errors()
def run(
    context: typer.Context,
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
    skip_malformed: SkipMalformed = False,
    max_left_out: MaxLeftOut = MOST_LEFT_OUT,
) -> None:
    """Turn prompts and completions into SpecForge conversations, which `capture` reads.

    Rows have an id, the messages of a conversation, and the completion: the layout of the sets
    that the authors of the LK losses released. They are streamed: nothing is downloaded whole.
    Run the same command again after an interruption, or with a larger --limit: rows that are
    there are kept.
    """
    from specforge_lk.cli.progress import ProgressBar
    from specforge_lk.data import released
    from specforge_lk.data.jsonl import RowError, open_lines
    from specforge_lk.data.rows import LeftOut

    no_effect(context, "with --prompts-only", prompts_only, "completion")
    no_effect(context, "without --skip-malformed", not skip_malformed, "max_left_out")
    check_out(out)
    layout = released.Layout(completion, prompts_only)
    settings = {
        "source": source,
        "subset": subset,
        "split": split,
        "completion": None if prompts_only else completion,
    }
    malformed = LeftOut(skip_malformed, max_left_out)
    try:
        rows = released.open_rows(source, subset, split)
        total = min(filter(None, (limit, rows.size)), default=None)
        with open_lines(out, settings) as lines, ProgressBar("reading", total, "rows/s") as bar:
            counts = released.convert(
                rows, lines, layout, limit=limit, malformed=malformed, advance=bar.advance
            )
        earlier = ["a row that an earlier run of this command left out"] * counts.missing
        malformed.check(source, earlier)
    except RowError as error:
        raise ValueError(f"{error}; all rows before it are in {out}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {error}" if source not in str(error) else error) from error
    name_left_out(malformed.left_out)
    what = "prompts" if prompts_only else "conversations"
    typer.echo(
        f"{malformed.rows} rows read, {counts.added} new {what}, "
        f"{len(malformed.left_out) + counts.missing} left out: {out}"
    )
