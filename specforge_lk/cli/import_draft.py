"""``specforge-lk import-draft``: write a released draft in the form that training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge_lk.cli.options import TrustRemoteCode, parse_layers
from specforge_lk.cli.shell import check_out, errors, say

EXAMPLE = "specforge-lk import-draft drafts/released --target Qwen/Qwen3-8B --out drafts/start"


@errors()
def run(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of the draft: EAGLE-3 as SpecForge, EAGLE, SGLang, vLLM or speculators "
            "have it, MEDUSA heads or an MLP speculator as released, or a target with an MTP "
            "module.",
            show_default=False,
        ),
    ],
    target: Annotated[str, typer.Option(help="The target it drafts for: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    aux_layers: Annotated[
        str | None,
        typer.Option(
            help="Target layers whose outputs an EAGLE-3 draft reads, such as 1,15,28, where its "
            "config.json does not say so or says it wrongly.",
            show_default=False,
        ),
    ] = None,
    embedding_key: Annotated[
        str, typer.Option(help="Name of the embedding in the target's checkpoint.")
    ] = "model.embed_tokens.weight",
    lm_head_key: Annotated[
        str, typer.Option(help="Name of the LM head in the target's checkpoint.")
    ] = "lm_head.weight",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a draft that was released as SpecForge exports its own, to fine-tune it.

    Training starts from the folder with model.draft_checkpoint_path. The draft keeps its
    vocabulary, and the folder has it as vocab_mapping.pt too. Its logits are the same to the last
    bit. A draft that does not fit the target, or that SpecForge's training would make another one
    of, is refused.
    """
    from specforge_lk.drafts.imported import MAPPING, import_draft
    from specforge_lk.drafts.table import DRAFTS
    from specforge_lk.drafts.target_files import TargetFiles

    check_out(out, folder=True)
    files = TargetFiles(target, embedding_key, lm_head_key, trust_remote_code)
    layers = parse_layers(aux_layers)
    name = import_draft(source, files, out, layers)
    say(f"{DRAFTS[name].title}: {out}")
    settings = {
        "training.strategy": name,
        "model.draft_checkpoint_path": out,
        "model.draft_model_config": out / "config.json",
        **({"model.vocab_mapping_path": path} if (path := out / MAPPING).exists() else {}),
    }
    for name, value in settings.items():
        say(f"  {name}={value}")
