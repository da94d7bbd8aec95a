"""A draft in an engine's layout, as the paper's authors released theirs, is the same draft."""

import json

import pytest
import torch
from head_drafts import build, inputs
from released_layouts import (
    config_of,
    engine_name,
    numbered_name,
    rewrite,
    speculators_config,
    vllm_config,
)
from safetensors.torch import load_file, save_file
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_model, build_tokenizer, save_draft

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.target import LAYER_IDS_OF_INPUTS

HEADS = 3


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


def logits(draft, features=None):
    """[HEADS, N, V_d] at fixed chain starts, and the draft vocabulary that they are of."""
    tokens, last, starts = inputs()
    if features is None:
        features = last.repeat(1, 1, len(draft.capture_layers))
    with torch.no_grad():
        found = torch.stack(list(draft.teacher_forced(tokens, features, starts, HEADS)))
    assert found.std() > 0.1  # constants would be equal, too
    return found, draft.draft_ids


def assert_same(one, other, features=None):
    (logits_one, ids_one), (logits_other, ids_other) = (
        logits(one, features),
        logits(other, features),
    )
    assert torch.equal(ids_one, ids_other) if ids_one is not None else ids_other is None
    torch.testing.assert_close(logits_one, logits_other, rtol=1e-5, atol=1e-5)


# EAGLE-3


@pytest.mark.parametrize("layout", ["vllm", "speculators", "torch", "shards"])
def test_eagle3(layout, target, tmp_path):
    """The authors' files have int32 d2t, no t2d and no embeddings."""
    plain = save_draft(tmp_path / "plain")
    d2t = load_file(plain / "model.safetensors")["d2t"].int()
    changes = {"d2t": d2t, "t2d": None}
    if layout == "vllm":
        config = vllm_config(plain)
        path = rewrite(plain, tmp_path / layout, config, engine_name, **changes)
    elif layout == "speculators":
        config = speculators_config(plain)
        path = rewrite(plain, tmp_path / layout, config, engine_name, **changes)
    else:
        path = rewrite(plain, tmp_path / layout, config_of(plain), **changes)
        weights = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        if layout == "torch":
            torch.save(weights, path / "pytorch_model.bin")
        else:
            shards = {name: f"model-0000{i % 2}.safetensors" for i, name in enumerate(weights)}
            for shard in set(shards.values()):
                part = {name: weights[name] for name in weights if shards[name] == shard}
                save_file(part, path / shard)
            index = json.dumps({"weight_map": shards})
            (path / "model.safetensors.index.json").write_text(index)
            save_file({"fc.weight": torch.zeros(1)}, path / "consolidated.safetensors")
    draft = load_draft(path, target)
    assert draft.algorithm == "eagle3" and draft.capture_layers == (1, 2, 4)
    assert_same(load_draft(plain, target), draft)


def test_eagle3_settings_of_engines(target, tmp_path):
    """The first head against vLLM's definition of settings that SpecForge does not have."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator) / 4

    plain = save_draft(tmp_path / "plain")
    settings = {"norm_before_residual": True, "norm_before_fc": True, "attention_bias": True}
    config = config_of(plain, logit_scale=0.5, **settings)
    biases = {"q_proj": HIDDEN_SIZE, "k_proj": 16, "v_proj": 16, "o_proj": HIDDEN_SIZE}
    tensors = {f"midlayer.self_attn.{k}.bias": random(n) for k, n in biases.items()}
    tensors["input_norm.weight"] = 1 + random(3 * HIDDEN_SIZE)
    tensors["midlayer.hidden_norm.weight"] = 1 + random(HIDDEN_SIZE)
    path = rewrite(plain, tmp_path / "set", config, **tensors)
    draft = load_draft(path, target)
    tokens, last, starts = inputs()
    features = torch.randn(*last.shape[:2], 3 * HIDDEN_SIZE, generator=generator)
    found = logits(draft, features)[0][0]

    w = load_file(path / "model.safetensors")

    def norm(states, name):
        rms = states.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return states / rms * w[f"{name}.weight"]

    def linear(states, name):
        return states @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    hidden = norm(linear(norm(features, "input_norm"), "fc"), "midlayer.hidden_norm")
    embedded = target.model.get_input_embeddings()(tokens.roll(-1, 1)).detach()
    entry = torch.cat([norm(embedded, "midlayer.input_layernorm"), hidden], -1)
    parts = [linear(entry, f"midlayer.self_attn.{name}_proj") for name in "qkv"]
    query, key, value = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
    positions = torch.arange(tokens.shape[1], dtype=torch.float)
    angle = positions[:, None] * (10000.0 ** (-torch.arange(4) / 4)).repeat(2)

    def turned(states):
        rotated = torch.cat([-states[..., 4:], states[..., :4]], -1)
        return states * angle.cos() + rotated * angle.sin()

    key, value = (part.repeat_interleave(2, dim=1) for part in (turned(key), value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        turned(query), key, value, is_causal=True
    )
    attended = attended.transpose(1, 2).flatten(-2)
    hidden = hidden + linear(attended, "midlayer.self_attn.o_proj")
    inner = norm(hidden, "midlayer.post_attention_layernorm")
    gate = torch.nn.functional.silu(linear(inner, "midlayer.mlp.gate_proj"))
    hidden = hidden + linear(gate * linear(inner, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")
    expected = 0.5 * linear(norm(hidden, "norm"), "lm_head")
    torch.testing.assert_close(found, expected[starts], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_eagle3_1_of_engines(layout, target, tmp_path):
    """EAGLE-3.1: a norm per captured layer, and the state after the output norm is fed back."""
    generator = torch.Generator().manual_seed(6)
    norms = {
        f"fc_norm.{i}.weight": 1 + torch.randn(HIDDEN_SIZE, generator=generator) / 4
        for i in range(3)
    }
    plain = save_draft(tmp_path / "plain")
    reference = rewrite(plain, tmp_path / "reference", config_of(plain, fc_norm=True), **norms)
    make = vllm_config if layout == "vllm" else speculators_config
    config = make(plain) | {"fc_norm": True, "norm_output": True}
    path = rewrite(plain, tmp_path / layout, config, engine_name, **norms)

    expected = load_draft(reference, target)
    layer, norm = expected.midlayer, expected.norm
    finish = layer.finish
    layer.finish = lambda *arguments: norm(finish(*arguments))
    expected.norm = torch.nn.Identity()
    assert_same(load_draft(path, target), expected)
    with pytest.raises(AssertionError):
        assert_same(load_draft(path, target), load_draft(reference, target))


@pytest.mark.parametrize(("layers", "outputs"), [([2, 3, 5], (1, 2, 4)), ([1, 2, 4], (1, 2, 4))])
@pytest.mark.parametrize("vllm", [False, True])
def test_layers_of_which_sglang_takes_the_inputs(layers, outputs, vllm, tmp_path):
    """A DeepSeek's draft is read as SGLang and vLLM serve it."""
    model = build_model()
    model.config.architectures = ["DeepseekV3ForCausalLM"]
    keys = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": layers}}
    if vllm:
        keys["eagle_aux_hidden_state_layer_ids"] = [2, 3, 5]
    plain = save_draft(tmp_path / "plain")
    path = rewrite(plain, tmp_path / "draft", config_of(plain, **keys))
    assert load_draft(path, Target(model, build_tokenizer())).capture_layers == outputs


def test_the_series_knows_the_same_targets():
    from specforge.export.checkpoint_io import _LAYER_IDS_OF_INPUTS

    assert LAYER_IDS_OF_INPUTS == _LAYER_IDS_OF_INPUTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers 2 is not supported"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' is not supported"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, "say which with --aux-layers"),
        ({"eagle_config": {"layer_ids": [0, 1, 2]}}, r"captured layers \[-1, 0, 1\] are not 3"),
        ({"eagle_config": {"layer_ids": [1, 2]}}, r"captured layers \[0, 1\] are not 3"),
    ],
)
def test_eagle3_that_would_be_decoded_wrongly_is_refused(change, message, target, tmp_path):
    plain = save_draft(tmp_path / "plain")
    config = config_of(plain, architectures=["Eagle3LlamaForCausalLM"], **change)
    path = rewrite(plain, tmp_path / "engine", config, engine_name)
    with pytest.raises(DraftError, match=message):
        load_draft(path, target)


def test_a_missing_shard_is_named(target, tmp_path):
    path = save_draft(tmp_path)
    index = {"weight_map": {"fc.weight": "model.safetensors", "norm.weight": "other.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DraftError, match=r"other.safetensors of .* is missing"):
        load_draft(path, target)


# MEDUSA


@pytest.mark.parametrize("layout", ["prefix", "no architectures", "older"])
def test_medusa(layout, target, tmp_path):
    build("medusa, biases", tmp_path / "plain", VOCAB_SIZE)
    plain = tmp_path / "plain"

    config, rename = {
        "prefix": (config_of(plain), lambda name: f"medusa_heads.{name}"),
        "no architectures": (config_of(plain, architectures=None), lambda name: name),
        "older": ({"medusa_num_heads": HEADS, "medusa_num_layers": 1}, numbered_name),
    }[layout]
    path = rewrite(plain, tmp_path / "engine", config, rename)
    assert_same(load_draft(plain, target), load_draft(path, target))


def test_medusa_may_keep_whole_lm_heads_beside_a_token_map(target, tmp_path):
    build("medusa", tmp_path / "plain")
    plain = tmp_path / "plain"
    weights = load_file(plain / "model.safetensors")
    ids = weights["token_map"]
    whole = {}
    for head in range(HEADS):
        whole[f"lm_heads.{head}.weight"] = torch.randn(VOCAB_SIZE, HIDDEN_SIZE)
        whole[f"lm_heads.{head}.weight"][ids] = weights[f"lm_heads.{head}.weight"]
    dropped = {"d2t": None, "t2d": None}
    path = rewrite(plain, tmp_path / "engine", config_of(plain), **whole, **dropped)
    assert_same(load_draft(plain, target), load_draft(path, target))

    # Without truncated_vocab_size there is nothing that the map selects.
    config = config_of(plain, truncated_vocab_size=None, draft_vocab_size=None)
    path = rewrite(plain, tmp_path / "ignored", config, **whole, **dropped)
    draft = load_draft(path, target)
    assert draft.draft_ids is None
    assert torch.equal(logits(draft)[0][..., ids], logits(load_draft(plain, target))[0])


@pytest.mark.parametrize("held_by", ["lm_heads", "target"])
def test_medusa_with_the_target_s_own_lm_head(held_by, target, tmp_path):
    build("medusa, the target's head", tmp_path / "plain", VOCAB_SIZE)
    plain, head = tmp_path / "plain", target.head.weight.detach().clone()
    with_head = rewrite(plain, tmp_path / "a", config_of(plain), **{"lm_head.weight": head})
    other = (
        {"lm_heads.0.weight": head, "lm_heads.1.weight": head + 1} if held_by != "target" else {}
    )
    path = rewrite(plain, tmp_path / "b", config_of(plain), **{"lm_head.weight": None}, **other)
    assert_same(load_draft(with_head, target), load_draft(path, target))


def test_medusa_reads_its_own_lm_heads_and_scales_logits(target, tmp_path):
    build("medusa", tmp_path / "plain", VOCAB_SIZE)
    plain = tmp_path / "plain"
    extra = {"lm_head.weight": torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)}
    path = rewrite(plain, tmp_path / "engine", config_of(plain, logit_scale=0.25), **extra)
    expected = 0.25 * logits(load_draft(plain, target))[0]
    torch.testing.assert_close(logits(load_draft(path, target))[0], expected)


# MLP speculator


@pytest.mark.parametrize("layout", ["no prefix", "no architectures", "tied tensors once"])
def test_mlp_speculator(layout, target, tmp_path):
    variant = "mlp, tied" if layout == "tied tensors once" else "mlp"
    build(variant, tmp_path / "plain", VOCAB_SIZE)
    plain = tmp_path / "plain"
    config, dropped = config_of(plain), {}
    if layout == "no architectures":
        config = config_of(plain, architectures=None)
    if variant == "mlp, tied":
        names = load_file(plain / "model.safetensors")
        kept = {f"speculator.{part}.0" for part in ("emb", "ln", "head", "proj")}
        kept.add("speculator.proj.1")
        dropped = {name: None for name in names if name.rpartition(".")[0] not in kept}
        assert len(dropped) == 9

    def rename(name):
        return name.removeprefix("speculator.") if layout == "no prefix" else name

    path = rewrite(plain, tmp_path / "engine", config, rename, **dropped)
    assert_same(load_draft(plain, target), load_draft(path, target))


def test_an_untied_mlp_speculator_needs_every_tensor(target, tmp_path):
    build("mlp", tmp_path / "plain", VOCAB_SIZE)
    plain = tmp_path / "plain"
    missing = {"speculator.ln.1.weight": None}
    path = rewrite(plain, tmp_path / "engine", config_of(plain), **missing)
    with pytest.raises(DraftError, match=r"ln.1.weight"):
        load_draft(path, target)
