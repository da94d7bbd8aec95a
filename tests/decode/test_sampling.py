"""Speculative sampling leaves the target's output distribution unchanged, whatever the draft."""

import pytest
import torch
from scipy import stats

from specforge_lk.decode import sampling
from specforge_lk.decode.sampling import (
    Verdict,
    check_finite,
    distribution,
    probabilities,
    shape,
    verify,
    verify_block,
    verify_greedy,
)
from specforge_lk.serving import Sampling

VOCAB = 6
ROWS = 60_000
HEADS = 3
DRAFT_IDS = {"full": None, "truncated": torch.tensor([0, 2, 3, 5])}


def models(seed=0, draft_vocab=VOCAB):
    """First-order Markov target [V, V] and draft [V, V_d]: the next token depends on the last."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.softmax(1.5 * torch.randn(VOCAB, VOCAB, generator=generator), -1)
    draft = torch.softmax(1.5 * torch.randn(VOCAB, draft_vocab, generator=generator), -1)
    return target, draft


def first_two_tokens(rule, greedy, ids, seed=1):
    """Counts [V, V] of the first two output tokens over independent speculative cycles.

    Where the first cycle accepts nothing it outputs one token only; the second then comes from a
    further cycle, exactly as in the decoding loop.
    """
    target, draft = models(draft_vocab=VOCAB if ids is None else len(ids))
    generator = torch.Generator().manual_seed(seed)

    def cycle(last):
        context, drafted, q, p = last, [], [], [target[last]]
        for _ in range(HEADS):
            q.append(draft[context])
            index = (
                q[-1].argmax(-1)
                if greedy
                else torch.multinomial(q[-1], 1, generator=generator).squeeze(1)
            )
            drafted.append(index)
            context = index if ids is None else ids[index]
            p.append(target[context])
        drafted = torch.stack(drafted, 1)
        # One slot more than is drafted, for the bonus token.
        padded = torch.cat([drafted, drafted[:, :1]], 1)
        count = torch.full((ROWS,), HEADS)
        q = None if greedy else torch.stack([*q, q[0]], 1)
        result = rule(padded, count, torch.stack(p, 1), q, draft_ids=ids, generator=generator)
        tokens = drafted if ids is None else ids[drafted]
        return tokens, result

    rows = torch.arange(ROWS)
    tokens, result = cycle(torch.zeros(ROWS, dtype=torch.long))
    output = torch.cat([tokens, tokens[:, :1]], 1)
    output[rows, result.accepted] = result.next_token
    later_tokens, later = cycle(output[:, 0])
    second = torch.where(later.accepted > 0, later_tokens[:, 0], later.next_token)
    second = torch.where(result.accepted > 0, output[:, 1], second)
    counts = torch.bincount(output[:, 0] * VOCAB + second, minlength=VOCAB * VOCAB)
    return counts, (target[0][:, None] * target).flatten() * ROWS, result


def p_value(rule, greedy, ids):
    counts, expected, _ = first_two_tokens(rule, greedy, ids)
    return stats.chisquare(counts.numpy(), expected.double().numpy(), sum_check=False).pvalue


def resample_from_p(drafted, count, p, q, *, draft_ids, generator):
    """A wrong rule: after a rejection it samples from p instead of from max(p - q, 0)."""
    right = verify(drafted, count, p, q, draft_ids=draft_ids, generator=generator)
    rows = torch.arange(len(drafted))
    return Verdict(right.accepted, sampling.draw(p[rows, right.accepted], generator))


def always_accept_half(drafted, count, p, q, *, draft_ids, generator):
    """A wrong rule: min(1, 2 p / q) as acceptance probability."""
    return verify(drafted, count, p, q / 2, draft_ids=draft_ids, generator=generator)


@pytest.mark.parametrize("ids", DRAFT_IDS.values(), ids=DRAFT_IDS.keys())
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_output_follows_the_target(greedy, ids):
    assert p_value(verify, greedy, ids) > 0.01


def as_a_block(drafted, count, p, q, *, draft_ids, generator):
    return verify_block(drafted, p, q, draft_ids=draft_ids, generator=generator)[0]


@pytest.mark.parametrize("ids", DRAFT_IDS.values(), ids=DRAFT_IDS.keys())
def test_block_verification_follows_the_target_and_accepts_more(ids):
    assert p_value(as_a_block, False, ids) > 0.01
    one, whole = (first_two_tokens(rule, False, ids)[2].accepted for rule in (verify, as_a_block))
    assert whole.float().mean() > 1.01 * one.float().mean()


@pytest.mark.parametrize("ids", DRAFT_IDS.values(), ids=DRAFT_IDS.keys())
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_the_same_statistic_rejects_a_wrong_rule(greedy, ids):
    assert p_value(resample_from_p, greedy, ids) < 1e-6
    if not greedy:
        assert p_value(always_accept_half, greedy, ids) < 1e-6


def test_first_head_is_accepted_with_the_overlap():
    target, draft = models()
    _, _, result = first_two_tokens(verify, greedy=False, ids=None)
    alpha = torch.minimum(target[0], draft[0]).sum()
    assert (result.accepted > 0).float().mean() == pytest.approx(float(alpha), abs=0.01)


def test_equal_distributions_accept_everything():
    p = torch.softmax(torch.randn(512, HEADS, VOCAB), -1)
    drafted = torch.randint(VOCAB, (512, HEADS))
    count = torch.randint(HEADS + 1, (512,))
    assert torch.equal(verify(drafted, count, p, p.clone()).accepted, count)


def test_temperature_zero_accepts_the_matching_prefix():
    best = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    drafted = torch.tensor([[1, 2, 3, 0], [1, 0, 3, 0], [0, 2, 3, 0], [1, 2, 3, 4]])
    result = verify_greedy(drafted, torch.tensor([3, 3, 3, 4]), best)
    assert result.accepted.tolist() == [3, 1, 0, 4]
    assert result.next_token[:3].tolist() == [4, 2, 1]


def test_non_finite_logits_are_named():
    logits = torch.zeros(2, 3)
    logits[1, 1] = float("nan")
    with pytest.raises(ValueError, match="the draft returned non-finite logits; retrain"):
        check_finite(logits, "the draft", "retrain")
    logits[1, 1] = float("-inf")  # a masked token is legitimate
    check_finite(logits, "the draft", "retrain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7, 5), Sampling(1.3, 0, 0.6), Sampling(0.9, 40, 0.95), Sampling(2, 0, 0.999)],
)
def test_truncation_keeps_what_its_definition_does(sampling, dtype):
    """Also where top-p keeps more tokens than are looked at first."""
    logits = 2 * torch.randn(20, 2000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = distribution(logits, sampling)
    for row, p in zip(logits.double(), found, strict=True):
        order = row.argsort(descending=True)[: sampling.top_k or None]
        q = torch.softmax(row[order] / sampling.temperature, -1)
        kept = q.cumsum(-1) - q < sampling.top_p
        expected = torch.zeros_like(row)
        expected[order[kept]] = q[kept] / q[kept].sum()
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sampling", [Sampling(1e-6), Sampling(1e-6, 2), Sampling(1e-6, 0, 0.9)])
def test_a_low_temperature_keeps_probabilities_normalized(sampling):
    logits = torch.tensor([[30.1, 30.1, 3.0, -40.0]])
    p = probabilities(logits, shape(logits, sampling), sampling)
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.5, 0, 0]]), rtol=0, atol=1e-6)


def test_ties_at_the_last_token_are_kept():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    kept = [True, True, True, False]
    assert (distribution(logits, Sampling(1.0, 2)) > 0).tolist() == [kept]
    assert (distribution(logits, Sampling(1.0, 0, 0.9)) > 0).tolist() == [kept]
    assert distribution(logits, Sampling(0)).tolist() == [[1, 0, 0, 0]]
