"""Speculative generation: equality with the target alone, and honest acceptance counts."""

import functools

import numpy as np
import pytest
import torch
from rounding import rounding
from tiny_target import VOCAB_SIZE, build_model, build_tokenizer, save_draft
from transformers import AutoConfig, AutoModelForCausalLM
from written_drafts import Bigram, Endless, Oracle, nearly_bigram

from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import speculate
from specforge_lk.decode.target import Target
from specforge_lk.serving import Drafting, Serving

HEADS = 3
#: A chain verified token by token, in two steps, and at once.
BLOCKS = pytest.mark.parametrize("block", [1, 2, HEADS + 1])
#: Ragged on purpose: lengths 1 to 23.
PROMPTS = [list(range(10, 10 + n)) for n in (7, 1, 23, 12, 3)]


@pytest.fixture(scope="module")
def target():
    return Target(build_model().double(), build_tokenizer())


def greedy_alone(target, prompt, count):
    """The likeliest continuation, of at most 60 tokens."""
    return _greedy_alone(target.model, frozenset(target.eos_ids), tuple(prompt))[:count]


@functools.cache  # without a cache of keys and values, it takes most of the time
def _greedy_alone(model, eos_ids, prompt):
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(60):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            best, second = logits.topk(2).values
            # Norms are float32 ones. Were two tokens closer than their rounding, either is right.
            assert best - second > rounding(logits, torch.float32, 4)["atol"]
            tokens.append(int(logits.argmax()))
            if tokens[-1] in eos_ids:
                break
    return tokens[len(prompt) :]


def check_equal(target, draft, block, count=40):
    results = speculate(
        target,
        draft,
        PROMPTS,
        heads=HEADS,
        rule=Serving(0),
        max_new_tokens=count,
        block=block,
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == greedy_alone(target, prompt, count)
    return results


@BLOCKS
def test_temperature_zero_equals_the_target_alone(target, tmp_path, block):
    check_equal(target, load_draft(save_draft(tmp_path), target), block)


@pytest.fixture(scope="module", params=["gpt_oss", "mistral"])
def sliding_target(request):
    """Every other layer sees the last positions only, and attention has sinks; or every layer."""
    config = AutoConfig.for_model(
        request.param,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        initializer_range=0.2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        experts_implementation="eager",
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Endless(AutoModelForCausalLM.from_config(config).double(), build_tokenizer())


@BLOCKS
def test_a_window_is_counted_in_positions(sliding_target, block):
    """Not in slots of the cache, between which there are those of rejected tokens."""
    oracle = Oracle([p + greedy_alone(sliding_target, p, 60) for p in PROMPTS])
    results = check_equal(sliding_target, oracle, block)
    assert 0.4 < sum(r.accepted for r in results) / sum(r.drafted for r in results) < 0.9


@BLOCKS
def test_temperature_zero_equals_the_target_alone_when_most_is_accepted(target, block):
    target = Endless(target.model, target.tokenizer)
    oracle = Oracle([p + greedy_alone(target, p, 60) for p in PROMPTS])
    results = check_equal(target, oracle, block)
    accepted, drafted = sum(r.accepted for r in results), sum(r.drafted for r in results)
    assert 0.4 < accepted / drafted < 0.9
    for result in results:
        assert result.reached[0] == result.drafted / HEADS
        np.testing.assert_array_equal(result.accepted_at[:-1], result.reached[1:])
        assert result.accepted_at.sum() == result.accepted
        # At temperature 0 the exact acceptance probability is the outcome itself.
        np.testing.assert_array_equal(result.alpha, result.accepted_at)


@BLOCKS
def test_nothing_counts_behind_the_end_of_sequence(target, block):
    """With the oracle's second token declared the end, a chain through it stops counting there."""
    prompt = PROMPTS[0]
    continuation = greedy_alone(target, prompt, 8)
    end = continuation[2]
    assert end not in continuation[:2]
    oracle = Oracle([prompt + continuation])

    class Ending(Target):
        eos_ids = frozenset([end])

    ending = Ending(target.model, target.tokenizer)
    (result,) = speculate(
        ending,
        oracle,
        [prompt],
        heads=HEADS,
        rule=Serving(0),
        max_new_tokens=8,
        block=block,
    )
    # The prompt has 7 tokens: continuation[1] is at position 8, [2] at 9, neither a multiple of 5.
    assert result.tokens == continuation[:3]
    assert (result.drafted, result.accepted) == (2, 2)
    assert result.reached.tolist() == [1, 1, 0]


def test_neither_blocks_nor_shared_prefills_change_the_record(target):
    oracle = Oracle([p + greedy_alone(target, p, 60) for p in PROMPTS])
    prefills = Prefills(target, oracle.capture_layers)
    first, *others = (
        speculate(
            target,
            oracle,
            PROMPTS,
            heads=HEADS,
            rule=Serving(0),
            max_new_tokens=30,
            block=block,
            prefills=shared,
        )
        for block, shared in ((HEADS + 1, None), (2, prefills), (1, prefills))
    )
    assert prefills.of(PROMPTS) is prefills.of([list(prompt) for prompt in PROMPTS])
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a.tokens, a.drafted, a.accepted) == (b.tokens, b.drafted, b.accepted)
            np.testing.assert_array_equal(a.reached, b.reached)
            np.testing.assert_array_equal(a.accepted_at, b.accepted_at)


@pytest.mark.parametrize("drafting", Drafting)
def test_exact_alpha_agrees_with_the_acceptances(drafting):
    target = nearly_bigram(Endless)
    results = speculate(
        target,
        Bigram(target),
        PROMPTS * 12,
        heads=HEADS,
        rule=Serving(0.2, drafting=drafting),
        max_new_tokens=48,
        generator=torch.Generator().manual_seed(0),
    )
    reached = sum(r.reached for r in results)
    exact = sum(r.alpha for r in results) / reached
    empirical = sum(r.accepted_at for r in results) / reached
    coverage = sum(r.coverage for r in results) / reached
    assert (reached > 100).all()
    assert (np.abs(exact - empirical) < 4 * np.sqrt(exact * (1 - exact) / reached)).all()
    assert (exact > 0.05).all() and (exact < coverage).all() and (coverage < 0.9).all()
