"""Write the recipes of the paper's six targets (arXiv 2602.23881, section 5).

    python configs/recipes.py

This script writes every file in configs/<target>/ but target-facts.json, from the facts there, the
tables below and `specforge_lk.drafts.configs`; tests/experiments/test_recipes.py asserts that they
are up to date. `make pages` writes the tables of README.md. Losses have no files of their own:
`training.loss` on the command line is all that differs between them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from specforge_lk.drafts.table import DRAFTS, DraftType
from specforge_lk.engines import VLLM_METHOD, VLLM_PROPOSED, VLLM_PROPOSER
from specforge_lk.evaluate.published import HEADS as DRAFTED
from specforge_lk.markdown import markdown_table

CONFIGS: Final = Path(__file__).parent
HEADS: Final = 6
#: Sequences per optimizer step: MICRO_BATCH * ACCUMULATION on each of the GPUs.
GLOBAL_BATCH: Final = 64
GPUS: Final = 8


@dataclass(frozen=True)
class Draft:
    """A draft of one target.

    Attributes:
        algorithm: ``training.strategy``.
        draft_vocab_size: V_d; None keeps the target's vocabulary.
        micro_batch: sequences per GPU at a time.
        training: settings beside those that all recipes share.
    """

    algorithm: str
    draft_vocab_size: int | None
    micro_batch: int = 4
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> DraftType:
        """The draft's row in the table."""
        return DRAFTS[self.algorithm]


@dataclass(frozen=True)
class Target:
    """A target: the folder of its recipes, SpecForge's chat template, and its drafts.

    ``serving_gpus`` is the tensor parallelism of the commands in README.md, to be fitted to the
    machine; nothing here was run on GPUs.
    """

    name: str
    chat_template: str
    drafts: tuple[Draft, ...]
    serving_gpus: int = 1

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the target, from the ``source`` that they name."""
        return json.loads((CONFIGS / self.name / "target-facts.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        """The part of the target's config.json that drafts depend on."""
        return self.facts["config"]


_EAGLE3: Final = {"ttt_length": HEADS, "attention_backend": "flex_attention"}
_HEADS: Final = {"attention_backend": "sdpa"}
_MTP: Final = {
    # One epoch from the pretrained module; its 256 experts are sharded over the GPUs.
    "num_epochs": 1,
    "fsdp_sharding": "FULL_SHARD",
    "ttt_length": HEADS,
    "attention_backend": "sdpa",
}

TARGETS: Final = (
    Target(
        "llama-3.1-8b-instruct",
        "llama3",
        (
            Draft("eagle3", 32000, training=_EAGLE3),
            # The paper's eta for MEDUSA, and what lk_lambda has there unless told otherwise.
            Draft("medusa", 32000, training=_HEADS),
            Draft("mlp_speculator", 32000, training=_HEADS),
        ),
    ),
    Target(
        "llama-3.3-70b-instruct", "llama3", (Draft("eagle3", 32000, 2, _EAGLE3),), serving_gpus=4
    ),
    Target("gpt-oss-20b", "gpt-oss", (Draft("eagle3", 32000, training=_EAGLE3),)),
    Target("gpt-oss-120b", "gpt-oss", (Draft("eagle3", 32000, training=_EAGLE3),), serving_gpus=2),
    Target(
        "qwen3-235b-a22b-instruct-2507", "qwen3-instruct", (Draft("eagle3", 64000, 2, _EAGLE3),), 8
    ),
    Target("deepseek-v3-0324", "deepseek-v3", (Draft("mtp", None, 1, _MTP),), serving_gpus=8),
)

#: Settings of section 5 that all recipes share.
SHARED: Final = {
    "num_epochs": 10,
    "learning_rate": 4e-4,
    "lr_scheduler": "cosine",
    "warmup_steps": 100,
    "adam_betas": [0.9, 0.95],
    "max_grad_norm": 0.5,
    "ploss_decay": 0.8,
    "save_interval": 5000,
    "log_interval": 50,
    "seed": 0,
}


# -------------------------------------------------------------------------- draft configs


def draft_config(draft: Draft, target: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a draft, from its target's."""
    return draft.type.config(target, draft.draft_vocab_size, HEADS)


# ---------------------------------------------------------------------------- run configs


def run_config(target: Target, draft: Draft, online: bool) -> dict[str, Any]:
    """Return the run config of a draft, from captured features or streamed from servers."""
    runs, algorithm = f"runs/{target.name}", draft.algorithm
    name = f"{algorithm}-online" if online else algorithm
    hub_id = target.facts["hub_id"]
    model = {
        "target_model_path": hub_id,
        "draft_model_config": f"configs/{target.name}/{algorithm}-draft.json",
        "target_head_dtype": "float32",
        "torch_dtype": "bfloat16",
    }
    if draft.draft_vocab_size:
        model["vocab_mapping_path"] = f"{runs}/vocab_mapping.pt"
    else:
        model["draft_checkpoint_path"] = hub_id
    features = f"{runs}/features/{algorithm if draft.type.aux_layers else 'last'}"
    # Tokens, not conversations: SpecForge would put the system prompt of its chat template before
    # those, and refuses them for gpt-oss.
    source = (
        {"prompts_path": f"{runs}/tokens.jsonl"} if online else {"hidden_states_path": features}
    )
    deployment: dict[str, Any] = {"trainer": {"nnodes": 1, "nproc_per_node": GPUS}}
    if online:
        deployment["mode"] = "disaggregated"
        deployment["disaggregated"] = {
            "control_dir": f"{runs}/{name}/control",
            "consumer_state_dir": f"{runs}/{name}/consumer-state",
            "backend": "mooncake",
            "server_urls": ["http://127.0.0.1:30000"],
            "mooncake_metadata_server": "http://127.0.0.1:35880/metadata",
            "mooncake_master_server_addr": "127.0.0.1:35551",
            "mooncake_protocol": "tcp",
        }
    return {
        "model": model,
        "data": {**source, "max_length": 2048, "chat_template": target.chat_template},
        "training": {
            "strategy": algorithm,
            "loss": "lk_lambda",
            "loss_data_parallel": True,
            **SHARED,
            **draft.training,
            "batch_size": draft.micro_batch,
            "accumulation_steps": GLOBAL_BATCH // (draft.micro_batch * GPUS),
            **({"role": "auto"} if online else {}),
        },
        "deployment": deployment,
        "run_id": f"{target.name}-{name}",
        "output_dir": f"{runs}/{name}",
    }


_HEADER: Final = """\
# {title} for {hub_id}, {how}.
# Written by configs/recipes.py; change it there. How to run it: configs/README.md.
# The paper's baseline and its other loss: training.loss=kl, training.loss=lk_alpha.
# {batch} sequences per step = batch_size x accumulation_steps x GPUs.
"""


def run_file(target: Target, draft: Draft, online: bool) -> str:
    """Return a run config as YAML."""
    header = _HEADER.format(
        title=draft.type.title,
        hub_id=target.facts["hub_id"],
        how="streamed from capture servers" if online else "trained from captured features",
        batch=GLOBAL_BATCH,
    )
    config = run_config(target, draft, online)
    return header + yaml.safe_dump(config, sort_keys=False, width=100)


# -------------------------------------------------------------------------------- serving

_PROPER: Final = {"draft_sample_method": "probabilistic", "rejection_sample_method": "standard"}


def vllm_command(target: Target, draft: Draft) -> str | None:
    """Return the command that serves an export with vLLM 0.32; None where there is none."""
    proposed = draft.algorithm in VLLM_PROPOSED
    if not (proposed or draft.type.vllm):
        return None
    export = f"runs/{target.name}/{draft.algorithm}/export"
    speculative = {
        "method": VLLM_METHOD if proposed else draft.algorithm,
        "model": VLLM_PROPOSER if proposed else export,
        "num_speculative_tokens": DRAFTED[draft.algorithm],
        # It takes no draft distribution from a proposer of ours.
        **({} if proposed else _PROPER),
    }
    lines = [
        f"vllm serve {target.facts['hub_id']} --tensor-parallel-size {target.serving_gpus}",
        f"  --speculative-config '{json.dumps(speculative)}'",
    ]
    if proposed:
        options = {"specforge_lk": {"draft": export}}, {"cudagraph_mode": "PIECEWISE"}
        ours, graphs = map(json.dumps, options)
        lines.append(f"  --additional-config '{ours}' --compilation-config '{graphs}'")
    return " \\\n".join(lines)


def sglang_command(target: Target, draft: Draft) -> str | None:
    """Return the command that serves an export with SGLang; None where there is none."""
    algorithm = draft.type.sglang
    if algorithm is None:
        return None
    steps = DRAFTED[draft.algorithm]
    lines = [
        f"python -m sglang.launch_server --model-path {target.facts['hub_id']} "
        f"--tp {target.serving_gpus}",
        f"  --speculative-algorithm {algorithm} "
        f"--speculative-draft-model-path runs/{target.name}/{draft.algorithm}/export",
        f"  --speculative-num-steps {steps} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {steps + 1}",
        "  --speculative-use-rejection-sampling",
    ]
    # SGLang refuses that where the draft vocabulary is not the target's; the patch lifts it.
    patched = draft.draft_vocab_size is not None
    return ("specforge-lk patch apply --package sglang\n" if patched else "") + " \\\n".join(lines)


def table() -> str:
    """Return the table of all recipes, of configs/README.md."""
    rows = []
    for target in TARGETS:
        for draft in target.drafts:
            stem = f"{target.name}/{draft.algorithm}"
            rows.append(
                [
                    target.facts["hub_id"],
                    draft.type.title,
                    str(draft.draft_vocab_size or target.config["vocab_size"]),
                    f"[{draft.algorithm}.yaml]({stem}.yaml)",
                    f"[{draft.algorithm}-online.yaml]({stem}-online.yaml)",
                ]
            )
    return markdown_table(["target", "draft", "draft vocabulary", "offline", "streamed"], rows)


def serving_commands() -> str:
    """Return the commands that serve every recipe's draft, of configs/README.md."""
    parts = []
    for target in TARGETS:
        for draft in target.drafts:
            commands = filter(None, (vllm_command(target, draft), sglang_command(target, draft)))
            if shown := "\n".join(commands):
                parts.append(f"{draft.type.title}, {target.name}:\n\n```sh\n{shown}\n```")
    return "\n\n".join(parts)


def files() -> dict[Path, str]:
    """Return every file of the recipes with its content."""
    content = {}
    for target in TARGETS:
        for draft in target.drafts:
            base = CONFIGS / target.name
            config = json.dumps(draft_config(draft, target.config), indent=2) + "\n"
            content[base / f"{draft.algorithm}-draft.json"] = config
            content[base / f"{draft.algorithm}.yaml"] = run_file(target, draft, online=False)
            content[base / f"{draft.algorithm}-online.yaml"] = run_file(target, draft, online=True)
    return content


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
        print(path.relative_to(CONFIGS.parent))
