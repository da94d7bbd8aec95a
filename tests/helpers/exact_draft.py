"""A tiny target that is a Markov chain, and the EAGLE-3 draft that knows it exactly.

The target's attention adds nothing, so that its states depend on the last token alone, by a random
map in every layer. After word x comes `successor` of x with probability 0.87, or any of the other
words. The draft reads x_t from its features, takes x_{t+1} for the successor, and knows how the
chain goes on: its state is the one-hot code of a word, and its MLP takes one code to the next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_tokenizer, draft_config, save_draft
from transformers import AutoConfig, AutoModelForCausalLM

from specforge_lk.data.conversations import Chat
from specforge_lk.decode.target import Target

WORDS = 24
FIRST = 100
#: The words' ids, one after another.
IDS = torch.arange(FIRST, FIRST + WORDS)
#: The draft vocabulary has words, and others that are not used.
DRAFT_VOCAB_SIZE = 40
LAYERS = (1, 2, 4)
#: Logit of the successor, of the other words being 0, and of all other tokens.
LIKELY, NEVER = 5.0, -12.0


def successor(words: torch.Tensor) -> torch.Tensor:
    """Return the index of the word that comes next, of indices of words."""
    return (words * 7 + 5) % WORDS


def build_chain(path: Path, kind: str = "llama", **settings: Any) -> Target:
    """Save the target and return it; ``settings`` are of a family that transforms its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data *= 3  # so that one layer's states are not another's
    logits = torch.full((WORDS, VOCAB_SIZE), NEVER)
    logits[:, IDS] = 0
    logits[torch.arange(WORDS), IDS[successor(torch.arange(WORDS))]] = LIKELY
    tokenizer = build_tokenizer()
    # The last token of a prompt goes on as the first word does.
    last = Chat(tokenizer, ()).prompt_ids([{"role": "user", "content": "a"}])[-1]
    with torch.no_grad():
        states = model.model(torch.tensor([[*IDS.tolist(), last]]).T).last_hidden_state[:, 0]
        wanted = torch.cat([logits, logits[:1]])
        model.lm_head.weight.copy_((torch.linalg.pinv(states.double()) @ wanted.double()).T)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Target.load(str(path))


@torch.no_grad()
def sampled_rows(target: Target, count: int, temperature: float = 1.0, length: int = 40) -> list:
    """Rows with the target's own responses of ``length`` tokens, none of which ends."""
    generator = torch.Generator().manual_seed(0)
    questions = [[{"role": "user", "content": f"{i:03d}"}] for i in range(count)]
    ids = torch.tensor([target.chat.prompt_ids(question) for question in questions])
    first = ids.shape[1]
    for _ in range(length):
        logits = target.model(ids[:, -1:]).logits[:, -1]  # the last token is all that counts
        logits = logits.masked_fill(logits < NEVER / 2, -torch.inf)
        p = torch.softmax(logits / (temperature or 1e-3), -1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return [
        {
            "id": str(index),
            "conversations": [*question, {"role": "assistant", "content": "see response_ids"}],
            "response_ids": row[first:].tolist(),
            "finished": False,
            "sampling": {"temperature": temperature},
        }
        for index, (question, row) in enumerate(zip(questions, ids, strict=True))
    ]


@torch.no_grad()
def save_exact_draft(path: Path, target: Target, skipped: int = -8, **settings: Any) -> Path:
    """Write the draft as patched SpecForge exports it, with more settings in its config.json.

    Its vocabulary leaves out the first ``skipped`` words, or begins so many tokens before them.
    """
    save_draft(path)
    shape = {"generator": torch.Generator().manual_seed(0)}
    size = HIDDEN_SIZE**0.5  # of a normalized one-hot code, and of the codes of states
    words = torch.arange(WORDS)
    last = target.chat.prompt_ids([{"role": "user", "content": "a"}])[-1]
    tokens = torch.tensor([[*IDS.tolist(), last]]).T
    features = target.forward(tokens, layers=LAYERS).features[:, 0]
    code = torch.zeros(WORDS + 1, HIDDEN_SIZE)
    code[torch.arange(WORDS + 1), successor(torch.cat([words, words[:1]]))] = size
    fc = (torch.linalg.pinv(features.double()) @ code.double()).T.float()
    inner = 48
    gate, down = torch.zeros(inner, HIDDEN_SIZE), torch.zeros(HIDDEN_SIZE, inner)
    gate[words, words] = 1
    active = torch.nn.functional.silu(torch.tensor(size)) * size
    down[successor(words), words] += size / active
    down[words, words] -= size / active
    rows = torch.arange(DRAFT_VOCAB_SIZE) + skipped + FIRST  # ids of the draft vocabulary
    head = torch.zeros(DRAFT_VOCAB_SIZE, HIDDEN_SIZE)
    for row, token in enumerate(rows.tolist()):
        word = token - FIRST
        if 0 <= word < WORDS:
            head[row, word] = LIKELY
        else:
            head[row] = NEVER
    t2d = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    t2d[rows] = True
    noise = torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE, **shape)
    # Norms off one, so that it matters which states are fed back and added.
    output_norm = 3.0
    tensors = {
        "fc.weight": fc.contiguous(),
        "norm.weight": torch.full((HIDDEN_SIZE,), output_norm),
        "lm_head.weight": head / size / output_norm,
        "d2t": rows - torch.arange(DRAFT_VOCAB_SIZE),
        "t2d": t2d,
        "midlayer.self_attn.q_proj.weight": noise,
        "midlayer.self_attn.k_proj.weight": noise[: HIDDEN_SIZE // 2].clone(),
        "midlayer.self_attn.v_proj.weight": noise[HIDDEN_SIZE // 2 :].clone(),
        "midlayer.self_attn.o_proj.weight": torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE),
        "midlayer.mlp.gate_proj.weight": gate,
        "midlayer.mlp.up_proj.weight": gate.clone(),
        "midlayer.mlp.down_proj.weight": down,
        "midlayer.hidden_norm.weight": torch.full((HIDDEN_SIZE,), 3.0),
        "midlayer.input_layernorm.weight": torch.ones(HIDDEN_SIZE),
        "midlayer.post_attention_layernorm.weight": torch.ones(HIDDEN_SIZE),
    }
    save_file(tensors, path / "model.safetensors")
    layers = {
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in LAYERS],
    }
    config = draft_config(DRAFT_VOCAB_SIZE) | layers | settings
    (path / "config.json").write_text(json.dumps(config))
    return path
