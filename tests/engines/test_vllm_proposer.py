"""The proposer drafts, in a batch as vLLM has it, what our decoding drafts; else it refuses.

vLLM itself is not imported: what it passes is made here as its runners make it.
`make serve-check` runs the proposer in vLLM.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from head_drafts import HEADS, VARIANTS, build
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_model, build_tokenizer
from torch import nn

from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.engines.vllm_proposer import LastStateProposer
from specforge_lk.serving import Sampling


class States(nn.Module):
    """A target whose last hidden states are given; its LM head has rows of padding, as vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE + 8, bias=False)

    def forward(self, *, positions, hidden):
        return hidden


@dataclass
class Step:
    """A request in one step.

    Attributes:
        first: position of its first token in the step.
        count: tokens in the step: a part of the prompt, or the last token and its drafts.
        tokens: how many it has after the step.
        sampled: what the step added to it.
    """

    first: int
    count: int
    tokens: int
    sampled: list[int]


#: A prompt that is through, one that is not, a step whose drafts were rejected, one in which two of
#: three were accepted, one in which all were, one without drafts.
STEPS = (
    Step(0, 7, 8, [11]),
    Step(0, 5, 5, []),
    Step(7, 4, 9, [21]),
    Step(12, 4, 16, [31, 32, 33]),
    Step(30, 4, 35, [41, 42, 43, 44]),
    Step(9, 1, 11, [51]),
)


def config(path, **changes):
    graphs = SimpleNamespace(name="FULL", has_full_cudagraphs=lambda: changes.get("full", False))
    return SimpleNamespace(
        additional_config=changes.get("options", {"specforge_lk": {"draft": str(path)}}),
        compilation_config=SimpleNamespace(cudagraph_mode=graphs),
        speculative_config=SimpleNamespace(num_speculative_tokens=changes.get("heads", HEADS)),
        model_config=SimpleNamespace(
            hf_config=None,
            hf_text_config=SimpleNamespace(num_hidden_layers=6),
            dtype=torch.float32,
            get_vocab_size=lambda: VOCAB_SIZE,
            get_hidden_size=lambda: HIDDEN_SIZE,
        ),
    )


@pytest.fixture
def forward_context(monkeypatch):
    """What vLLM says of a forward while it runs."""
    context = SimpleNamespace(attn_metadata=None)
    vllm, module = ModuleType("vllm"), ModuleType("vllm.forward_context")
    module.get_forward_context = lambda: context
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)
    return context


def run(proposer, target, context, steps=STEPS, metadata=None, axes=0):
    """One step of vLLM's runner; returns the states of all tokens and the drafts."""
    counts = torch.tensor([step.count for step in steps])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    context.attn_metadata = (
        {"layer": SimpleNamespace(query_start_loc=starts)} if metadata is None else metadata
    )
    positions = torch.cat([torch.arange(step.first, step.first + step.count) for step in steps])
    positions = positions.expand(axes, -1) if axes else positions
    hidden = torch.randn(int(counts.sum()), HIDDEN_SIZE)
    target(positions=positions, hidden=hidden)
    drafts = proposer.propose(
        [step.sampled for step in steps], [step.tokens for step in steps], None, slot_mappings=None
    )
    return hidden, starts.tolist(), drafts


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_those_of_our_decoding(variant, forward_context, tmp_path):
    build(variant, tmp_path)
    target, proposer = States(), LastStateProposer(config(tmp_path))
    model = Target(build_model(), build_tokenizer())
    with torch.no_grad():
        target.lm_head.weight[:VOCAB_SIZE] = model.lm_head_weight()
    proposer.load_model(target)
    hidden, starts, drafts = run(proposer, target, forward_context)
    ours = load_draft(tmp_path, model)
    # The state that gave the last token: of the prompt's end, or behind the accepted tokens.
    offsets = [6, None, 0, 2, 3, 0]
    for start, offset, step, draft in zip(starts, offsets, STEPS, drafts, strict=False):
        if offset is None:
            assert draft == []
            continue
        one = torch.ones(1, 1, dtype=torch.long)
        with torch.no_grad():
            ours.observe(
                one * step.sampled[-1], hidden[start + offset][None, None], one, one.bool()
            )
            expected = ours.propose(HEADS, Sampling(0), None).tokens[0].tolist()
        assert draft == expected
    assert len({tuple(draft) for draft in drafts}) > 3  # constants would be equal, too


def test_states_that_are_not_known_are_an_error(forward_context, tmp_path):
    build("mlp", tmp_path)
    target, proposer = States(), LastStateProposer(config(tmp_path))
    proposer.load_model(target)
    run(proposer, target, forward_context)
    with pytest.raises(RuntimeError, match="without being called"):
        proposer.propose([[1]], [5], None)
    with pytest.raises(RuntimeError, match="in micro-batches"):
        run(proposer, target, forward_context, metadata=[{}, {}])
    with pytest.raises(RuntimeError, match="SimpleNamespace: it has no query_start_loc"):
        run(proposer, target, forward_context, metadata={"layer": SimpleNamespace()})
    wrong = (Step(0, 7, 12, [11]), *STEPS[1:])
    with pytest.raises(RuntimeError, match="positions are not those"):
        run(proposer, target, forward_context, wrong)
    with pytest.raises(RuntimeError, match="one position per token"):
        run(proposer, target, forward_context, axes=3)
    # Nothing was sampled: a part of a prompt only.
    assert run(proposer, target, forward_context, STEPS[1:2])[2] == [[]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {}}, "additional_config has no draft"),
        ({"options": {"specforge_lk": {"path": "x"}}}, "additional_config has no draft"),
        ({"full": True}, r"cudagraph_mode FULL: .*PIECEWISE"),
        ({"heads": HEADS + 1}, f"it has {HEADS} draft positions; num_speculative_tokens"),
        ({"options": {"specforge_lk": {"draft": "absent"}}}, "draft absent is no folder"),
    ],
)
def test_what_cannot_be_served_is_refused(changes, message, tmp_path):
    build("medusa", tmp_path)
    with pytest.raises(ValueError, match=message):
        LastStateProposer(config(tmp_path, **changes)).load_model(States())


def test_a_sharded_lm_head_is_refused(tmp_path):
    build("medusa, the target's head", tmp_path)
    target = States()
    target.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE // 2, bias=False)
    with pytest.raises(ValueError, match=r"original_lm_head.* sharded or quantized"):
        LastStateProposer(config(tmp_path)).load_model(target)


def test_drafts_that_vllm_serves_itself_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    with pytest.raises(ValueError, match="EAGLE-3 draft; this proposer serves MEDUSA"):
        LastStateProposer(config(tmp_path)).load_model(States())
