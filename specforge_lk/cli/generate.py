"""``specforge-lk generate``: sample a target's responses to prompts."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

_LOCAL, _SERVER = "Local transformers", "Server"


class Dtype(StrEnum):
    """Floating-point types that a target can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def run(
    prompts: Annotated[
        Path, typer.Option(help='JSONL (or .jsonl.gz) of prompts: {"id": ..., "prompt": ...}.')
    ],
    out: Annotated[
        Path,
        typer.Option(help="JSONL of responses to write. An interrupted run continues it."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder or hub id of the target model. With --server: the name that "
            "the server has for it; its only model by default.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="1 samples the target's own distribution, 0 the most likely tokens."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 160,
    seed: Annotated[int, typer.Option(help="Decides every response, with the prompt's id.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Responses sampled side by side.", rich_help_panel=_LOCAL)
    ] = 64,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="bfloat16 is fast only where the processor has it (AMX, AVX512-BF16).",
            rich_help_panel=_LOCAL,
        ),
    ] = Dtype.FLOAT32,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, ...; auto takes a GPU if any.", rich_help_panel=_LOCAL),
    ] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run model code that comes with the target.",
            rich_help_panel=_LOCAL,
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="Sample from this OpenAI-compatible server (SGLang, vLLM, ...), such as "
            "http://localhost:30000, instead of local transformers.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Most requests under way at once.", rich_help_panel=_SERVER)
    ] = 64,
    top_p: Annotated[
        float,
        typer.Option(
            help="Below 1, only the most likely tokens with this much probability: no longer the "
            "target's own distribution.",
            rich_help_panel=_SERVER,
        ),
    ] = 1.0,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that one response may take.", rich_help_panel=_SERVER),
    ] = 600.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often a request is tried again after lost connections, timeouts and the "
            "statuses 429 and 5xx, with growing pauses.",
            rich_help_panel=_SERVER,
        ),
    ] = 10,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused",
            help="Leave out prompts that the server refuses, such as too long ones, and name them.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    extensions: Annotated[
        bool,
        typer.Option(
            help="Send what SGLang and vLLM have beyond the OpenAI protocol: they return token "
            "ids then, and do not truncate the distribution.",
            rich_help_panel=_SERVER,
        ),
    ] = True,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", show_default=False, rich_help_panel=_SERVER),
    ] = None,
) -> None:
    """Sample the target's responses to prompts, as training data for a draft.

    A draft is trained to agree with the target on the target's own text, so responses come from
    the target itself, at temperature 1. Rows are SpecForge conversations with the sampled token
    ids. Run the same command again after an interruption: finished responses are kept.
    """
    from specforge_lk.cli.progress import ProgressBar
    from specforge_lk.data import sample_local as generate
    from specforge_lk.target import load_target

    if server is None and target is None:
        raise typer.BadParameter("give --target, or --server")
    if server is None and top_p != 1:
        raise typer.BadParameter("--top-p needs --server")
    console = Console(stderr=True)
    left_out = 0
    try:
        sampling = generate.Sampling(temperature, max_new_tokens, seed, top_p)
        rows = generate.read_prompts(prompts)[:limit]
        if server is not None:
            from specforge_lk.data.sample_server import RefusedPrompt, Server

            source = Server(
                *(server, api_key, concurrency, timeout, retries, extensions),
                note=lambda text: console.print(Text(text, "yellow"), soft_wrap=True),
            )
            target = target or source.only_model()
        settings = generate.settings_of(
            target, dtype.value if server is None else "server", sampling
        )
        with generate.open_responses(out, settings) as responses:
            todo = generate.pending(rows, responses)
            if todo and server is None:
                model, tokenizer = load_target(
                    target, dtype.value, device, trust_remote_code=trust_remote_code
                )
            with ProgressBar("sampling", len(todo) * max_new_tokens, "tok/s") as bar:
                if server is not None:

                    def refuse(error: RefusedPrompt) -> None:
                        nonlocal left_out
                        left_out += 1
                        bar.print(str(error))

                    replace(source, note=bar.note).respond(
                        target,
                        todo,
                        sampling,
                        save=responses.append,
                        advance=bar.advance,
                        refused=refuse if skip_refused else None,
                    )
                else:
                    for start in range(0, len(todo), batch_size):
                        batch = todo[start : start + batch_size]
                        responses.append(
                            generate.generate(
                                model, tokenizer, batch, sampling, advance=bar.advance
                            )
                        )
            answered = responses.answered
    except (OSError, ValueError, ImportError) as error:
        message = str(error)
        if isinstance(error, ImportError):
            message += "; install with: pip install 'specforge-lk[data]'"
        console.print(Text(message, "red"), soft_wrap=True)
        raise typer.Exit(1) from error
    wanted = [answered[row["id"]] for row in rows if row["id"] in answered]
    tokens = sum(row.tokens or 0 for row in wanted)
    finished = sum(row.finished for row in wanted)
    line = (
        f"{len(wanted)} responses ({len(todo) - left_out} new, {finished} finished), "
        f"{tokens} tokens: {out}"
    )
    if left_out:
        line += f"; {left_out} prompts were refused"
    if without := sum(row.tokens is None for row in wanted):
        line += f"; {without} without token ids, whose text `capture` will tokenize"
    typer.echo(line)
