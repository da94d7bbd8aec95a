"""The target's head, for every causal language model of transformers, against the model itself."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from specforge.core.target_distribution import TargetDistribution
from specforge.core.target_projection import LogitTransform
from specforge.modeling.target import logit_settings
from specforge.modeling.target.logit_settings import read_logit_transform
from specforge.modeling.target.target_head import TargetHead
from specforge.modeling.target.target_utils import TargetEmbeddingsAndHead
from specforge.runtime.contracts import TrainBatch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specforge_lk.drafts.medusa import MedusaConfig, MedusaModel
from specforge_lk.drafts.model import TargetWeights
from specforge_lk.drafts.mtp import MTPDraftModel
from specforge_lk.drafts.training import HeadModel, HeadTrainStrategy

VOCAB = 64
#: Sizes by every name that a config has for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"), 1),
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "rotary_dim": 4,
    "state_size": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
CAP = {"final_logit_softcapping": 1.5}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
#: What else a family needs to be small, and values that matter for its logits.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "ernie4_5_moe": {"use_bias": True},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.7},
    "gemma2": CAP,
    "gemma3_text": CAP,
    "gemma3n_text": {
        **CAP,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**CAP, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "logits_scaling": 3.0,
    },
    "granitemoeshared": {"logits_scaling": 3.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nanochat": CAP,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "phimoe": {"lm_head_bias": True},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 1.5},
    "vaultgemma": CAP,
    "xlstm": {"output_logit_soft_cap": 1.5},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}

REFUSED = logit_settings._OTHER_HEADS
#: Families whose source alone is checked: decoders of encoder-decoder models, which are no targets
#: by themselves; multimodal models, whose text models are built; what cannot be made small.
NOT_BUILT = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
    *("pegasus", "plbart", "trocr", "whisper"),
    *("blt", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "git", "got_ocr2", "llama4"),
    *("mllama", "moshi", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"),
    *("cpmant", "dbrx", "glm_moe_dsa", "longcat_flash", "reformer", "zamba"),
}
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - REFUSED - NOT_BUILT)


def config_of(family: str) -> Any:
    """A tiny config of a family, with values that matter for its logits."""
    kind = CONFIG_MAPPING[family]
    named = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", ())}
    named |= set(inspect.signature(kind.__init__).parameters)
    sizes = {name: size for name, size in SIZES.items() if name in named}
    return AutoConfig.for_model(family, **sizes | SETTINGS.get(family, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_distributions_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).eval()
    linear = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in linear.parameters():
            # What bfloat16 holds, in which some families are saved.
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        decoder = getattr(model, "model", model.base_model)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits.double()

    embedding_key = name_in_file(model.get_input_embeddings().weight, tmp_path)
    head_key = name_of_head(model, tmp_path)
    head = TargetHead.from_pretrained(
        str(tmp_path), lm_head_key=head_key, embedding_key=embedding_key, dtype=torch.float32
    ).cpu()
    lent = TargetEmbeddingsAndHead.from_pretrained(
        str(tmp_path),
        lm_head_key=head_key,
        embed_key=embedding_key,
        device="cpu",
        dtype=torch.float32,
    ).lm_head

    # Two float32 sums of n products, off by n eps times their size at most; no transform here
    # enlarges it. log p has two such differences, the logit's and the normalizer's.
    size = hidden.norm(dim=-1).max() * linear.weight.norm(dim=-1).max()
    bound = 4 * hidden.shape[-1] * torch.finfo(torch.float32).eps * size.item()

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=bound)

    close(head(hidden), logits)
    close(lent.projection(hidden), logits)
    t2d = torch.arange(VOCAB) % 3 == 0
    log_p = logits.log_softmax(-1)
    for target in (
        TargetDistribution.from_logits(head(hidden), t2d),
        TargetDistribution.from_logits(lent.projection(hidden), t2d),
        TargetDistribution.from_hidden_states(hidden, head, t2d, chunk_size=7),
    ):
        close(target.logits - target.log_normalizer[..., None], log_p[..., t2d])
        close(target.log_coverage, log_p[..., t2d].logsumexp(-1))


def name_in_file(weight: torch.Tensor, path: Path) -> str:
    """A parameter's name in a checkpoint."""
    with safe_open(path / "model.safetensors", "pt") as file:
        names = file.keys()
        (name,) = (n for n in names if torch.equal(file.get_tensor(n).float(), weight))
    return name


def name_of_head(model: Any, path: Path) -> str:
    """The head's name in a checkpoint, or in the model where the file has the embedding only.

    A bias stands beside it in both.
    """
    weight = model.get_output_embeddings().weight
    if weight is not model.get_input_embeddings().weight:
        return name_in_file(weight, path)
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight][-1]


# ------------------------------------------------------------------------- source

_LINEAR = re.compile(
    r"self\.\w+\((hidden_states(\[:, slice_indices, :\])?(\.to\(self\.lm_head\.weight\.dtype\))?"
    r"|outputs\[0\])\)(\.float\(\)|\.contiguous\(\))*"
)
#: What stands in a forward after the linear layer, and the operation that it is.
_FORMS = {
    (): None,
    ("logits.float()",): None,
    ("logits * self.logit_scale",): "multiplier",
    ("linear * self.model.lm_head_multiplier",): "multiplier",
    ("logits / self.config.logits_scaling",): "divisor",
    ("logits / cap", "torch.tanh(logits)", "logits * cap"): "soft_cap",
    ("nn.functional.tanh(logits / cap) * cap",): "soft_cap",
    ("soft_cap(logits, self.config.output_logit_soft_cap)",): "soft_cap",
}


def after_the_head(family: str) -> tuple[str, ...]:
    """Expressions assigned to whole logits in a family's forward, without the linear layer."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model = getattr(transformers, names if isinstance(names, str) else names[0])
    source = textwrap.dedent(inspect.getsource(model.forward))
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) in ("logits", "lm_logits"):
                found.append(ast.unparse(node.value if isinstance(node, ast.Assign) else node))
    found = [_LINEAR.sub("linear", expression) for expression in found]
    found = [re.sub(r"(self\.config\.)?final_logit_softcapping", "cap", e) for e in found]
    return tuple(expression for expression in found if expression != "linear")


@pytest.mark.parametrize("family", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - REFUSED))
def test_source_does_what_the_settings_say(family: str) -> None:
    """What a model's own code does after its linear layer, in this version of transformers."""
    form = after_the_head(family)
    assert form in _FORMS, f"{family} does {form} to its logits"
    known = {
        operation
        for operation, families in logit_settings._OPERATIONS.values()
        if families is not None and family in families
    }
    assert known == {_FORMS[form]} - {None}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_other_heads_are_refused(family: str) -> None:
    assert family in CONFIG_MAPPING
    with pytest.raises(ValueError, match=f"model_type '{family}'"):
        read_logit_transform(SimpleNamespace(model_type=family))


# ------------------------------------------------------------------------- drafts


def test_medusa_starts_from_the_target_with_its_scale() -> None:
    """An untrained head says what the target says, scale included: its weight has it."""
    torch.manual_seed(0)
    head, hidden = torch.randn(VOCAB, 32), torch.randn(1, 5, 32)
    scaled = TargetWeights(head, {}.__getitem__, "", transform=LogitTransform(divisor=3.0))
    for shared in (False, True):
        sizes = {"hidden_size": 32, "vocab_size": VOCAB, "num_heads": 2}
        draft = MedusaModel(MedusaConfig(**sizes, original_lm_head=shared))
        draft.tie_to_target(scaled)
        draft.start_from(scaled)
        mask = torch.ones(1, 5, dtype=torch.long)
        for logits in draft.head_logits(hidden, mask, mask, 2):
            torch.testing.assert_close(logits, hidden @ head.T / 3.0)


def test_what_engines_leave_out_of_a_lent_head_is_said_or_refused() -> None:
    head, bias = torch.randn(VOCAB, 32), torch.randn(VOCAB)
    for beyond in ({"bias": bias}, {"transform": LogitTransform(soft_cap=30.0)}):
        weights = TargetWeights(head, {}.__getitem__, "", **beyond)
        (name,) = weights.beyond_weight
        with pytest.warns(UserWarning, match=f"the target's {name} "):
            assert weights.scaled_head(torch.ones(VOCAB, dtype=torch.bool)).equal(head)
        with pytest.raises(ValueError, match=f"head has a {name}: an MTP module"):
            MTPDraftModel.tie_to_target(None, weights)


class Recorder:
    """A loss that keeps the distributions it is given."""

    def __init__(self) -> None:
        self.targets: list[TargetDistribution] = []

    def terms(self, logits: torch.Tensor, target: Any, mask: torch.Tensor) -> dict[str, Any]:
        self.targets.append(target)
        return {"sum": logits.sum(-1)}

    def combine(self, terms: dict[str, Any], mean: Any) -> dict[str, Any]:
        return {"loss": terms["sum"]}


@pytest.mark.parametrize("kept", [VOCAB, VOCAB // 2])
def test_drafts_of_hidden_states_are_compared_with_the_targets_own_p(
    kept: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("gemma2")).eval()
    with torch.no_grad():
        # What the bfloat16 of a head without `model.target_head_dtype` holds.
        linear = model.get_output_embeddings().weight
        linear.copy_(torch.randn_like(linear).bfloat16())
    model.save_pretrained(tmp_path)
    head = TargetHead.from_pretrained(str(tmp_path), dtype=torch.float32).cpu()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        log_p = model(input_ids=ids).logits.log_softmax(-1)
    loss = Recorder()
    sizes = {"hidden_size": 32, "vocab_size": VOCAB, "draft_vocab_size": kept, "num_heads": 1}
    strategy = HeadTrainStrategy(
        HeadModel(MedusaModel(MedusaConfig(**sizes)), 1, loss), target_head=head, name="medusa"
    )
    ones = torch.ones_like(ids)
    features = {"input_ids": ids, "hidden_state": hidden, "attention_mask": ones, "loss_mask": ones}
    strategy.forward_loss(TrainBatch(sample_ids=["a"], strategy="medusa", tensors=features))
    (target,) = loss.targets
    actual = target.logits - target.log_normalizer[..., None]
    # Position t has the distribution after token t + 1.
    expected = log_p[:, 1:, :kept]
    torch.testing.assert_close(actual[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
