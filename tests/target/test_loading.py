"""What targets do to their logits, and weights that do not fit them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_target import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    build_model,
    build_tokenizer,
    draft_config,
    save_draft,
    save_target,
)
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.target_check import check_target
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.target import load_target

TINY = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_CAP = {"final_logit_softcapping": 3.0, "sliding_window": 8}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_GPT = {"n_embd": HIDDEN_SIZE, "n_layer": 2, "n_head": 4}
_SCAN = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
#: All families of transformers 5.8 that do anything to hidden · Wᵀ, in ways that build this small:
#: soft caps, factors, biases, and heads of several layers.
FAMILIES = {
    "gemma2": _CAP,
    "gemma3_text": _CAP,
    "gemma3n_text": {
        **_CAP,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        **_CAP,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "vaultgemma": _CAP,
    "nanochat": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {
        "logits_soft_cap": 3.0,
        "num_hidden_layers": 3,
        "lru_width": HIDDEN_SIZE,
        "attention_window_size": 8,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0, **_EXPERTS},
    "granitemoeshared": {"logits_scaling": 4.0, **_EXPERTS, "shared_intermediate_size": 48},
    "granitemoehybrid": {
        **{"logits_scaling": 4.0, **_EXPERTS, "shared_intermediate_size": 48, **_SCAN},
        "layer_types": ["attention", "mamba"],
    },
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 64, **_SCAN},
    "phi": {},
    "phimoe": {"lm_head_bias": True, **_EXPERTS},
    "ernie4_5_moe": {
        **{"use_bias": True, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16}
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "ctrl": {**_GPT, "dff": 48},
    "bert": {"is_decoder": True},
}
#: Families whose cache is not one of keys and values alone.
RECURRENT = {"recurrent_gemma", "granitemoehybrid", "falcon_h1"}


def build(family: str, **settings):
    """A random model of a family, with biases and norms that matter."""
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES.get(family, {}), **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "A_log" not in name:  # a decay: its exponential has to stay finite
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# What a target does to its logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str):
    """From states alone, in any shape, whatever the family does to them."""
    model = build(family)
    target = Target(model, build_tokenizer())
    ids = torch.arange(24).view(2, 12) * 7 % VOCAB_SIZE
    with torch.inference_mode():
        own = model(ids).logits
        hidden = target.forward(ids, torch.ones_like(ids, dtype=torch.bool)).hidden
        # Sums of at most 64 products of float32, in an order that may differ.
        torch.testing.assert_close(target.logits(hidden), own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(target.logits(hidden[:, 3]), own[:, 3], rtol=1e-5, atol=1e-5)
        assert (target.lent_logits(hidden) - own).abs().max() > 0.1
        again = target.forward(ids, torch.ones_like(ids, dtype=torch.bool)).hidden
        assert torch.equal(again, hidden)  # the decoder is itself again
    assert target.rewinds == (family not in RECURRENT)


def test_decoding_needs_a_cache_that_forgets(tmp_path: Path):
    """Of a recurrent target, whose state has seen rejected tokens, responses are still measured."""
    build("falcon_h1", num_hidden_layers=3).save_pretrained(tmp_path / "target")
    build_tokenizer().save_pretrained(tmp_path / "target")
    prompts = ["--benchmark", f"b={tmp_path / 'prompts.jsonl'}", "--sampled"]
    prompts += ["--aux-layers", "0,1,2"]
    result = command("eval", tmp_path / "target", tmp_path, *prompts)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "cannot leave out rejected tokens" in result.stderr.replace("\n", " ")
    result = command("eval", tmp_path / "target", tmp_path, *prompts[3:])
    assert result.exit_code == 0, result.output


def test_logits_of_more_than_the_states_are_refused():
    class Peeking(type(build_model())):
        def forward(self, input_ids=None, **options):
            output = super().forward(input_ids=input_ids, **options)
            output.logits = output.logits + input_ids[..., None]
            return output

    model = build_model()
    model.__class__ = Peeking
    with pytest.raises(ValueError, match="Peeking does not make its logits from its decoder's"):
        Target(model, build_tokenizer())


def test_drafts_are_lent_the_matrices_alone(tmp_path: Path):
    """As engines lend them: Gemma scales its embeddings and caps its logits for itself."""
    model = build("gemma3_text", num_hidden_layers=6)
    target = Target(model, build_tokenizer())
    tokens, state = torch.arange(9), torch.randn(9, HIDDEN_SIZE)
    matrix = model.get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings()(tokens), matrix[tokens])
    assert torch.equal(target.embed(tokens), matrix[tokens])
    assert torch.equal(target.lent_logits(state), F.linear(state, model.lm_head.weight))
    draft = load_draft(save_draft(tmp_path), target)
    assert torch.equal(draft.embed_tokens(tokens), matrix[tokens])


def head_of(model, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """hidden · Wᵀ and nothing more."""
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight.data = model.lm_head.weight.detach().to(dtype).float()
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_checked_to_the_models_rounding(dtype: torch.dtype):
    """A plain head passes in any dtype; one without the cap is found, though p moves by 4 %."""
    tokens = list(range(3, 60))
    plain = build_model().to(dtype)
    check_target(plain, plain.get_decoder(), tokens, head_of(plain))
    capped = build("gemma2", final_logit_softcapping=5.0)
    torch.nn.init.normal_(capped.lm_head.weight, std=0.16)
    torch.nn.init.zeros_(capped.model.norm.weight)  # its norm multiplies by one more than this
    ids = torch.tensor([tokens])
    with torch.no_grad():
        own = capped(ids).logits.softmax(-1)
        bare = head_of(capped)(capped.model(ids).last_hidden_state).softmax(-1)
    assert 0.02 < (own - bare).abs().sum(-1).mean() / 2 < 0.06
    capped = capped.to(dtype)
    with pytest.raises(ValueError, match=r"total variation of 0\.0.*final_logit_softcapping=5\.0"):
        check_target(capped, capped.get_decoder(), tokens, head_of(capped))


# Weights that do not fit


def edited(path: Path, edit) -> Path:
    """A tiny target whose tensors went through ``edit``."""
    save_target(path)
    file = path / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if ".layers.3." not in k},
            r"it has no model\.layers\.3\.input_layernorm\.weight, .* and 5 more",
        ),
        (lambda t: {f"foo.{k}": v for k, v in t.items()}, r"does not know: foo\.lm_head\.weight"),
        (
            lambda t: {**t, "model.norm.weight": torch.ones(5)},
            r"model\.norm\.weight \(5,\) instead of \(32,\)",
        ),
        # Its config does not tie it to the embedding.
        (
            lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"},
            r"it has no lm_head\.weight\.",
        ),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(edit, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_target(str(edited(tmp_path, edit)))


def test_weights_that_fill_the_model_are_taken(tmp_path: Path):
    """With a module that transformers does not run, without the prefix, or with a tied head."""

    def beside(tensors):
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return {**bare, "layers.6.eh_proj.weight": torch.ones(3, 6)}

    ids = torch.arange(9)[None]
    model, _ = load_target(str(edited(tmp_path / "beside", beside)))
    assert torch.equal(model(ids).logits, build_model()(ids).logits)
    tied = build("gemma2")
    tied.save_pretrained(tmp_path / "tied")
    build_tokenizer().save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model, _ = load_target(str(tmp_path / "tied"))
    assert torch.equal(model(ids).logits, tied(ids).logits)


# The commands


def command(name: str, target: Path, root: Path, *more: str):
    """Run a command that loads a target, on a small input; what it may write is in root/out."""
    rows = {
        "prompts": {"id": "0", "prompt": "hello"},
        "responses": {
            "conversations": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "a longer answer"},
            ]
        },
    }
    for file, row in rows.items():
        (root / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    save_draft(root / "draft")
    (root / "draft.json").write_text(json.dumps(draft_config(96)))
    model = {"target_model_path": str(target), "draft_model_config": str(root / "draft.json")}
    model |= {"torch_dtype": "float32", "trust_remote_code": "--trust-remote-code" in more}
    run = {
        "model": model,
        "data": {"hidden_states_path": str(root / "out"), "max_length": 256},
        "training": {"strategy": "eagle3", "attention_backend": "sdpa"},
    }
    (root / "run.json").write_text(json.dumps(run))
    arguments = {
        "generate": [
            *("--target", target, "--prompts", root / "prompts.jsonl", "--out", root / "out"),
            *("--max-new-tokens", 4, *more),
        ],
        "eval": [
            *("--target", target, "--held-out", root / "responses.jsonl", "--out", root / "out"),
            *("--draft", f"kl={root / 'draft'}", "--heads", 2, "--sampled-by", "temperature=1"),
            *more,
        ],
        "capture": ["--config", root / "run.json", "--responses", root / "responses.jsonl"],
    }[name]
    return CliRunner().invoke(app, [name, "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("name", ["capture", "generate", "eval"])
def test_commands_refuse_random_weights(name: str, tmp_path: Path):
    incomplete = edited(
        tmp_path / "target", lambda t: {k: v for k, v in t.items() if ".layers.3.mlp" not in k}
    )
    result = command(name, incomplete, tmp_path)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "it has no model.layers.3.mlp.down_proj.weight" in result.stderr.replace("\n", " ")
    assert not [path for path in tmp_path.glob("out/*") if path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["capture", "generate", "eval"])
@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.5.mlp.down_proj.weight"])
def test_commands_refuse_weights_that_are_not_finite(name: str, tensor: str, tmp_path: Path):
    """Also where no captured layer, or no prompt, would show it."""

    def broken(tensors: dict) -> dict:
        tensors[tensor][-1, -1] = torch.nan if name == "eval" else -torch.inf
        return tensors

    result = command(name, edited(tmp_path / "target", broken), tmp_path)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    said = result.stderr.replace("\n", " ")
    assert f"are not finite: NaN or infinity in {tensor}; download them again" in said
    assert not (tmp_path / "out").exists() or not (tmp_path / "out").stat().st_size


_REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class GainedConfig(LlamaConfig):
    model_type = "gained_llama"

class GainedForCausalLM(LlamaForCausalLM):
    config_class = GainedConfig

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.logits = output.logits * self.config.logit_gain
        return output
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target with code of its own, which does to its logits what nothing here knows of."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    path = save_target(tmp_path / "remote")
    (path / "gained.py").write_text(_REMOTE)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "gained_llama",
        "logit_gain": 0.5,
        "auto_map": {
            "AutoConfig": "gained.GainedConfig",
            "AutoModelForCausalLM": "gained.GainedForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_code_of_the_targets_own(remote: Path, tmp_path: Path):
    """Its logits are evaluated and sampled from, and are not trained on, as they cannot be made."""
    for name in ("generate", "eval"):
        (tmp_path / name).mkdir()
        assert command(name, remote, tmp_path / name).exit_code == 1
        result = command(name, remote, tmp_path / name, "--trust-remote-code")
        assert result.exit_code == 0, result.output
    target = Target.load(str(remote), trust_remote_code=True)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        logits = target.logits(target.forward(ids).hidden)
        torch.testing.assert_close(logits, build_model()(ids).logits * 0.5)
    (tmp_path / "capture").mkdir()
    result = command("capture", remote, tmp_path / "capture", "--trust-remote-code")
    assert result.exit_code == 1 and not (tmp_path / "capture" / "out").exists()
    message = result.stderr.replace("\n", " ")
    assert "total variation" in message and "logit_gain=0.5" in message
    # Nor does its own code excuse weights that are not there.
    file = remote / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it has no model\.norm\.weight"):
        Target.load(str(remote), trust_remote_code=True)
