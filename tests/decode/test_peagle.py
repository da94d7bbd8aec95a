"""Drafting with P-EAGLE equals SpecForge's training forward, depth by depth."""

import json

import pytest
import torch
from draft_inputs import BATCH, draft_inputs
from specforge_forward import peagle_logits
from tiny_target import VOCAB_SIZE, build_model, build_tokenizer, draft_config

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.serving import Sampling

LENGTH, HEADS, MASK, DRAFT_VOCAB = 19, 4, 3, 40


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


def build(path, **changes):
    """SpecForge's module with random weights, saved as `specforge export` saves it."""
    from specforge.modeling.draft.peagle import PEagleDraftModel
    from transformers import LlamaConfig

    config = draft_config(DRAFT_VOCAB, num_hidden_layers=3, ptd_token_id=MASK, **changes)
    torch.manual_seed(0)
    model = PEagleDraftModel(LlamaConfig.from_dict(config))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    ids = torch.randperm(VOCAB_SIZE)[:DRAFT_VOCAB].sort().values
    model.d2t.copy_(ids - torch.arange(DRAFT_VOCAB))
    model.t2d.zero_()[ids] = True
    model.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text())
    saved["architectures"] = ["PEagleDraftModel"]
    (path / "config.json").write_text(json.dumps(saved))
    return model.eval()


@pytest.mark.parametrize("first", [False, True])
def test_equals_the_training_forward_of_specforge(first, target, tmp_path):
    model = build(tmp_path, norm_before_residual=first)
    draft = load_draft(tmp_path, target)
    assert draft.algorithm == "peagle" and len(draft.draft_ids) == DRAFT_VOCAB
    tokens, features, starts = draft_inputs(LENGTH, HEADS, layers=3)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = [
            peagle_logits(model, tokens[row][None], features[row][None], HEADS, MASK)
            for row in range(BATCH)
        ]
        actual = list(draft.teacher_forced(tokens, features, starts, HEADS))
    for head, logits in enumerate(actual):
        wanted = torch.stack([expected[row][t, head] for row, t in starts.nonzero().tolist()])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    # Guard against a comparison of constants.
    assert actual[-1].std() > 0.1


def test_proposals_equal_teacher_forcing(target, tmp_path):
    """Observing ragged blocks gives the same logits; no depth needs the token before it."""
    build(tmp_path)
    draft = load_draft(tmp_path, target)
    tokens, features, _ = draft_inputs(LENGTH, HEADS, layers=3)
    ends = torch.tensor([9, 5])
    starts = torch.nn.functional.one_hot(ends, LENGTH).bool()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = torch.stack(list(draft.teacher_forced(tokens, features, starts, HEADS)), 1)
        draft.start(BATCH, LENGTH)
        following = tokens.roll(-1, dims=1)
        for first, count in ((0, 4), (4, 7)):
            positions = torch.arange(first, first + count).expand(BATCH, count)
            block = slice(first, first + count)
            draft.observe(
                following[:, block], features[:, block], positions, positions <= ends[:, None]
            )
        for heads in (1, HEADS):
            proposal = draft.propose(heads, Sampling(1), generator)
            torch.testing.assert_close(proposal.logits, expected[:, :heads], rtol=1e-4, atol=1e-4)
            assert torch.equal(proposal.tokens, draft.draft_ids[proposal.index])
        draft.keep_rows(torch.tensor([1]))
        again = draft.propose(HEADS, Sampling(0), None)
        torch.testing.assert_close(again.logits, expected[1:], rtol=1e-4, atol=1e-4)
        assert torch.equal(again.index, expected[1:].argmax(-1))


def test_scaled_rope_is_refused(target, tmp_path):
    """SpecForge trains without the scaling, so what it would measure was never trained."""
    build(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DraftError, match="rope_type 'linear'"):
        load_draft(tmp_path, target)


def test_the_mask_token_must_be_known(target, tmp_path):
    build(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["ptd_token_id"]
    file.write_text(json.dumps(config))
    with pytest.raises(DraftError, match="ptd_token_id, the mask token of the training"):
        load_draft(tmp_path, target)
