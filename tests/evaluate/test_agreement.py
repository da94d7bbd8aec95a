"""Decoding takes as many rounds as are computed along the responses that it gives."""

import numpy as np
import pytest
import torch
from written_drafts import Bigram, nearly_bigram

from specforge_lk.data.conversations import Tokens
from specforge_lk.decode.speculate import speculate
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import parse

HEADS = 3
PROMPTS = [list(range(10, 10 + n)) for n in (7, 1, 23, 12, 3)] * 40
LONGEST = 64
RULES = (
    "temperature=0.4",
    "temperature=0.4,drafting=greedy",
    "temperature=0.4,verification=block",
    "temperature=0.7,top_p=0.9",
    "temperature=0.8,top_k=20,draft_top_k=20,verification=block",
)


class Ending(Target):
    """A target that ends a third of its responses before they are cut."""

    eos_ids = frozenset(range(100, 104))


def decoded(target, rule, prompts):
    """Rounds and tokens counted in decoding, and those computed along the same responses."""
    draft = Bigram(target)
    responses = speculate(
        target,
        draft,
        prompts,
        heads=HEADS,
        rule=rule,
        max_new_tokens=LONGEST,
        generator=torch.Generator().manual_seed(0),
    )
    conversations = [
        Tokens(prompt + r.tokens, [0] * len(prompt) + [1] * len(r.tokens))
        for prompt, r in zip(prompts, responses, strict=True)
    ]
    settings = Settings(heads=HEADS, batch_size=64)
    (measured,) = measure_responses(target, [(draft, [rule])], conversations, settings)
    found = measured[rule]
    assert found.tokens.tolist() == [len(r.tokens) - 1 for r in responses]
    assert not found.off_rule.any()
    return responses, found


@pytest.mark.parametrize("text", RULES)
def test_rounds_agree_within_their_noise(text):
    """Given its response, decoding takes the expected rounds, on average over its own chance."""
    responses, found = decoded(nearly_bigram(Ending), parse(text), PROMPTS)
    ended = np.mean([r.tokens[-1] in Ending.eos_ids for r in responses])
    assert 0.1 < ended < 0.9
    rounds = np.array([r.rounds for r in responses])
    gap = rounds - found.expected.rounds
    error = np.sqrt((gap**2).sum())
    assert error < 0.005 * rounds.sum()
    assert abs(gap.sum()) <= 3 * error
    assert found.tau > 1.1
    accepted = sum(r.accepted_at for r in responses) - found.expected.accepted.sum(0)
    assert (np.abs(accepted) < 5 * np.sqrt(found.expected.accepted.sum(0))).all()


def test_at_temperature_0_counts_are_equal():
    responses, found = decoded(nearly_bigram(Ending), parse("temperature=0"), PROMPTS[:5])
    assert [r.rounds for r in responses] == found.expected.rounds.tolist()
    for response, expected in zip(responses, found.expected.accepted, strict=True):
        # Of a response that is cut, decoding counts what is accepted behind the cut, too.
        if response.tokens[-1] in Ending.eos_ids:
            assert response.accepted_at.tolist() == expected.tolist()
        else:
            assert response.accepted_at.sum() >= expected.sum()
    assert found.tau > 1.3
