"""The inference module of EAGLE-3 equals SpecForge's training forward, and itself when cached."""

import json

import pytest
import torch
from draft_inputs import BATCH, draft_inputs
from rounding import rounding
from specforge_forward import eagle3_logits
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_model, build_tokenizer, save_draft

from specforge_lk.decode.draft import DraftError, load_draft
from specforge_lk.decode.target import Target

HEADS = 4
LENGTH = 17
#: Terms of the sums of a step: projection, norm, attention of width 2 H, MLP, norm, head.
STEP_SUMS = (
    3 * HIDDEN_SIZE,
    HIDDEN_SIZE,
    2 * HIDDEN_SIZE,
    8,
    LENGTH,
    *[HIDDEN_SIZE] * 3,
    48,
    32,
    32,
)
VARIANTS = {
    "default": {},
    "no_norm": {"norm_output": False},
    "fc_norm": {"fc_norm": True},
    "norm_before_residual": {"norm_before_residual": True},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_training_forward_of_specforge(variant, target, tmp_path):
    from specforge.modeling.draft import llama3_eagle
    from transformers import LlamaConfig

    config = json.loads((save_draft(tmp_path / "base", 40) / "config.json").read_text())
    torch.manual_seed(0)
    model = llama3_eagle.LlamaForCausalLMEagle3(
        LlamaConfig.from_dict({**config, **VARIANTS[variant], "initializer_range": 0.2})
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    ids = torch.randperm(VOCAB_SIZE)[:40].sort().values
    model.d2t.copy_(ids - torch.arange(40))
    model.t2d.zero_()[ids] = True
    model.save_pretrained(tmp_path / "draft")

    draft = load_draft(tmp_path / "draft", target)
    torch.testing.assert_close(draft.draft_ids, ids)
    tokens, features, starts = draft_inputs(LENGTH, HEADS, layers=3)
    # SpecForge compiles its norms and rotary embedding; eager is the same arithmetic, sooner.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = eagle3_logits(model, tokens, features, HEADS)
        actual = list(draft.teacher_forced(tokens, features, starts, HEADS))
    close = rounding(torch.stack(expected), torch.float32, *STEP_SUMS * HEADS)
    for step in range(HEADS):
        torch.testing.assert_close(actual[step], expected[step][starts], **close)
        other_head = actual[step] - expected[step - 1][starts]
        assert other_head.abs().amax(-1).min() > 100 * close["atol"]
    # Guard against a comparison of constants.
    assert actual[1].std() > 0.1


def test_cached_chain_equals_teacher_forcing(target, tmp_path):
    """Observing ragged blocks, then drafting the true tokens, gives the same logits."""
    draft = load_draft(save_draft(tmp_path), target)
    tokens, features, starts = draft_inputs(LENGTH, HEADS, layers=3)
    expected = torch.stack(list(draft.teacher_forced(tokens, features, starts, HEADS)))

    draft.start(BATCH, LENGTH)
    following = tokens.roll(-1, dims=1)
    # Row 0 starts its chain at 9, row 1 at 5; the second block holds entries that do not exist.
    ends = torch.tensor([9, 5])
    for first, count in ((0, 4), (4, 7)):
        positions = torch.arange(first, first + count).expand(BATCH, count)
        draft.observe(
            following[:, first : first + count],
            features[:, first : first + count],
            positions,
            positions <= ends[:, None],
        )
    close = rounding(expected, torch.float32, *STEP_SUMS * HEADS)
    (hidden, position), rows = draft._chain, torch.arange(BATCH)
    for head in range(HEADS):
        if head:
            known = tokens[rows, ends + 1 + head]
            hidden = draft._extend(known[:, None], hidden, position + head)
        logits = draft._logits(hidden)[:, 0]
        where = [
            int(index)
            for row, end in enumerate(ends)
            for index in (starts.nonzero() == torch.tensor([row, int(end)])).all(1).nonzero()
        ]
        torch.testing.assert_close(logits, expected[head, where], **close)


def test_embeddings_come_from_the_target_unless_the_draft_has_its_own(target, tmp_path):
    borrowed = load_draft(save_draft(tmp_path / "a"), target)
    own = load_draft(save_draft(tmp_path / "b", with_embedding=True), target)
    weight = target.model.get_input_embeddings().weight
    torch.testing.assert_close(borrowed.embed_tokens.weight, weight)
    assert not torch.equal(own.embed_tokens.weight, weight)


def test_bfloat16_does_not_round_positions(target, tmp_path):
    exact = load_draft(save_draft(tmp_path), target)
    rounded = load_draft(tmp_path, Target(build_model().bfloat16(), build_tokenizer()))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for name, buffer in exact.named_buffers():
        assert torch.equal(rounded.get_buffer(name), buffer), name
    assert exact._rotary.inv_freq.numel() > 1


def edit(path, config=None, drop=(), **tensors):
    """Change a saved draft's config and tensors."""
    from safetensors.torch import load_file, save_file

    if config:
        parsed = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**parsed, **config}))
    weights = {**load_file(path / "model.safetensors"), **tensors}
    save_file({k: v for k, v in weights.items() if k not in drop}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": {"draft_vocab_size": 95}},
            "lm_head.weight has 96 rows, draft_vocab_size is 95",
        ),
        ({"d2t": torch.zeros(90, dtype=torch.long)}, "d2t has 90 entries"),
        ({"d2t": torch.full((96,), -3)}, "d2t does not map to 96 distinct ids"),
        ({"t2d": torch.ones(VOCAB_SIZE, dtype=torch.bool)}, "t2d selects 264 tokens"),
        ({"d2t": torch.zeros(96, dtype=torch.long)}, "d2t and t2d name different tokens"),
        ({"drop": ("d2t",)}, "d2t is missing"),
        ({"drop": ("fc.weight",)}, r"\['fc.weight'\] are missing"),
        ({"config": {"vocab_size": 300}}, "vocab_size 300, but the target's is 264"),
        ({"config": {"architectures": ["Other"]}}, "'Other' is not a known draft"),
        ({"config": {"torch_dtype": "float8"}}, "config.json: .*'float8'; mend it, or export"),
        ({"config": {"hidden_act": "foo"}}, "config.json: hidden_act 'foo' is not known"),
        (
            {"config": {"num_attention_heads": "4"}},
            "num_attention_heads is '4', not a whole number",
        ),
        ({"config": {"num_attention_heads": 3}}, "not a multiple of the number of attention"),
        ({"config": {"rms_norm_eps": None}}, "config.json: .*'rms_norm_eps'.* again"),
        ({"config": {"intermediate_size": 50}}, "config.json and safetensors disagree"),
        (
            {"config": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}}},
            "are not 3 different ones of a target of 6 layers",
        ),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(change, message, target, tmp_path):
    edit(save_draft(tmp_path), **change)
    with pytest.raises(DraftError, match=message):
        load_draft(tmp_path, target)


def test_missing_files_are_named(target, tmp_path):
    with pytest.raises(DraftError, match=r"no config.json; export"):
        load_draft(tmp_path, target)
    (save_draft(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(DraftError, match=r"no \*.safetensors file; export"):
        load_draft(tmp_path, target)


def test_a_diverged_draft_is_refused(target, tmp_path):
    """Finite weights may give logits that are not."""
    edit(save_draft(tmp_path), **{"norm.weight": torch.full((HIDDEN_SIZE,), 3e38)})
    draft = load_draft(tmp_path, target)
    tokens, features, starts = draft_inputs(LENGTH, HEADS, layers=3)
    with pytest.raises(ValueError, match="the draft returned non-finite logits"):
        next(draft.teacher_forced(tokens, features, starts, HEADS))
