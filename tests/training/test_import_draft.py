"""`specforge-lk import-draft`: a released draft becomes one that training starts from.

The draft is the same one: its logits are equal to the last bit, whatever layout it came in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from head_drafts import HEADS, build, inputs
from released_layouts import (
    as_torch_file,
    config_of,
    engine_name,
    numbered_name,
    rewrite,
    speculators_config,
    vllm_config,
)
from safetensors.torch import load_file
from specforge.config import Config
from specforge.modeling.auto import AutoDraftModel
from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model
from tiny_target import (
    HIDDEN_SIZE,
    MTP_FAMILIES,
    VOCAB_SIZE,
    build_family,
    build_tokenizer,
    mtp_draft_config,
    save_draft,
    save_target,
)
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.drafts.algorithms import _build_draft


@dataclass(frozen=True)
class Case:
    """A released draft and the target it is of."""

    source: Path
    target: Path


def released_eagle3(layout: str, root: Path) -> Path:
    plain = save_draft(root / "plain")
    if layout == "export":
        return plain
    # Released drafts have int32 d2t, no t2d and, most of them, no embedding.
    changes = {"d2t": load_file(plain / "model.safetensors")["d2t"].int(), "t2d": None}
    if layout == "original":
        return as_torch_file(rewrite(plain, root / layout, config_of(plain), **changes))
    config = (vllm_config if layout == "vllm" else speculators_config)(plain)
    return rewrite(plain, root / layout, config, engine_name, **changes)


def released_medusa(layout: str, root: Path, lm_head: torch.Tensor) -> Path:
    shared = layout == "target's head"
    variant = {"target's head": "medusa, the target's head"}.get(layout, "medusa, biases")
    whole = shared or layout == "numbered"
    build(variant, root / "plain", *([VOCAB_SIZE] if whole else []))
    plain = root / "plain"
    if shared:
        return rewrite(plain, root / "released", config_of(plain), **{"lm_head.weight": None})
    if layout == "numbered":
        config = {"medusa_num_heads": HEADS, "medusa_num_layers": 1}
        return rewrite(plain, root / "released", config, numbered_name)
    # By frequency, not by id.
    weights = load_file(plain / "model.safetensors")
    order = torch.randperm(len(weights["token_map"]))
    changes = {name: weights[name][order] for name in weights if name.startswith("lm_heads.")}
    changes |= {"token_map": weights["token_map"][order], "d2t": None, "t2d": None}
    return rewrite(plain, root / "released", config_of(plain, architectures=None), **changes)


def released_mlp_speculator(layout: str, root: Path) -> Path:
    build("mlp, tied" if layout == "tied" else "mlp", root / "plain", VOCAB_SIZE)
    plain = root / "plain"
    names = load_file(plain / "model.safetensors")
    kept = {f"speculator.{part}.0" for part in ("emb", "ln", "head", "proj")}
    kept.add("speculator.proj.1")
    dropped = {
        name: None for name in names if layout == "tied" and name.rpartition(".")[0] not in kept
    }
    config = config_of(plain, architectures=None, draft_vocab_size=None)
    return rewrite(
        plain, root / "released", config, lambda name: name.removeprefix("speculator."), **dropped
    )


def released_mtp(family: str, root: Path) -> Case:
    """A target with its module among its layers, which has no embedding and LM head of its own."""
    target = build_family(family)
    torch.manual_seed(1)
    (root / "draft.json").write_text(json.dumps(mtp_draft_config(family)))
    config = load_draft_config_source(str(root / "draft.json"))
    module = AutoDraftModel.from_config(config, torch_dtype=torch.float32)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lent = ("embed_tokens.weight", "shared_head.head.weight")
    own = {k: v for k, v in module.state_dict().items() if not k.endswith(lent)}
    target.config.num_nextn_predict_layers = 1
    target.save_pretrained(root / "target", state_dict={**target.state_dict(), **own})
    build_tokenizer().save_pretrained(root / "target")
    return Case(root / "target", root / "target")


CASES = (
    *(f"eagle3, {layout}" for layout in ("export", "original", "vllm", "speculators")),
    *(f"medusa, {layout}" for layout in ("numbered", "token map", "target's head")),
    *(f"mlp_speculator, {layout}" for layout in ("untied", "tied")),
    *(f"mtp, {family}" for family in MTP_FAMILIES),
)


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    algorithm, layout = request.param.split(", ")
    if algorithm == "mtp":
        return released_mtp(layout, tmp_path)
    target = save_target(tmp_path / "target")
    if algorithm == "eagle3":
        return Case(released_eagle3(layout, tmp_path), target)
    if algorithm == "medusa":
        lm_head = load_file(target / "model.safetensors")["lm_head.weight"]
        return Case(released_medusa(layout, tmp_path, lm_head), target)
    return Case(released_mlp_speculator(layout, tmp_path), target)


def run_import(source: Path, target: Path, out: Path, *options: str) -> tuple[int, str]:
    arguments = ["import-draft", str(source), "--target", str(target), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, *options])
    return done.exit_code, " ".join(done.output.split())


def full_logits(path: Path, target: Target) -> torch.Tensor:
    """[HEADS, N, V] of a draft at fixed chain starts; -inf beyond its vocabulary."""
    draft = load_draft(path, target)
    tokens, last, starts = inputs()
    features = last.repeat(1, 1, len(draft.capture_layers))
    with torch.no_grad():
        found = torch.stack(list(draft.teacher_forced(tokens, features, starts, HEADS)))
    assert found.std() > 0.1  # constants would be equal, too
    if draft.draft_ids is None:
        return found
    whole = found.new_full((*found.shape[:-1], VOCAB_SIZE), float("-inf"))
    whole[..., draft.draft_ids] = found
    return whole


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_imported_draft_is_the_released_one(case: Case, tmp_path: Path) -> None:
    """In decoding; and training starts from all of its tensors, without any other setting."""
    out = tmp_path / "imported"
    code, output = run_import(case.source, case.target, out)
    assert not code, output
    assert f"model.draft_checkpoint_path={out}" in output
    target = Target.load(str(case.target))
    assert torch.equal(full_logits(out, target), full_logits(case.source, target))

    config = load_draft_config_source(str(out))
    torch.manual_seed(2)
    fresh = AutoDraftModel.from_config(config, torch_dtype=torch.float32)
    report = warm_start_draft_model(fresh, str(out), draft_config=config, strategy="any")
    assert not report.missing_keys
    again = tmp_path / "again"
    fresh.save_pretrained(again)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name

    mapping = out / "vocab_mapping.pt"
    if getattr(config, "draft_vocab_size", VOCAB_SIZE) < VOCAB_SIZE:
        t2d, d2t = fresh.t2d.clone(), fresh.d2t.clone()
        fresh.load_vocab_mapping(str(mapping))
        assert torch.equal(fresh.t2d, t2d) and torch.equal(fresh.d2t, d2t)
    else:
        assert not mapping.exists()


def test_released_in_bfloat16_stays_in_bfloat16(tmp_path: Path) -> None:
    target, plain = save_target(tmp_path / "target"), save_draft(tmp_path / "plain")
    weights = load_file(plain / "model.safetensors")
    halves = {k: v.bfloat16() for k, v in weights.items() if v.is_floating_point()}
    source = rewrite(plain, tmp_path / "released", vllm_config(plain), engine_name, **halves)
    run_import(source, target, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in halves.items():
        assert written[name].dtype == torch.bfloat16 and torch.equal(written[name], tensor)
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


@pytest.mark.parametrize(("inputs_read", "named"), [([2, 3, 5], [1, 2, 4]), ([3, 4, 5], [3, 4, 5])])
def test_layers_of_which_sglang_takes_the_inputs(
    inputs_read: list[int], named: list[int], tmp_path: Path
) -> None:
    """They are named as SGLang, vLLM and SpecForge count them, and decoding reads the same ones."""
    target, plain = save_target(tmp_path / "target"), save_draft(tmp_path / "plain")
    config = config_of(target, architectures=["DeepseekV3ForCausalLM"])
    (target / "config.json").write_text(json.dumps(config))
    released = vllm_config(plain) | {"eagle_aux_hidden_state_layer_ids": inputs_read}
    source = rewrite(plain, tmp_path / "released", released, engine_name)
    code, output = run_import(source, target, tmp_path / "out")
    assert not code, output
    written = config_of(tmp_path / "out")
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == named
    assert written["eagle_aux_hidden_state_layer_ids"] == inputs_read
    beside = Target.load(str(target))
    layers = tuple(layer - 1 for layer in inputs_read)
    assert load_draft(tmp_path / "out", beside).capture_layers == layers


WIDE = {"fc.weight": torch.zeros(64, 192)}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1}
YARN |= {"mscale_all_dim": 0, "original_max_position_embeddings": 128}
#: Settings and tensors of an EAGLE-3 draft in vLLM's layout, and what the refusal says.
MISFITS = {
    "another width": ({"hidden_size": 64}, WIDE, "hidden_size 64, but the target's is 32"),
    "another vocabulary": ({"vocab_size": 300}, {}, "vocab_size 300, but the target's is 264"),
    "two layers": ({"num_hidden_layers": 2}, {}, "num_hidden_layers 2 is not supported here"),
    "an architecture": ({"architectures": ["Other"]}, {}, "architectures 'Other' is not a known"),
    "its own embedding": (
        {},
        {"embed_tokens.weight": torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)},
        "embed_tokens.weight is not the target's, which training puts in its place",
    ),
    "a scale": ({"logit_scale": 0.5}, {}, "SpecForge trains no draft with logit_scale 0.5"),
    "a norm": (
        {"norm_before_fc": True},
        {"input_norm.weight": torch.ones(3 * HIDDEN_SIZE)},
        "SpecForge trains no draft with norm_before_fc True",
    ),
    "states fed back after the norm": (
        {"norm_output": True},
        {},
        "SpecForge trains no draft with norm_output True",
    ),
    "biases": (
        {"attention_bias": True},
        {"midlayer.self_attn.q_proj.bias": torch.zeros(HIDDEN_SIZE)},
        "SpecForge trains no draft with attention_bias True",
    ),
    "rotary scaling": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {},
        "rope_type 'dynamic' is not supported",
    ),
    "four layers read": (
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4]},
        {"fc.weight": torch.zeros(HIDDEN_SIZE, 4 * HIDDEN_SIZE)},
        "it reads 4 layers of the target, and SpecForge captures three",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_draft_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    settings, tensors, message = MISFITS[name]
    target, plain = save_target(tmp_path / "target"), save_draft(tmp_path / "plain")
    config = vllm_config(plain) | settings
    source = rewrite(plain, tmp_path / "released", config, engine_name, **tensors)
    code, output = run_import(source, target, tmp_path / "out")
    assert code == 1 and message in output and str(source) in output
    assert not (tmp_path / "out").exists()


def test_the_residual_that_speculators_has_by_default(tmp_path: Path) -> None:
    """Its config need not name it, SpecForge's must."""
    target, plain = save_target(tmp_path / "target"), save_draft(tmp_path / "plain")
    config = speculators_config(plain)
    del config["norm_before_residual"]
    source = rewrite(plain, tmp_path / "released", config, engine_name)
    out = tmp_path / "out"
    code, output = run_import(source, target, out)
    assert not code, output
    draft = AutoDraftModel.from_config(load_draft_config_source(str(out)))
    assert draft.midlayer.norm_before_residual
    beside = Target.load(str(target))
    released = full_logits(source, beside)
    assert torch.equal(full_logits(out, beside), released)
    assert not torch.equal(full_logits(plain, beside), released)


@pytest.mark.parametrize(
    "case", ["medusa, numbered", "mlp_speculator, untied", "mtp, llama"], indirect=True
)
def test_a_start_of_another_target_is_refused(case: Case, tmp_path: Path) -> None:
    """By the drafts of this package as by SpecForge's own, which patch 0032 tests."""
    out, other = tmp_path / "imported", tmp_path / "other"
    run_import(case.source, case.target, out)
    other.mkdir()

    def build_draft(target: Path) -> None:
        model = {"target_model_path": str(target), "draft_checkpoint_path": str(out)}
        data = {"hidden_states_path": "unread"}
        config = Config.model_validate({"model": model, "data": data})
        _build_draft(config, load_draft_config_source(str(out)))

    build_draft(case.target)
    config = config_of(case.target)
    for name in ("vocab_size", "hidden_size"):
        own, theirs = config[name], 2 * config[name]
        (other / "config.json").write_text(json.dumps(config | {name: theirs}))
        message = f"{name} is {own} in the draft, {theirs} in the target. Name the target"
        with pytest.raises(ValueError, match=message):
            build_draft(other)


def test_lm_head_of_another_target_is_refused(tmp_path: Path) -> None:
    """With original_lm_head training takes the target's."""
    target = save_target(tmp_path / "target")
    build("medusa, the target's head", tmp_path / "plain", VOCAB_SIZE)
    code, output = run_import(tmp_path / "plain", target, tmp_path / "out")
    assert code == 1 and "lm_head.weight is not the target's" in output


def test_drafts_of_specforges_own_layout_need_no_import(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DFlashDraftModel"]}))
    code, output = run_import(tmp_path, save_target(tmp_path / "target"), tmp_path / "out")
    assert code == 1 and "give it as model.draft_checkpoint_path, as it is" in output


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    target, plain = save_target(tmp_path / "target"), save_draft(tmp_path / "plain")
    code, output = run_import(plain, target, plain)
    assert code == 1 and f"--out {plain} exists; remove it" in output
