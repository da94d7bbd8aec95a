"""The recipes of the paper's targets resolve in SpecForge, build the drafts they should, and train.

The drafts are built without memory, on the meta device; what trains is the same recipe beside a
tiny target of the same kind, with the draft config that the recipes' own rules give for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from specforge.application.composition import resolve_offline_capture, resolve_run
from specforge.config import load_config
from specforge.data.template import TEMPLATE_REGISTRY
from specforge.launch_plan import build_launch_plan
from specforge.losses import resolve_loss
from specforge.modeling.auto import AutoDraftModel
from specforge.training.model_loading import load_draft_config_source
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_family, build_model, build_tokenizer
from training_run import conversations, run, write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from specforge_lk.engines import VLLM_PROPOSER

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "configs"))
import recipes  # noqa: E402


@dataclass(frozen=True)
class Expected:
    """Facts of a draft, worked out by hand: see ``parameters``."""

    parameters: int
    draft_vocab_size: int
    layers: tuple[int, ...]
    width: int | None = None


def eagle3_parameters(hidden: int, heads: int, kv_heads: int, head_dim: int, width: int, kept: int):
    """fc, attention on 2H inputs, gated MLP, five norms... and the head; the embedding is lent."""
    attention = 2 * hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    return 3 * hidden * hidden + attention + 3 * hidden * width + kept * hidden + 4 * hidden


LLAMA_8B = 4096
#: Beside the embedding and the head, which the target lends.
MTP_PARAMETERS = (
    7168 * 1536 + 1536 + 1536 * 128 * 192  # queries, through rank 1536
    + 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)  # keys and values, through rank 512
    + 128 * 128 * 7168  # output
    + 257 * 3 * 7168 * 2048 + 256 * 7168  # experts, the shared one, the router
    + 2 * 7168 * 7168 + 5 * 7168  # eh_proj and the norms
)  # fmt: skip
EXPECTED = {
    ("llama-3.1-8b-instruct", "eagle3"): Expected(
        eagle3_parameters(4096, 32, 8, 128, 14336, 32000), 32000, (1, 15, 28), 14336
    ),
    ("llama-3.1-8b-instruct", "medusa"): Expected(
        6 * (LLAMA_8B * LLAMA_8B + 32000 * LLAMA_8B), 32000, (0,)
    ),
    ("llama-3.1-8b-instruct", "mlp_speculator"): Expected(
        128256 * LLAMA_8B + 2 * LLAMA_8B * LLAMA_8B + 2 * LLAMA_8B + 32000 * LLAMA_8B, 32000, (0,)
    ),
    ("llama-3.3-70b-instruct", "eagle3"): Expected(
        eagle3_parameters(8192, 64, 8, 128, 28672, 32000), 32000, (1, 39, 76), 28672
    ),
    ("gpt-oss-20b", "eagle3"): Expected(
        eagle3_parameters(2880, 64, 8, 64, 4 * 2880, 32000), 32000, (1, 11, 20), 4 * 2880
    ),
    ("gpt-oss-120b", "eagle3"): Expected(
        eagle3_parameters(2880, 64, 8, 64, 4 * 2880, 32000), 32000, (1, 17, 32), 4 * 2880
    ),
    ("qwen3-235b-a22b-instruct-2507", "eagle3"): Expected(
        eagle3_parameters(4096, 64, 4, 128, 8 * 1536, 64000), 64000, (1, 46, 90), 8 * 1536
    ),
    ("deepseek-v3-0324", "mtp"): Expected(MTP_PARAMETERS, 129280, (0,)),
}
RECIPES = [(target, draft) for target in recipes.TARGETS for draft in target.drafts]
LOSSES = ("kl", "lk_alpha", "lk_lambda")


def recipe_id(value: Any) -> str:
    return value.name if isinstance(value, recipes.Target) else value.algorithm


each_recipe = pytest.mark.parametrize(("target", "draft"), RECIPES, ids=recipe_id)


def path_of(target: recipes.Target, draft: recipes.Draft, online: bool = False) -> Path:
    return recipes.CONFIGS / target.name / f"{draft.algorithm}{'-online' if online else ''}.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name the draft configs from there."""
    monkeypatch.chdir(ROOT)


def test_files_are_what_the_script_writes() -> None:
    written = recipes.files()
    for path, text in written.items():
        assert path.read_text() == text, f"{path}: run python configs/recipes.py"
    for target in recipes.TARGETS:
        known = {path.name for path in written if path.parent.name == target.name}
        there = {path.name for path in (recipes.CONFIGS / target.name).iterdir()}
        assert there == known | {"target-facts.json"}
    assert {(target.name, draft.algorithm) for target, draft in RECIPES} == set(EXPECTED)


def test_online_recipes_differ_in_source_and_deployment_only() -> None:
    for target, draft in RECIPES:
        offline, online = (
            yaml.safe_load(path_of(target, draft, mode).read_text()) for mode in (False, True)
        )
        assert online["model"] == offline["model"]
        # Not conversations, of which SpecForge would make other tokens than features have.
        assert online["data"].pop("prompts_path") and offline["data"].pop("hidden_states_path")
        assert online["data"] == offline["data"]
        assert online["training"] == {**offline["training"], "role": "auto"}


@each_recipe
@pytest.mark.parametrize("loss", LOSSES)
def test_recipe_has_the_papers_settings(target, draft, loss) -> None:
    for online in (False, True):
        run_config = load_config(str(path_of(target, draft, online)), [f"training.loss={loss}"])
        resolved = resolve_run(run_config)
        assert resolved.algorithm.name == draft.algorithm
        assert run_config.mode == ("online" if online else "offline")
        objective = resolve_loss(run_config)
        assert objective.registration.name == loss and objective.data_parallel
        eta = 10 if draft.algorithm == "medusa" else 3
        assert getattr(objective.options, "eta", eta) == eta
        training, trainer = run_config.training, run_config.deployment.trainer
        batch = training.batch_size * training.accumulation_steps * trainer.nproc_per_node
        assert batch * trainer.nnodes == 64
        assert training.num_epochs == (1 if draft.algorithm == "mtp" else 10)
        assert (training.learning_rate, training.max_grad_norm) == (4e-4, 0.5)
        assert (training.warmup_steps, training.ploss_decay) == (100, 0.8)
        assert list(training.adam_betas) == [0.9, 0.95] and training.lr_scheduler == "cosine"
        TEMPLATE_REGISTRY.get(run_config.data.chat_template)


def target_config(target: recipes.Target) -> Any:
    facts = dict(target.config)
    return AutoConfig.for_model(facts.pop("model_type"), **facts)


def test_facts_are_a_config_of_the_family() -> None:
    """transformers takes them, and they say what they come from."""
    for target in recipes.TARGETS:
        config = target_config(target)
        assert target.facts["source"].startswith("config.json of ")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            assert getattr(config, name) == target.config[name]


@each_recipe
def test_draft_is_the_papers(target, draft) -> None:
    """Parameters, heads, vocabulary and captured layers, on modules that take no memory."""
    run_config = load_config(str(path_of(target, draft)))
    expected = EXPECTED[target.name, draft.algorithm]
    resolved = resolve_offline_capture(run_config, target_config=target_config(target))
    assert resolved.capture_layers == expected.layers
    config = load_draft_config_source(run_config.model.draft_model_config)
    with torch.device("meta"):
        module = AutoDraftModel.from_config(config, torch.bfloat16)
    if draft.algorithm == "eagle3":
        module.freeze_embedding()
        assert config.num_hidden_layers == 1 and config.intermediate_size == expected.width
        assert module.lm_head.weight.shape == (expected.draft_vocab_size, config.hidden_size)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == expected.parameters
    assert (len(module.d2t), len(module.t2d)) == (
        expected.draft_vocab_size,
        target.config["vocab_size"],
    )
    heads = getattr(module, "heads", None) or run_config.training.ttt_length
    assert heads == 6


@pytest.mark.parametrize("online", [False, True], ids=["offline", "online"])
@each_recipe
def test_specforge_plans_the_launch(target, draft, online) -> None:
    """`specforge train --plan`, without a process for each."""
    path = str(path_of(target, draft, online))
    resolved = resolve_run(load_config(path))
    plan = build_launch_plan(
        resolved.config, algorithm=resolved.algorithm, config_path=path, env={}
    )
    commands = {command.label: list(command.argv) for command in plan.commands}
    assert set(commands) == ({"producer", "consumer"} if online else {"all"})
    trainer = commands["consumer" if online else "all"]
    assert trainer[trainer.index("--nproc_per_node") + 1] == str(recipes.GPUS)


def option(command: str, name: str) -> str:
    words = shlex.split(command, comments=True)
    return words[words.index(name) + 1]


@each_recipe
def test_serving_samples_as_training_assumes(target, draft) -> None:
    """Tokens drawn from q where engines do that; K of the paper's evaluation."""
    vllm, sglang = recipes.vllm_command(target, draft), recipes.sglang_command(target, draft)
    proposed = draft.algorithm in ("medusa", "mlp_speculator")
    assert (sglang is None) == proposed
    exported = f"runs/{target.name}/{draft.algorithm}/export"
    speculative = json.loads(option(vllm, "--speculative-config"))
    assert speculative.pop("num_speculative_tokens") == (6 if proposed else 7)
    if proposed:
        assert speculative == {"method": "custom_class", "model": VLLM_PROPOSER}
        given = {"specforge_lk": {"draft": exported}}
        assert json.loads(option(vllm, "--additional-config")) == given
        graphs = json.loads(option(vllm, "--compilation-config"))
        assert graphs == {"cudagraph_mode": "PIECEWISE"}
    else:
        sampled = {"draft_sample_method": "probabilistic", "rejection_sample_method": "standard"}
        assert speculative == {"method": draft.algorithm, "model": exported, **sampled}
    if sglang:
        assert option(sglang, "--speculative-draft-model-path") == exported
        assert option(sglang, "--speculative-num-steps") == "7"
        assert option(sglang, "--speculative-eagle-topk") == "1"
        assert "--speculative-use-rejection-sampling" in shlex.split(sglang)
        # Refused for a truncated vocabulary without the patch.
        truncated = draft.draft_vocab_size is not None
        assert ("specforge-lk patch apply --package sglang" in sglang) == truncated


# ------------------------------------------------------------------------------- training

#: One recipe of every algorithm, EAGLE-3 beside a dense target and beside one of experts.
SCALED_DOWN = {
    ("llama-3.1-8b-instruct", "eagle3"): "llama",
    ("qwen3-235b-a22b-instruct-2507", "eagle3"): "qwen3_moe",
    ("llama-3.1-8b-instruct", "medusa"): "llama",
    ("llama-3.1-8b-instruct", "mlp_speculator"): "llama",
    ("deepseek-v3-0324", "mtp"): "deepseek_v3",
}


#: Of tiny targets that EAGLE-3 reads: with fewer the three captured layers collide.
LAYERS = 8


def tiny_model(family: str) -> Any:
    if family == "qwen3_moe":
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            # The three captured layers are to differ.
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        return AutoModelForCausalLM.from_config(config).eval()
    return build_family(family) if family == "deepseek_v3" else build_model(LAYERS)


def tiny_facts(model: Any) -> dict[str, Any]:
    """What target-facts.json holds, of a tiny target."""
    config = model.config.to_dict()
    theta = config["rope_parameters"]["rope_theta"]
    left_out = ("architectures", "rope_parameters", "transformers_version", "dtype")
    known = {name: value for name, value in config.items() if name not in left_out}
    return {**known, "rope_theta": theta, "rope_scaling": None}


def release_with_module(model: Any, draft_config: dict[str, Any], folder: Path) -> None:
    """Save a target with an MTP module among its weights, as DeepSeek-V3 is released."""
    (folder / "draft.json").write_text(json.dumps(draft_config))
    config = load_draft_config_source(str(folder / "draft.json"))
    torch.manual_seed(1)
    module = AutoDraftModel.from_config(config, torch.float32)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    module.save_pretrained(folder / "module")
    weights = folder / "target" / "model.safetensors"
    layer = f"model.layers.{model.config.num_hidden_layers}."
    added = load_file(folder / "module" / "model.safetensors")
    save_file(load_file(weights) | {k: v for k, v in added.items() if k.startswith(layer)}, weights)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "algorithm"), SCALED_DOWN)
def test_scaled_down_recipe_trains(name: str, algorithm: str, tmp_path: Path) -> None:
    """Capture and two steps with each of the paper's losses' settings, through the real CLI."""
    ((target, draft),) = ((t, d) for t, d in RECIPES if (t.name, d.algorithm) == (name, algorithm))
    model = tiny_model(SCALED_DOWN[name, algorithm])
    folder = tmp_path / "target"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    size = draft.draft_vocab_size and 96
    small = recipes.draft_config(
        dataclasses.replace(draft, draft_vocab_size=size), tiny_facts(model)
    )
    (tmp_path / "draft.json").write_text(json.dumps(small))
    if algorithm == "mtp":
        release_with_module(model, small, tmp_path)
    mapping = tmp_path / "mapping.pt"
    write_rows(tmp_path / "train.jsonl", conversations(8))
    overrides = [
        f"model.target_model_path={folder}",
        f"model.draft_model_config={tmp_path / 'draft.json'}",
        "model.torch_dtype=float32",
        f"data.hidden_states_path={tmp_path / 'features'}",
        "data.dataloader_num_workers=0",
        # No flex attention and no FSDP on a CPU.
        "training.attention_backend=sdpa",
        "training.fsdp_sharding=NO_SHARD",
        "deployment.trainer.nproc_per_node=1",
        "training.batch_size=2",
        "training.accumulation_steps=2",
        "training.num_epochs=1",
        "training.warmup_steps=1",
        "training.log_interval=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    source = f"model.draft_checkpoint_path={folder}"
    overrides.append(f"model.vocab_mapping_path={mapping}" if size else source)
    config = path_of(target, draft)
    data = ["--responses", tmp_path / "train.jsonl", "--device", "cpu"]
    if size:
        data += ["--vocab-mapping", mapping]
    run("specforge-lk", "capture", "--config", config, *data, *overrides)
    finished = run("specforge", "train", "-c", config, *overrides)
    assert sorted(finished.steps) == [1, 2]
    eta = 10 if algorithm == "medusa" else 3
    for metrics in finished.steps.values():
        assert metrics["grad_norm"] > 0
        assert {f"alpha_{head}" for head in range(6)} < set(metrics)
        assert "alpha_6" not in metrics
        # Means over two micro-batches, each with a lambda of its own.
        bound = math.exp(-eta * metrics["alpha_0"])
        assert bound * (1 - 1e-6) <= metrics["lambda_0"] <= bound * 1.05
