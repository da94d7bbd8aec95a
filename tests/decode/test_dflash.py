"""Drafting with the DFlash family equals SpecForge's training forward, slot by slot."""

import json

import pytest
import torch
from draft_inputs import BATCH, draft_inputs
from specforge_forward import dflash_logits
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_model, build_tokenizer

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.serving import Sampling

BLOCK, LENGTH, MASK = 5, 19, 3
SPARK = {"markov_rank": 6, "confidence_head_alpha": 1.0}
VARIANTS = {
    "dflash": ("dflash", {}, {}),
    "sliding": (
        "dflash",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        {},
    ),
    "domino": ("domino", {}, {"emb_dim": 7, "gru_hidden_dim": 9}),
    "domino prefix": (
        "domino",
        {},
        {"emb_dim": 7, "gru_hidden_dim": 9, "pure_draft_prefix_len": 2},
    ),
    "domino shift": ("domino", {}, {"emb_dim": 7, "gru_hidden_dim": 9, "shift_label": True}),
    "dspark": ("dspark", {}, {"markov_rank": 0}),
    "dspark vanilla": ("dspark", {}, SPARK),
    "dspark gated": ("dspark", {}, {**SPARK, "markov_head_type": "gated"}),
    "dspark rnn": ("dspark", {}, {**SPARK, "markov_head_type": "rnn"}),
}


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


def build(variant, path):
    """SpecForge's module with random weights, saved as `specforge export` saves it."""
    from specforge.modeling.draft import resolve_draft
    from transformers import Qwen3Config

    algorithm, changes, options = VARIANTS[variant]
    architecture = {"dflash": "DFlash", "domino": "Domino", "dspark": "DSpark"}[algorithm]
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        **{"layer_types": ["full_attention"] * 2, **changes},
        use_sliding_window="sliding_window" in changes,
    )
    config.block_size = BLOCK
    config.num_target_layers = 6
    config.dflash_config = {"target_layer_ids": [1, 3], "mask_token_id": MASK, **options}
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = resolve_draft(f"{architecture}DraftModel")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text())
    saved["architectures"] = [f"{architecture}DraftModel"]
    (path / "config.json").write_text(json.dumps(saved))
    return algorithm, model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_training_forward_of_specforge(variant, target, tmp_path):
    algorithm, model = build(variant, tmp_path)
    draft = load_draft(tmp_path, target)
    assert draft.algorithm == algorithm
    assert draft.max_heads == BLOCK - draft.first_slot
    tokens, features, starts = draft_inputs(LENGTH, BLOCK, layers=2)
    with torch.no_grad():
        expected = dflash_logits(algorithm, model, target, tokens, features, starts)
        actual = list(draft.teacher_forced(tokens, features, starts, draft.max_heads))
    for head, logits in enumerate(actual):
        slot = draft.first_slot + head
        torch.testing.assert_close(logits, expected[:, slot], rtol=1e-4, atol=1e-4)
    # Guard against a comparison of constants.
    assert actual[-1].std() > 0.1


@pytest.mark.parametrize("variant", ["sliding", "domino", "domino shift", "dspark rnn"])
def test_proposals_equal_teacher_forcing(variant, target, tmp_path, monkeypatch):
    """Observing ragged blocks, then drafting the true tokens, gives the same logits."""
    build(variant, tmp_path)
    draft = load_draft(tmp_path, target)
    tokens, features, _ = draft_inputs(LENGTH, BLOCK, layers=2)
    ends = torch.tensor([9, 5])
    starts = torch.nn.functional.one_hot(ends, LENGTH).bool()
    heads = draft.max_heads
    with torch.no_grad():
        expected = torch.stack(list(draft.teacher_forced(tokens, features, starts, heads)), 1)
        draft.start(BATCH, LENGTH)
        following = tokens.roll(-1, dims=1)
        for first, count in ((0, 4), (4, 7)):
            positions = torch.arange(first, first + count).expand(BATCH, count)
            block = slice(first, first + count)
            draft.observe(
                following[:, block], features[:, block], positions, positions <= ends[:, None]
            )
        truth = iter(range(heads))

        def true_token(*_):
            return tokens[torch.arange(BATCH), ends + 2 + next(truth)]

        monkeypatch.setattr("specforge_lk.decode.dflash.choose", true_token)
        proposal = draft.propose(heads, Sampling(1), None)
        torch.testing.assert_close(proposal.logits, expected, rtol=1e-4, atol=1e-4)
        # Rows may leave.
        draft.keep_rows(torch.tensor([1]))
        truth = iter(range(heads))
        monkeypatch.setattr("specforge_lk.decode.dflash.choose", lambda *_: true_token()[1:])
        again = draft.propose(heads, Sampling(1), None)
        torch.testing.assert_close(again.logits, expected[1:], rtol=1e-4, atol=1e-4)


def test_refuses_what_it_would_get_wrong(target, tmp_path):
    build("dflash", tmp_path)
    with pytest.raises(DraftError, match="--aux-layers"):
        load_draft(tmp_path, target, (0, 1))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"vocab_size": 99}, "vocab_size 99"),
        ({"dflash_config": {"target_layer_ids": [1, 3]}}, "mask_token_id is missing"),
        ({"dflash_config": {"target_layer_ids": [1, 9], "mask_token_id": 0}}, "6 layers"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "disagree"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(DraftError, match=message):
            load_draft(tmp_path, target)
