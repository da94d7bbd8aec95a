"""Exact τ against all of decoding, enumerated."""

from dataclasses import fields

import numpy as np
import pytest
from table_models import Enumeration, TableDraft, TableTarget

from specforge_lk.data.conversations import Tokens
from specforge_lk.evaluate.rounds import Rounds, paired_differences
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import parse

VOCAB, LONGEST, HEADS = 3, 5, 2
RULES = (
    "temperature=1",
    "temperature=0",
    "temperature=0.7",
    "drafting=greedy",
    "verification=block",
    "temperature=0.8,top_p=0.8",
    "top_k=2,drafting=greedy",
    "top_k=2,draft_top_k=2,draft_temperature=0.6",
    "temperature=1.2,top_p=0.9,draft_top_p=0.9,verification=block",
)
VOCABULARIES = {"full": None, "truncated": [0, 2]}


def measured(target, draft, rule):
    """Rounds along every response that the rule can give, and the responses' probabilities."""
    responses, probabilities = zip(*target.responses(rule), strict=True)
    # One token of a prompt comes first.
    tokens = [Tokens([0, *r], [0] + [1] * len(r)) for r in responses]
    settings = Settings(heads=draft.heads, batch_size=16)
    (by_rule,) = measure_responses(target, [(draft, [rule])], tokens, settings)
    return by_rule[rule], np.array(probabilities)


@pytest.mark.parametrize("ids", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("text", RULES)
def test_tau_is_that_of_decoding(text, ids):
    rule = parse(text)
    for seed in range(3):
        target = TableTarget(VOCAB, LONGEST, seed)
        draft = TableDraft(target, ids, HEADS, seed)
        truth = Enumeration(target, draft, rule)
        found, probabilities = measured(target, draft, rule)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert not found.off_rule.any()
        expected = found.expected
        tau = (probabilities @ found.tokens) / (probabilities @ expected.rounds)
        assert tau == pytest.approx(truth.tau, abs=1e-9)
        counts = probabilities @ np.column_stack([expected.rounds, expected.accepted])
        np.testing.assert_allclose(counts, truth.expected, atol=1e-9)


@pytest.mark.parametrize("ids", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("text", RULES)
def test_a_start_yields_what_a_round_there_does(text, ids):
    """Where a whole chain fits; the product of acceptance rates is something else."""
    rule = parse(text)
    target = TableTarget(VOCAB, LONGEST, 7)
    target.complete = lambda response: len(response) == LONGEST  # no response ends early
    draft = TableDraft(target, ids, HEADS, 7)
    truth = Enumeration(target, draft, rule)
    found, probabilities = measured(target, draft, rule)
    known = np.concatenate([np.arange(1, n) for n in found.length])
    weight = np.repeat(probabilities, found.tokens)
    product = 1 + np.cumprod(found.alpha, axis=1).sum(1)
    differs = False
    for count in range(1, LONGEST - HEADS + 1):
        here = known == count
        expected = sum(
            p * truth.yielded(prefix) for prefix, p in _prefixes(target, rule, count).items()
        )
        assert weight[here] @ found.per_start[here] == pytest.approx(expected, abs=1e-9)
        differs |= abs(weight[here] @ product[here] - expected) > 1e-3
    assert differs or rule.greedy_draft


def _prefixes(target, rule, count):
    found = {}
    for response, p in target.responses(rule):
        found[response[:count]] = found.get(response[:count], 0) + p
    return found


def test_responses_of_several_turns_are_responses_of_their_own():
    target = TableTarget(VOCAB, LONGEST, 2)
    draft = TableDraft(target, None, HEADS, 2)
    conversation = Tokens([0, 1, 2, 1, 2, 1], [0, 1, 1, 0, 1, 1])
    rule = parse("temperature=1")
    (by_rule,) = measure_responses(target, [(draft, [rule])], [conversation], Settings(heads=HEADS))
    rounds = by_rule[rule]
    assert rounds.length.tolist() == [2, 2]
    assert rounds.expected.rounds.tolist() == [1, 1]
    assert rounds.tau == 1  # one token each behind the first


def test_drafts_are_compared_along_the_same_responses():
    target = TableTarget(VOCAB, LONGEST, 3)
    rule = parse("temperature=1")
    a, *_ = measured(target, TableDraft(target, None, HEADS, 3), rule)
    b, *_ = measured(target, TableDraft(target, [0, 1], HEADS, 4), rule)
    found = paired_differences(a, b)
    (difference,), ((low, high),) = found["tau_rounds"].value, found["tau_rounds"].ci
    assert difference == pytest.approx(a.tau - b.tau) and low <= difference <= high
    first, second = a.figures(seed=0), b.figures(seed=0)
    for name, of in found.items():
        gaps = np.atleast_1d(first[name]) - np.atleast_1d(second[name])
        np.testing.assert_allclose(of.value, gaps, atol=1e-12)
        assert len(of.value) == len(of.ci) == (HEADS if name.endswith("_per_head") else 1)
        for value, (least, most) in zip(of.value, of.ci, strict=True):
            assert least <= value <= most
    rest = (getattr(a, f.name)[a.tokens[0] :] for f in fields(Rounds)[2:])
    fewer = Rounds(a.conversation[1:], a.length[1:], *rest)
    with pytest.raises(ValueError, match="different responses"):
        paired_differences(a, fewer)


def test_damaged_arrays_are_named(tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"", b"x", b"PK"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz holds no arrays .*delete it"):
            Rounds.load(path)
