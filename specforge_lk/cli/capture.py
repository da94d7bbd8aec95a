"""``specforge-lk capture``: write what SpecForge trains from, a target's features or tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specforge_lk.cli.options import (
    MOST_LEFT_OUT,
    ChatTemplateArgs,
    Device,
    Dtype,
    MaxLeftOut,
    Overrides,
    SkipMalformed,
    no_effect,
    parse_chat_template_args,
)
from specforge_lk.cli.progress import ProgressBar
from specforge_lk.cli.shell import check_out, errors, find_device, name_left_out, say

if TYPE_CHECKING:
    from specforge_lk.data.capture import Samples

EXAMPLE = "specforge-lk capture --config run.yaml --responses responses.jsonl"
_STREAMED = "in a streamed run (data.prompts_path), which captures no features here"


@errors(memory="lower --batch-tokens")
def run(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="SpecForge run config (YAML or JSON).")],
    responses: Annotated[
        Path,
        typer.Option(help="Conversations as JSONL or .jsonl.gz, such as `generate` writes."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write the features to. Default: data.hidden_states_path."),
    ] = None,
    vocab_mapping: Annotated[
        Path | None,
        typer.Option(
            help="Also write the draft vocabulary to this file: the draft_vocab_size tokens that "
            "are most frequent in the responses. model.vocab_mapping_path names it in training."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Type to compute in: float32, bfloat16 or float16. Default: model.torch_dtype on "
            "a GPU, float32 on a CPU. Features are stored in model.torch_dtype in any case.",
            metavar="TYPE",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first responses.")] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one forward pass, padding included.")
    ] = 4096,
    skip_malformed: SkipMalformed = False,
    max_left_out: MaxLeftOut = MOST_LEFT_OUT,
    chat_template_args: ChatTemplateArgs = None,
    device: Device = "auto",
    overrides: Overrides = None,
) -> None:
    """Write the feature files that SpecForge trains from offline, for any of its algorithms.

    The algorithm in the config (training.strategy) decides which layers of the target are
    captured and what the features are called. Run the same command again after an interruption:
    whole feature files of the same responses are kept.

    A streamed run is one with data.prompts_path. Its features are captured by servers, so this
    command loads no target. It writes tokens and loss masks to data.prompts_path, the same ones
    that feature files have. SpecForge itself would make other tokens from conversations: it adds
    the system prompt of data.chat_template.
    """
    from specforge.application.composition import resolve_run
    from specforge.runtime.data_plane.feature_contents import FeatureContents

    from specforge_lk.data import capture
    from specforge_lk.data.conversations import Chat
    from specforge_lk.data.rows import LeftOut
    from specforge_lk.target import load_eos_ids, load_tokenizer

    arguments = parse_chat_template_args(chat_template_args)
    run, target_config = _load(config, out, overrides)
    algorithm = resolve_run(run).algorithm
    streamed = run.mode == "online"
    no_effect(context, _STREAMED, streamed, "dtype", "batch_tokens", "device")
    plan = None if streamed else _plan(run, target_config)
    place = Path(run.data.prompts_path if streamed else run.data.hidden_states_path)
    check_out(place, folder=not streamed)
    if vocab_mapping:
        check_out(vocab_mapping)
    vocab_size = target_config.get_text_config().vocab_size
    if vocab_mapping and run.model.draft_checkpoint_path:
        raise ValueError(
            f"model.draft_checkpoint_path={run.model.draft_checkpoint_path}: that draft has a "
            "vocabulary, which its training keeps; leave out --vocab-mapping"
        )
    if vocab_mapping and not algorithm.spec.capabilities.supports_vocab_mapping:
        raise ValueError(
            f"training.strategy={run.training.strategy} drafts from the whole vocabulary; "
            "leave out --vocab-mapping"
        )
    target, trusted = run.model.target_model_path, run.model.trust_remote_code
    tokenizer = load_tokenizer(target, trust_remote_code=trusted)
    ends = load_eos_ids(target, tokenizer, trust_remote_code=trusted)
    chat = Chat(tokenizer, ends, arguments)
    samples = capture.read_samples(
        responses,
        chat,
        place,
        vocab_size=vocab_size,
        max_length=run.data.max_length,
        limit=limit,
        loss_mask_filter=algorithm.providers.model.loss_mask_filter,
        malformed=LeftOut(skip_malformed, max_left_out),
    )
    name_left_out([*samples.malformed, *samples.skipped])
    if not samples.kept:
        raise ValueError(
            f"{responses} has nothing to train on: every row was left out; mend them, or raise "
            f"data.max_length={run.data.max_length}"
        )
    decoder = None
    if plan:
        decoder = _prepare(
            *(run, plan, responses, place, dtype, find_device(device), samples, arguments)
        )
    if vocab_mapping:
        _write_mapping(run, algorithm, samples, vocab_size, vocab_mapping)
    supervised = sum(sum(sample.loss_mask) for sample in samples.kept)
    cut = f"{samples.truncated} cut to {run.data.max_length} tokens, {len(samples.skipped)} skipped"
    if samples.malformed:
        cut += f", {len(samples.malformed)} malformed"
    for note, count in chat.notes.items():
        say(f"{count} {note}", "yellow", stderr=True)
    if not plan:
        capture.write_tokens(samples.kept, place)
        typer.echo(f"{len(samples.kept)} samples ({cut}), {supervised} supervised tokens: {place}")
        return
    contents = FeatureContents.of(
        plan.layout,
        plan.capture_layers,
        target_config.get_text_config().hidden_size,
        vocab_size,
    )
    new = _write_features(decoder, plan, samples, contents, batch_tokens, run.model.torch_dtype)
    capture.close_directory(place, samples.kept)
    typer.echo(
        f"{len(samples.kept)} samples ({new} new, {cut}), {supervised} supervised tokens, "
        f"layers {list(plan.capture_layers)}: {place}"
    )
    foreign = {*place.rglob("*.ckpt"), *place.rglob("*.ckpt.gz")} - {
        sample.path for sample in samples.kept
    }
    if foreign:
        typer.echo(f"{place} has {len(foreign)} more feature files, which training will read")


def _plan(run: Any, target_config: Any) -> Any:
    """Return what SpecForge's algorithm wants captured, its ``OfflineCapturePlan``."""
    from specforge.application.composition import resolve_offline_capture

    from specforge_lk.target import layer_ids_are_inputs

    plan = resolve_offline_capture(run, target_config=target_config)
    if (
        plan.capture_method == "eagle3"
        and plan.layout.aux_feature
        and layer_ids_are_inputs(target_config, plan.capture_layers)
    ):
        raise ValueError(
            f"model.aux_hidden_state_layer_ids, or the draft config's eagle_config, names the "
            f"layers {list(plan.capture_layers)}: of a {target_config.architectures[0]} SGLang "
            "takes their inputs, this command their outputs, so the draft would be served other "
            "states than it was trained on; choose layers of which the first is 1, whose outputs "
            "both take"
        )
    return plan


def _prepare(
    run: Any,
    plan: Any,
    responses: Path,
    place: Path,
    dtype: Dtype | None,
    device: str,
    samples: Samples,
    chat_template_args: dict[str, Any],
) -> Any:
    """Load the target, check it on a sample, open the folder of features.

    Returns:
        The target without its LM head.
    """
    from specforge.modeling.target.identity import target_identity

    from specforge_lk.data import capture
    from specforge_lk.data.target_check import check_target
    from specforge_lk.files import file_digest
    from specforge_lk.target import load_target

    compute = dtype or Dtype("float32" if device == "cpu" else run.model.torch_dtype)
    model, _ = load_target(
        run.model.target_model_path,
        compute.value,
        device,
        trust_remote_code=run.model.trust_remote_code,
    )
    decoder = model.get_decoder()
    head = _target_head(run) if plan.layout.last_hidden_feature else None
    check_target(model, decoder, samples.kept[0].tokens.input_ids, head)
    settings = {
        "target": run.model.target_model_path,
        "responses": responses.name,
        "responses_sha256": file_digest(responses),
        "layers": list(plan.capture_layers),
        "max_length": run.data.max_length,
        "compute_dtype": compute.value,
        "stored_dtype": run.model.torch_dtype,
    }
    # Null where earlier versions wrote nothing.
    compared = {**settings, "chat_template_args": chat_template_args or None}
    identity = target_identity(
        run.model.target_model_path, trust_remote_code=run.model.trust_remote_code
    )
    found = {
        "target_identity": identity,
        "sampling": samples.samplings(),
        "left_out": samples.left_out,
    }
    capture.open_directory(place, plan.layout.output_names, compared, found)
    return decoder


def _write_mapping(run: Any, algorithm: Any, samples: Samples, vocab_size: int, path: Path) -> None:
    """Write the draft vocabulary of the tokens that are most frequent in the samples."""
    from specforge.training.model_loading import resolve_draft_config

    from specforge_lk.data import vocabulary

    counts = samples.token_counts()
    draft = resolve_draft_config(run, provider=algorithm.providers.model.draft_config)
    size = draft.draft_vocab_size
    mapping = vocabulary.vocabulary_mapping(counts, size, vocab_size)
    vocabulary.save_mapping(mapping, path)
    share = vocabulary.coverage(mapping, counts)
    typer.echo(f"draft vocabulary of {size} covers {share:.1%} of these tokens: {path}")


def _write_features(
    decoder: Any, plan: Any, samples: Samples, contents: Any, batch_tokens: int, dtype: str
) -> int:
    """Write the feature files that are not there yet, and return how many that were."""
    import torch

    from specforge_lk.data import capture

    names = plan.layout.output_names
    todo = [sample for sample in samples.kept if not capture.is_captured(sample, names, contents)]
    with ProgressBar("capturing", sum(map(len, todo)), "tok/s") as bar:
        for batch in capture.batches(todo, batch_tokens):
            capture.capture(
                decoder,
                batch,
                layers=plan.capture_layers,
                layout=plan.layout,
                dtype=getattr(torch, dtype),
            )
            tokens = sum(map(len, batch))
            bar.advance(tokens, tokens)
    return len(todo)


def _target_head(run: Any) -> Any:
    """Return the LM head in float32 from which training computes the target's logits."""
    import torch
    from specforge.modeling.target.target_head import TargetHead

    try:
        return TargetHead.from_pretrained(
            run.model.target_model_path,
            lm_head_key=run.model.lm_head_key,
            cache_dir=run.model.cache_dir,
            trust_remote_code=run.model.trust_remote_code,
            embedding_key=run.model.embedding_key,
            dtype=torch.float32,
        )
    except KeyError as error:  # a tensor that the checkpoint has under another name
        raise ValueError(error.args[0]) from error


def _load(config: Path, out: Path | None, overrides: list[str] | None) -> tuple[Any, Any]:
    """Return the run config and the target's config."""
    from specforge_lk.run_config import load_run, read_sections
    from specforge_lk.target import load_target_config

    paths = [(read_sections(config).get("data") or {}).get("prompts_path")]
    for name, _, value in (override.partition("=") for override in overrides or ()):
        paths += [value] if name == "data.prompts_path" else []
    if out and paths[-1]:
        raise typer.BadParameter(f"--out has no effect {_STREAMED}; leave it out")
    place = [f"data.hidden_states_path={out}"] if out else []
    run = load_run(config, [*(overrides or []), *place])
    if run.data.train_data_path:
        raise ValueError(
            f"{config}: with data.train_data_path SpecForge tokenizes by itself; set "
            "data.prompts_path for a streamed run, or data.hidden_states_path for features"
        )
    target_config = load_target_config(
        run.model.target_model_path, trust_remote_code=run.model.trust_remote_code
    )
    return run, target_config
