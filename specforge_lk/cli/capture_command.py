"""``specforge-lk capture``: write SpecForge's offline features from a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from specforge_lk.cli.generate_command import Dtype


def run(
    config: Annotated[Path, typer.Option(help="SpecForge run config (YAML or JSON).")],
    responses: Annotated[
        Path,
        typer.Option(help="Conversations as JSONL or .jsonl.gz, such as `generate` writes."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of features. Default: data.hidden_states_path."),
    ] = None,
    vocab_mapping: Annotated[
        Path | None,
        typer.Option(
            help="Also write the draft vocabulary here: the draft_vocab_size tokens most frequent "
            "in these responses. Use it as model.vocab_mapping_path."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Type to compute in. Default: model.torch_dtype on a GPU, float32 on a CPU. "
            "Features are stored in model.torch_dtype in any case.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first responses.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one forward pass, padding included.")
    ] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if any.")] = "auto",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config overrides, as for specforge train: section.field=value."),
    ] = None,
) -> None:
    """Write the feature files that SpecForge trains from offline, for any of its algorithms.

    The algorithm in the config (training.strategy) decides which layers of the target are
    captured and what the features are called. Run the same command again after an interruption:
    whole feature files of the same responses are kept.
    """
    try:
        _run(config, responses, out, vocab_mapping, dtype, limit, batch_tokens, device, overrides)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        message = str(error)
        if isinstance(error, ImportError):
            message += "; capture needs SpecForge: pip install 'specforge-lk[specforge,data]'"
        Console(stderr=True).print(Text(message, "red"), soft_wrap=True)
        raise typer.Exit(1) from error


def _run(
    config: Path,
    responses: Path,
    out: Path | None,
    vocab_mapping: Path | None,
    dtype: Dtype | None,
    limit: int | None,
    batch_tokens: int,
    device: str,
    overrides: list[str] | None,
) -> None:
    import torch

    from specforge_lk import capture
    from specforge_lk.cli.progress import ProgressBar
    from specforge_lk.targets import load_target

    resolved, target_config = _resolve(config, out, overrides)
    run = resolved.run.config
    directory = Path(run.data.hidden_states_path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = dtype or Dtype(run.model.torch_dtype if device != "cpu" else "float32")

    model, tokenizer = load_target(
        run.model.target_model_path,
        compute.value,
        device,
        head=False,
        trust_remote_code=run.model.trust_remote_code,
    )
    samples = capture.read_samples(
        responses,
        tokenizer,
        directory,
        vocab_size=target_config.vocab_size,
        max_length=run.data.max_length,
        limit=limit,
        loss_mask_filter=resolved.loss_mask_filter,
    )
    if not samples.kept:
        raise ValueError(f"{responses} has no response with supervised tokens to capture")
    names = resolved.layout.output_names
    capture.open_directory(
        directory,
        names,
        {
            "target": run.model.target_model_path,
            "responses": responses.name,
            "responses_sha256": capture.file_digest(responses),
            "layers": list(resolved.capture_layers),
            "max_length": run.data.max_length,
            "compute_dtype": compute.value,
            "stored_dtype": run.model.torch_dtype,
        },
    )
    if vocab_mapping:
        if not resolved.run.algorithm.spec.capabilities.supports_vocab_mapping:
            raise ValueError(
                f"training.strategy={run.training.strategy} drafts from the whole vocabulary; "
                "leave out --vocab-mapping"
            )
        counts = samples.token_counts()
        size = resolved.draft_config.draft_vocab_size
        mapping = capture.vocabulary_mapping(counts, size, target_config.vocab_size)
        capture.save_mapping(mapping, vocab_mapping)
        share = capture.coverage(mapping, counts)
        typer.echo(
            f"draft vocabulary of {size} covers {share:.1%} of these tokens: {vocab_mapping}"
        )
    todo = [sample for sample in samples.kept if not capture.is_captured(sample, names)]
    total = sum(len(sample.tokens.input_ids) for sample in todo)
    with ProgressBar("capturing", total, "tok/s") as bar:
        for batch in capture.batches(todo, batch_tokens):
            capture.capture(
                model,
                batch,
                layers=resolved.capture_layers,
                layout=resolved.layout,
                dtype=getattr(torch, run.model.torch_dtype),
            )
            tokens = sum(len(sample.tokens.input_ids) for sample in batch)
            bar.advance(tokens, tokens)
    supervised = sum(sum(sample.tokens.loss_mask) for sample in samples.kept)
    typer.echo(
        f"{len(samples.kept)} samples ({len(todo)} new, {samples.truncated} cut to "
        f"{run.data.max_length} tokens, {samples.skipped} skipped), {supervised} supervised "
        f"tokens, layers {list(resolved.capture_layers)}: {directory}"
    )
    foreign = set(directory.rglob("*.ckpt*")) - {sample.path for sample in samples.kept}
    if foreign:
        typer.echo(f"{directory} has {len(foreign)} more feature files, which training will read")


def _resolve(config: Path, out: Path | None, overrides: list[str] | None) -> tuple[Any, Any]:
    """The algorithm's capture plan and the target's text config."""
    from specforge.application.composition import resolve_offline_capture
    from specforge.config import load_config

    from specforge_lk.targets import load_target_config

    if not config.is_file():
        raise FileNotFoundError(f"config {config} does not exist")
    place = [f"data.hidden_states_path={out}"] if out else []
    run = load_config(str(config), [*(overrides or []), *place])
    if run.mode != "offline":
        raise ValueError(
            "there is no directory for the features; set data.hidden_states_path or --out"
        )
    target_config = load_target_config(
        run.model.target_model_path, trust_remote_code=run.model.trust_remote_code
    )
    resolved = resolve_offline_capture(run, target_config=target_config)
    return resolved, getattr(target_config, "text_config", target_config)
