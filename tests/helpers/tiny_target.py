"""A tiny random Llama target with a byte tokenizer, and tiny random drafts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from specforge_lk.drafts.table import DRAFTS

VOCAB_SIZE = 264
HIDDEN_SIZE = 32
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """One token per byte, ChatML markers, `<|im_end|>` as end of sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(layers: int = 6, seed: int = 0):
    """A random Llama whose next-token distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def forward_sums(length: int, layers: int = 6) -> list[int]:
    """Numbers of terms of the sums, one after another, that make a state of the target's.

    Norm, projection, attention's scores and values and its output; norm, gate and down projection.
    """
    attention = (HIDDEN_SIZE, HIDDEN_SIZE, HIDDEN_SIZE // 4, length, HIDDEN_SIZE)
    return [*attention, HIDDEN_SIZE, HIDDEN_SIZE, 64] * layers


def save_target(path: Path, layers: int = 6, seed: int = 0) -> Path:
    """Write target and tokenizer to ``path`` as one safetensors file."""
    build_model(layers, seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


#: Families of MTP targets: a dense layer; one with latent attention and experts; one with experts.
MTP_FAMILIES = ("llama", "deepseek_v3", "glm4_moe")
_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_FAMILY_SETTINGS = {
    "llama": {"num_key_value_heads": 2},
    "deepseek_v3": {**_EXPERTS, **_LATENT},
    "glm4_moe": {**_EXPERTS, "num_key_value_heads": 2, "head_dim": 8},
}


def family_config(family: str, layers: int = 3) -> dict:
    """config.json of a tiny target of a family."""
    return {
        "model_type": family,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": 0,
        **_FAMILY_SETTINGS[family],
    }


def build_family(family: str, layers: int = 3):
    """A random target of a family, its final norm off one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = family_config(family, layers)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2)
    return model


def mtp_draft_config(family: str, layers: int = 3) -> dict:
    """config.json of a tiny MTP draft: its target's own."""
    return DRAFTS["mtp"].config(family_config(family, layers), None, 1) | {
        "draft_vocab_size": VOCAB_SIZE
    }


_EAGLE = {
    "initializer_range": 0.02,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
}
_BLOCK = {"target_layer_ids": [1, 3], "mask_token_id": 0}
#: What tiny drafts have other than `specforge_lk.drafts.configs` gives them.
_CHANGES = {
    "eagle3": _EAGLE,
    "peagle": {**_EAGLE, "ptd_token_id": 0},
    "dflash": {"dflash_config": _BLOCK},
    "domino": {"dflash_config": {**_BLOCK, "emb_dim": 8, "gru_hidden_dim": 16}},
    "dspark": {"dflash_config": {**_BLOCK, "markov_rank": 8, "confidence_head_alpha": 1.0}},
    "mlp_speculator": {"inner_dim": 48, "tie_weights": False},
}


def draft_config(
    draft_vocab_size: int = VOCAB_SIZE, algorithm: str = "eagle3", heads: int = 3, **changes: Any
) -> dict:
    """config.json of a tiny draft, as `specforge export` writes it."""
    target = family_config("llama", layers=6) | {
        "head_dim": 8,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }
    made = DRAFTS[algorithm].config(target, draft_vocab_size, heads)
    return made | _CHANGES.get(algorithm, {}) | changes


def save_draft(
    path: Path, draft_vocab_size: int = 96, seed: int = 0, with_embedding: bool = False
) -> Path:
    """Write a random EAGLE-3 draft to ``path``, in the format of `specforge export --to hf`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    hidden, inner = HIDDEN_SIZE, 48
    ids = torch.randperm(VOCAB_SIZE, generator=generator)[:draft_vocab_size].sort().values
    t2d = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    t2d[ids] = True
    tensors = {
        "fc.weight": random(hidden, 3 * hidden),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": 4 * random(draft_vocab_size, hidden),
        "d2t": ids - torch.arange(draft_vocab_size),
        "t2d": t2d,
        "midlayer.self_attn.q_proj.weight": random(hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": random(hidden // 2, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": random(hidden // 2, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": random(hidden, hidden),
        "midlayer.mlp.gate_proj.weight": random(inner, hidden),
        "midlayer.mlp.up_proj.weight": random(inner, hidden),
        "midlayer.mlp.down_proj.weight": random(hidden, inner),
        "midlayer.hidden_norm.weight": torch.ones(hidden),
        "midlayer.input_layernorm.weight": torch.ones(hidden),
        "midlayer.post_attention_layernorm.weight": torch.ones(hidden),
    }
    if with_embedding:
        tensors["embed_tokens.weight"] = random(VOCAB_SIZE, hidden)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(draft_config(draft_vocab_size)))
    return path
