"""Drafts of other kinds than EAGLE-3: an MTP module that knows its target, and random ones."""

import json
from pathlib import Path

import pytest
import torch
from exact_draft import FIRST, IDS, WORDS, build_chain, sampled_rows
from safetensors.torch import load_file, save_file
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, draft_config

from specforge_lk.decode.dflash import DFlashDraft
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.peagle import PEagleDraft
from specforge_lk.doctor import edits
from specforge_lk.doctor.case import read_run
from specforge_lk.doctor.diagnosis import Given, diagnose
from specforge_lk.doctor.findings import State
from specforge_lk.drafts.configs import mtp
from specforge_lk.drafts.model import TargetWeights
from specforge_lk.drafts.mtp import MTPConfig, MTPDraftModel
from specforge_lk.serving import parse

HEADS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    target = build_chain(root / "target")
    rows = sampled_rows(target, 6, length=24)
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target, root


def examine(world, draft: Path, engine: str | None = "vllm", run: Path | None = None):
    """The report, and the findings by check; no check ends but by its own word."""
    target, root = world
    given = Given(
        parse("temperature=1"),
        engine,
        held_out=str(root / "held_out.jsonl"),
        heads=HEADS,
        run=read_run(run) if run else None,
    )
    report = diagnose(target, "target", "float32", draft, given)
    for outcome in report.outcomes:
        if outcome.state is State.NOT_CHECKED:
            assert outcome.note.startswith("give --"), outcome
    return report, {o.check: o.findings for o in report.outcomes if o.findings}


def run_config(path: Path, draft_config: dict, **model) -> Path:
    named = path / "draft.json"
    named.write_text(json.dumps(draft_config))
    config = path / "run.json"
    config.write_text(json.dumps({"model": {"draft_model_config": str(named), **model}}))
    return config


# ---------------------------------------------------------------------------- MTP


@torch.no_grad()
def build_mtp(target, path: Path, own_head: bool = False) -> Path:
    """A module that knows which word comes after which; maybe by an LM head of its own."""
    config = mtp(target.model.config.to_dict(), None, HEADS) | {"draft_vocab_size": VOCAB_SIZE}
    torch.manual_seed(0)
    model = MTPDraftModel(MTPConfig.from_dict(config))
    state = target.model.state_dict()
    head = target.head.weight.detach()
    model.tie_to_target(TargetWeights(head, state.__getitem__, "model.embed_tokens.weight"))
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    prefix = f"model.layers.{target.num_layers}."
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"{prefix}{part}.weight"].zero_()
    # From the embedding of a word to the target's last state of it.
    last = target.chat.prompt_ids([{"role": "user", "content": "a"}])[-1]
    words = torch.tensor([*IDS.tolist(), last])
    embedded = torch.nn.functional.rms_norm(target.embed(words), (HIDDEN_SIZE,), eps=1e-6)
    states = target.forward(words[:, None]).hidden[:, 0]
    if own_head:
        turn = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE)).Q
        states, head = states @ turn, head @ turn
    fit = (torch.linalg.pinv(embedded.double()) @ states.double()).T.float()
    tensors[f"{prefix}eh_proj.weight"] = torch.cat([fit, torch.zeros_like(fit)], 1)
    tensors[f"{prefix}shared_head.head.weight"] = head.clone()
    save_file(tensors, path / "model.safetensors")
    return path


def test_an_mtp_module_that_knows_its_target(world, tmp_path):
    report, found = examine(world, build_mtp(world[0], tmp_path))
    assert found == {} and not report.wrong
    assert report.expected.tau > 0.99 * (1 + HEADS) * 24 / 25  # the last round may end early


def test_an_mtp_module_with_an_lm_head_of_its_own(world, tmp_path):
    report, found = examine(world, build_mtp(world[0], tmp_path, own_head=True))
    (finding,) = found["embeddings"]
    assert report.wrong and "the target's LM head, not its own" in finding.what
    assert finding.cost.tau > 1 and finding.cost.served == report.expected.tau


def test_the_embedding_that_vllm_zeroes(world, tmp_path):
    """Position 0 reads the embedding of token 1: as if that token had none."""
    target = world[0]
    plain = load_draft(build_mtp(target, tmp_path), target)
    tokens = torch.arange(FIRST, FIRST + 8)[None]
    features = torch.randn(1, 8, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 8, dtype=torch.bool)
    starts[0, :4] = True
    with torch.no_grad():
        whole = list(plain.teacher_forced(tokens, features, starts, HEADS))
        zeroed = load_draft(tmp_path, target)
        edits.ZERO_FIRST.apply(zeroed, target)
        found = list(zeroed.teacher_forced(tokens, features, starts, HEADS))
        plain._decoder.embed_tokens.weight[FIRST + 1] = 0
        expected = next(iter(plain.teacher_forced(tokens, features, starts, 1)))
    torch.testing.assert_close(found[0][0], expected[0])
    # This module attends to nothing, so that no other position and no later step notices.
    torch.testing.assert_close(found[0][1:], whole[0][1:])
    torch.testing.assert_close(found[1], whole[1])
    assert (found[0][0] - whole[0][0]).abs().max() > 1


# ------------------------------------------------------------------- random drafts


def export(path: Path, config: dict, module: torch.nn.Module, **tensors) -> dict:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    state = {n: v.detach().clone() for n, v in module.state_dict().items() if "embed" not in n}
    save_file({**state, **tensors}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return config


def build_peagle(target, path: Path) -> dict:
    from transformers import LlamaConfig

    config = draft_config(WORDS, "peagle", ptd_token_id=3)
    module = PEagleDraft(LlamaConfig.from_dict(config), 3, (1, 2, 4), IDS)
    return export(path, config, module, d2t=IDS - torch.arange(WORDS))


def build_dflash(target, path: Path) -> dict:
    from transformers import Qwen3Config

    config = draft_config(VOCAB_SIZE, "dflash", heads=HEADS)
    config["dflash_config"] = config["dflash_config"] | {"mask_token_id": 3}
    return export(path, config, DFlashDraft(Qwen3Config.from_dict(config), target))


@pytest.mark.parametrize("build", [build_peagle, build_dflash])
def test_a_mask_token_of_another_training(build, world, tmp_path):
    config = build(world[0], tmp_path)
    run = run_config(tmp_path, config, mask_token_id=7)
    _, found = examine(world, tmp_path, run=run)
    (finding,) = found["mask token"]
    assert finding.trained.startswith("7 (") and finding.served.startswith("3 (")
    assert finding.cost is not None
    same = run_config(tmp_path, config, mask_token_id=3)
    assert "mask token" not in examine(world, tmp_path, run=same)[1]


def test_layers_of_a_block_draft(world, tmp_path):
    config = build_dflash(world[0], tmp_path)
    trained = config | {"dflash_config": config["dflash_config"] | {"target_layer_ids": [2, 4]}}
    _, found = examine(world, tmp_path, engine=None, run=run_config(tmp_path, trained))
    (finding,) = found["captured layers"]
    assert finding.trained == "layers 2, 4, counted from 0" and finding.served == "layers 1, 3"
    assert "dflash_config.target_layer_ids to [2, 4]" in finding.remedy


def test_a_random_draft_has_no_remedy(world, tmp_path):
    """Nothing that is tried makes it better than knowing how frequent tokens are."""
    build_peagle(world[0], tmp_path)
    report, found = examine(world, tmp_path, engine="sglang")
    assert list(found) == ["better than frequencies"] and report.wrong


def test_rotary_frequencies_are_rounded(world, tmp_path):
    build_peagle(world[0], tmp_path)
    draft = load_draft(tmp_path, world[0])
    before = draft._rotary.inv_freq.clone()
    edits.ROUND_FREQUENCIES.apply(draft, world[0])
    assert torch.equal(draft._rotary.inv_freq, before.bfloat16().float())
    assert not torch.equal(draft._rotary.inv_freq, before)


def test_a_lent_lm_head_with_the_targets_transform(tmp_path):
    target = build_chain(tmp_path / "target", "granite", logits_scaling=2.0)
    path = tmp_path / "draft"
    path.mkdir()
    build_dflash(target, path)
    tokens = torch.arange(FIRST, FIRST + 8)[None]
    features = torch.randn(1, 8, 2 * HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 8, dtype=torch.bool)
    starts[0, :4] = True
    draft = load_draft(path, target)
    with torch.no_grad():
        lent = list(draft.teacher_forced(tokens, features, starts, HEADS))
        edits.TRANSFORM_LENT.apply(draft, target)
        whole = list(draft.teacher_forced(tokens, features, starts, HEADS))
        with edits.PLAIN_LOGITS.during(target):
            plain = target.logits(features[..., :HIDDEN_SIZE])
        transformed = target.logits(features[..., :HIDDEN_SIZE])
    for ours, theirs in zip(whole, lent, strict=True):
        torch.testing.assert_close(ours, theirs / 2)
    torch.testing.assert_close(transformed, plain / 2)
