"""``specforge-lk generate``: sample a target's responses to prompts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


class Dtype(StrEnum):
    """Floating-point types that a target can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def run(
    target: Annotated[str, typer.Option(help="Hugging Face folder or hub id of the target model.")],
    prompts: Annotated[
        Path, typer.Option(help='JSONL (or .jsonl.gz) of prompts: {"id": ..., "prompt": ...}.')
    ],
    out: Annotated[
        Path,
        typer.Option(help="JSONL of responses to write. An interrupted run continues it."),
    ],
    temperature: Annotated[
        float,
        typer.Option(help="1 samples the target's own distribution, 0 the most likely tokens."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 160,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled side by side.")] = 64,
    dtype: Annotated[
        Dtype,
        typer.Option(help="bfloat16 is fast only where the processor has it (AMX, AVX512-BF16)."),
    ] = Dtype.FLOAT32,
    seed: Annotated[int, typer.Option(help="Decides every response, with the prompt's id.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if any.")] = "auto",
) -> None:
    """Sample the target's responses to prompts, as training data for a draft.

    A draft is trained to agree with the target on the target's own text, so responses come from
    the target itself, at temperature 1. Rows are SpecForge conversations with the sampled token
    ids. Run the same command again after an interruption: finished responses are kept.
    """
    from specforge_lk import generate
    from specforge_lk.cli.progress import ProgressBar
    from specforge_lk.targets import load_target

    try:
        sampling = generate.Sampling(temperature, max_new_tokens, seed)
        rows = generate.read_prompts(prompts)[:limit]
        settings = generate.settings_of(target, dtype.value, sampling)
        with generate.open_responses(out, settings) as responses:
            todo = generate.pending(rows, responses)
            if todo:
                model, tokenizer = load_target(target, dtype.value, device)
            with ProgressBar("sampling", len(todo) * max_new_tokens, "tok/s") as bar:
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    responses.append(
                        generate.generate(model, tokenizer, batch, sampling, advance=bar.advance)
                    )
            wanted = [responses.rows[row["id"]] for row in rows]
    except (OSError, ValueError) as error:
        Console(stderr=True).print(Text(str(error), "red"), soft_wrap=True)
        raise typer.Exit(1) from error
    tokens = sum(len(row["response_ids"]) for row in wanted)
    finished = sum(row["finished"] for row in wanted)
    typer.echo(
        f"{len(wanted)} responses ({len(todo)} new, {finished} finished), {tokens} tokens: {out}"
    )
