"""MTP modules draft what training trains, with every kind of layer, in the released layout."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from draft_inputs import BATCH
from head_drafts import HEADS, LENGTH, inputs, trained_logits
from safetensors.torch import load_file, save_file
from tiny_target import (
    HIDDEN_SIZE,
    MTP_FAMILIES,
    VOCAB_SIZE,
    build_family,
    build_tokenizer,
    mtp_draft_config,
)

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.drafts.model import TargetWeights
from specforge_lk.drafts.mtp import MTPConfig, MTPDraftModel
from specforge_lk.serving import Sampling


@pytest.fixture(scope="module", params=MTP_FAMILIES)
def target(request: pytest.FixtureRequest) -> Target:
    return Target(build_family(request.param), build_tokenizer())


def build(target: Target) -> MTPDraftModel:
    """A module with random weights beside the target's embedding and head."""
    torch.manual_seed(0)
    model = MTPDraftModel(MTPConfig.from_dict(mtp_draft_config(target.model.config.model_type)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.tie_to_target(weights(target))
    return model.eval()


def weights(target: Target) -> TargetWeights:
    state = target.model.state_dict()
    return TargetWeights(
        target.head.weight.detach(), state.__getitem__, "model.embed_tokens.weight"
    )


def test_exported_module_equals_the_training_forward(target, tmp_path):
    model = build(target)
    model.save_pretrained(tmp_path)
    draft = load_draft(tmp_path, target)
    assert draft.capture_layers == (target.num_layers - 1,)
    tokens, features, starts = inputs()
    expected = trained_logits(model, tokens, features)
    with torch.no_grad():
        actual = list(draft.teacher_forced(tokens, features, starts, HEADS))
    for logits, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(logits, wanted[starts], rtol=1e-4, atol=1e-4)
    assert actual[-1].std() > 0.1  # constants would be equal, too


def test_proposals_equal_teacher_forcing(target, tmp_path):
    """With rows of unlike length, after a chain that was drafted and rejected."""
    build(target).save_pretrained(tmp_path)
    draft = load_draft(tmp_path, target)
    tokens, features, _ = inputs()
    known = torch.tensor([[6], [4]])
    with torch.no_grad():
        draft.start(BATCH, LENGTH)
        for first, count in ((0, 3), (3, 4)):
            positions = torch.arange(first, first + count).expand(BATCH, -1)
            following = tokens[:, first + 1 : first + count + 1]
            seen = features[:, first : first + count]
            draft.observe(following, seen, positions, positions <= known)
            proposal = draft.propose(HEADS, Sampling(1), torch.Generator().manual_seed(0))
        for row, start in enumerate(known.flatten().tolist()):
            text = tokens[row : row + 1].clone()
            text[0, start + 2 : start + 2 + HEADS] = proposal.tokens[row]
            starts = torch.zeros(1, LENGTH, dtype=torch.bool)
            starts[0, start] = True
            forced = draft.teacher_forced(text, features[row : row + 1], starts, HEADS)
            for head, logits in enumerate(forced):
                torch.testing.assert_close(
                    proposal.logits[row, head], logits[0], rtol=1e-4, atol=1e-4
                )
        draft.keep_rows(torch.tensor([1]))
        alone = draft.propose(HEADS, Sampling(0), None)
    assert alone.tokens.shape == (1, HEADS)
    torch.testing.assert_close(alone.logits[0, 0], proposal.logits[1, 0], rtol=1e-4, atol=1e-4)


def test_padding_does_not_show(target):
    model = build(target)
    tokens, features, _ = inputs()
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    with torch.no_grad():
        padded = list(model.head_logits(features, following, mask, HEADS))
        short = list(model.head_logits(features[1:, :9], following[1:, :9], mask[1:, :9], 1))
    torch.testing.assert_close(padded[0][1, :9], short[0][0], rtol=1e-4, atol=1e-4)
    assert all(logits.isfinite().all() for logits in padded)


def test_layout_is_that_of_released_checkpoints(target, tmp_path):
    build(target).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    prefix = f"model.layers.{target.num_layers}."
    assert {name.startswith(prefix) for name in names} == {True}
    module = {name.removeprefix(prefix) for name in names}
    last = f"model.layers.{target.num_layers - 1}."
    layer = {n.removeprefix(last) for n in released_names(target, tmp_path) if n.startswith(last)}
    assert module == layer | {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "embed_tokens.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == target.model.config.model_type
    assert config["num_nextn_predict_layers"] == 1


def released_names(target, tmp_path) -> list[str]:
    """The names that transformers gives the target itself: experts one by one."""
    target.model.save_pretrained(tmp_path / "target")
    return list(load_file(tmp_path / "target" / "model.safetensors"))


def test_starts_from_the_module_of_a_released_target(target, tmp_path):
    """The module beside the target's own layers, as DeepSeek releases it, and without its copies of
    embedding and head, as others do."""
    model = build(target)
    model.save_pretrained(tmp_path)
    prefix = f"model.layers.{target.num_layers}."
    module = load_file(tmp_path / "model.safetensors")
    folder = tmp_path / "released"
    target.model.save_pretrained(folder)
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    kept = {k: v for k, v in module.items() if k.removeprefix(prefix) not in shared}
    save_file(load_file(folder / "model.safetensors") | kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))

    draft = load_draft(folder, target)
    tokens, features, starts = inputs()
    expected = trained_logits(model, tokens, features)
    with torch.no_grad():
        for logits, wanted in zip(
            draft.teacher_forced(tokens, features, starts, HEADS), expected, strict=True
        ):
            torch.testing.assert_close(logits, wanted[starts], rtol=1e-4, atol=1e-4)

    loaded = MTPDraftModel.from_pretrained(folder, config=model.config)
    loaded.tie_to_target(weights(target))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)
    tokens, features, _ = inputs()
    for logits, wanted in zip(trained_logits(loaded, tokens, features), expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_reads_a_module_released_in_fp8(tmp_path):
    """As DeepSeek-V3's is, which has a scale for every block of 128 x 128."""
    rows, columns = block = (16, 8)
    target = Target(build_family("deepseek_v3"), build_tokenizer())
    model = build(target)
    model.save_pretrained(tmp_path)
    # Copies: the file that they are mapped from is written anew.
    stored = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    scaled = {}
    for name, value in stored.items():
        if re.search(r"(_proj|_proj_with_mqa)\.weight$", name) and "eh_proj" not in name:
            least = F.max_pool2d(value.abs()[None], block, block, ceil_mode=True)[0]
            scale = least / torch.finfo(torch.float8_e4m3fn).max
            spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            spread = spread[: value.shape[0], : value.shape[1]]
            scaled[name] = (value / spread).to(torch.float8_e4m3fn)
            scaled[f"{name}_scale_inv"] = scale
        else:
            scaled[name] = value
    save_file(scaled, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": fp8}))
    loaded = MTPDraftModel.from_pretrained(tmp_path, config=model.config)
    for name, value in model.state_dict().items():
        # Three bits of mantissa.
        wanted = dict(rtol=2**-4, atol=1e-3, msg=name)
        torch.testing.assert_close(loaded.state_dict()[name], value, **wanted)
    draft, (tokens, features, starts) = load_draft(tmp_path, target), inputs()
    with torch.no_grad():
        for logits, wanted in zip(
            draft.teacher_forced(tokens, features, starts, HEADS),
            trained_logits(loaded, tokens, features),
            strict=True,
        ):
            torch.testing.assert_close(logits, wanted[starts], rtol=1e-4, atol=1e-4)
    # As GLM-4.5's fp8, which has a scale for every row.
    for name in [name for name in scaled if name.endswith("_scale_inv")]:
        scaled[name.replace("_scale_inv", "_scale")] = scaled.pop(name)
    save_file(scaled, tmp_path / "model.safetensors")
    for load in (MTPDraftModel.from_pretrained, lambda path: load_draft(path, target)):
        with pytest.raises(ValueError, match=r"float8_e4m3fn.*give a checkpoint in bfloat16"):
            load(tmp_path)


def test_reads_the_shards_that_hold_the_module(tmp_path):
    """Of a hub id and of a folder; DeepSeek-V3 has 163 shards, and the module is in few of them."""
    target = Target(build_family("deepseek_v3"), build_tokenizer())
    model = build(target)
    folder = tmp_path / "models--org--name" / "snapshots" / "0"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0")
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())["weight_map"]
    assert len(set(held.values())) > 2
    index.write_text(json.dumps({"weight_map": {**held, "model.norm.weight": "elsewhere"}}))
    hub = dict(cache_dir=tmp_path, local_files_only=True)
    for source in ("org/name", folder):
        loaded = MTPDraftModel.from_pretrained(source, config=model.config, **hub).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value), name
    shard = folder / next(iter(held.values()))
    shard.unlink()
    with pytest.raises(OSError, match=re.escape(shard.name)):
        MTPDraftModel.from_pretrained(folder, config=model.config)


def test_a_module_with_tensors_that_its_config_lacks_is_not_trained(tmp_path):
    model = build(Target(build_family("llama"), build_tokenizer()))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, bias = load_file(file), "model.layers.3.self_attn.q_proj.bias"
    save_file(weights | {bias: torch.zeros(32)}, file)
    with pytest.raises(ValueError, match=f"has no {bias}; take model_type"):
        MTPDraftModel.from_pretrained(tmp_path, config=model.config)


def test_untrained_module_passes_the_state_on(target):
    config = mtp_draft_config(target.model.config.model_type) | {"initializer_range": 0.02}
    model = MTPDraftModel(MTPConfig.from_dict(config))
    model.tie_to_target(weights(target))
    model.start_from(weights(target))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        features = target.forward(tokens).hidden
        logits = trained_logits(model, tokens, features)[0]
    expected = target.head(features)
    # What the layer adds is small, not nothing.
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text"], ids=["by its weight", "by 1 + its weight"]
)
def test_the_scale_of_the_final_norm_is_undone_and_done_again(family: str) -> None:
    """Whatever a family's norm makes of its weight, which is far from 1 and about 0 here."""
    model = MTPDraftModel(MTPConfig.from_dict(mtp_draft_config("llama") | {"model_type": family}))
    weight = torch.rand(HIDDEN_SIZE) * 3 + 0.2
    weight[:4] = torch.tensor([0.02, -0.3, 0.05, -0.5])
    state = {
        "model.norm.weight": weight,
        "model.embed_tokens.weight": model._embedding.weight,
    }
    head = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    model.start_from(TargetWeights(head, state.__getitem__, "model.embed_tokens.weight"))
    layer = model._layer
    final = layer.shared_head.norm
    with torch.no_grad():
        expected = final(torch.randn(5, HIDDEN_SIZE))
        embedded = layer.enorm(torch.randn(5, HIDDEN_SIZE))
        mixed = layer.eh_proj(torch.cat([embedded, layer.hnorm(expected)], dim=-1))
        torch.testing.assert_close(final(mixed), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, "'nothing' is no model family"),
        ({"draft_vocab_size": 40}, "draft_vocab_size=40 must be 264"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2 must be 1"),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            },
            r"layer_types\[-1\]='sliding_attention'.*train another draft",
        ),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64.*train another draft"),
    ],
)
def test_configs_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        MTPConfig.from_dict({**mtp_draft_config("llama"), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 512},  # as long as the longest text
        {
            "model_type": "qwen3",
            "sliding_window": 64,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
    ],
)
def test_a_last_layer_that_sees_the_whole_text_is_taken(changes):
    config = MTPConfig.from_dict({**mtp_draft_config("llama"), **changes})
    assert config.model_type == changes["model_type"]


def test_a_draft_that_does_not_fit_is_refused(tmp_path):
    target = Target(build_family("llama"), build_tokenizer())
    build(target).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"vocab_size": 7, "draft_vocab_size": 7}, "vocab_size 7"),
        ({"num_hidden_layers": 4}, "no checkpoint with an MTP module"),
        ({"intermediate_size": 24}, "disagree"),
    ):
        file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(DraftError, match=message):
            load_draft(tmp_path, target)
