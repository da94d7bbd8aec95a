"""MEDUSA drafts and MLP speculators draft what training trains, in the layout of engines."""

import json

import pytest
import torch
from draft_inputs import BATCH
from head_drafts import DRAFT_VOCAB, HEADS, LENGTH, VARIANTS, build, inputs, trained_logits
from safetensors.torch import load_file
from tiny_target import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    build_model,
    build_tokenizer,
    draft_config,
)

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.drafts.medusa import MedusaConfig, MedusaModel
from specforge_lk.drafts.mlp_speculator import MLPSpeculatorConfig
from specforge_lk.drafts.model import TargetWeights
from specforge_lk.serving import Sampling


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


@pytest.mark.parametrize("draft_vocab", [DRAFT_VOCAB, VOCAB_SIZE])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_training_forward(variant, draft_vocab, target, tmp_path):
    model = build(variant, tmp_path, draft_vocab)
    draft = load_draft(tmp_path, target)
    assert draft.max_heads == HEADS and draft.capture_layers == (target.num_layers - 1,)
    assert draft_vocab == VOCAB_SIZE or draft.draft_ids.equal(model.token_ids())
    tokens, features, starts = inputs()
    expected = trained_logits(model, tokens, features)
    with torch.no_grad():
        actual = list(draft.teacher_forced(tokens, features, starts, HEADS))
    for logits, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(logits, wanted[starts], rtol=1e-4, atol=1e-4)
    assert actual[-1].std() > 0.1  # constants would be equal, too


@pytest.mark.parametrize("variant", VARIANTS)
def test_proposals_equal_teacher_forcing(variant, target, tmp_path):
    build(variant, tmp_path)
    draft = load_draft(tmp_path, target)
    tokens, features, _ = inputs()
    known = 6
    valid = torch.arange(known + 1).expand(BATCH, -1) <= torch.tensor([[known], [known - 2]])
    positions = torch.arange(known + 1).expand(BATCH, -1)
    with torch.no_grad():
        draft.start(BATCH, LENGTH)
        draft.observe(tokens[:, 1 : known + 2], features[:, : known + 1], positions, valid)
        proposal = draft.propose(HEADS, Sampling(1), torch.Generator().manual_seed(0))
        for row, start in enumerate((known, known - 2)):
            text = tokens[row : row + 1].clone()
            text[0, start + 2 : start + 2 + HEADS] = proposal.tokens[row]
            starts = torch.zeros(1, LENGTH, dtype=torch.bool)
            starts[0, start] = True
            forced = draft.teacher_forced(text, features[row : row + 1], starts, HEADS)
            for head, logits in enumerate(forced):
                torch.testing.assert_close(
                    proposal.logits[row, head], logits[0], rtol=1e-4, atol=1e-4
                )


def test_names_and_shapes_are_the_engine_s(tmp_path):
    build("medusa", tmp_path / "medusa")
    medusa = load_file(tmp_path / "medusa" / "model.safetensors")
    assert medusa["blocks.2.layers.0.weight"].shape == (HIDDEN_SIZE, HIDDEN_SIZE)
    assert medusa["lm_heads.2.weight"].shape == (DRAFT_VOCAB, HIDDEN_SIZE)
    assert medusa["token_map"].shape == (DRAFT_VOCAB,)
    config = json.loads((tmp_path / "medusa" / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["truncated_vocab_size"] == DRAFT_VOCAB

    build("mlp, tied", tmp_path / "mlp", VOCAB_SIZE)
    mlp = load_file(tmp_path / "mlp" / "model.safetensors")
    parts = {"emb": ("weight",), "proj": ("weight",), "head": ("weight",), "ln": ("weight", "bias")}
    names = {f"speculator.{p}.{k}.{w}" for p, ws in parts.items() for w in ws for k in range(HEADS)}
    assert set(mlp) == names


def test_untrained_medusa_predicts_as_the_target_did(target):
    config = MedusaConfig.from_dict(draft_config(DRAFT_VOCAB, "medusa", HEADS))
    draft = MedusaModel(config)
    draft.start_from(TargetWeights(target.head.weight.detach(), {}.__getitem__, ""))
    features = inputs()[1]
    with torch.no_grad():
        expected = target.head(features)[..., :DRAFT_VOCAB]
        for logits in draft.head_logits(features, None, None, HEADS):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 7}, "vocab_size 7"),
        ({"num_heads": None}, "num_heads is missing"),
        ({"num_heads": 5}, "disagree"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(config, message, target, tmp_path):
    build("medusa", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(DraftError, match=message):
        load_draft(tmp_path, target)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MedusaConfig, {"draft_vocab_size": 5, "truncated_vocab_size": 6}, "two names"),
        (MedusaConfig, {"vocab_size": 10, "draft_vocab_size": 11}, "between 1 and"),
        (MLPSpeculatorConfig, {"n_predict": 1, "tie_weights": True}, "n_predict=1"),
    ],
)
def test_configs_are_checked(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
