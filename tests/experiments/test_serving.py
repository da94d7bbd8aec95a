"""The comparison of a serving engine with our decoding finds what differs, and nothing else."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from scipy import stats

from experiments.serving import __main__ as serve_check
from experiments.serving import compare
from experiments.serving.cases import DRAFTS
from experiments.serving.compare import Record
from experiments.serving.layouts import write_mimo
from experiments.serving.report import ServedResponses, ServingReport, continued, write
from specforge_lk.evaluate.rounds import Rounds

HEADS = 4


def decode(rng, rates, prompts=32, steps=40):
    """Records of prompts whose steps accept position k with probability rates[k]."""
    hits = rng.random((prompts, steps, HEADS)) < rates
    accepted = hits.cumprod(-1).sum(1)
    return [Record(steps, tuple(map(int, row))) for row in accepted]


def test_an_engine_is_counted_as_decoding_counts():
    # 1 token from the prompt, then steps of 2, 0 and 4 accepted tokens and one of the target each.
    steps = [2, 0, 4]
    assert compare.engine_record(steps, 10, False, HEADS) == Record(3, (2, 2, 1, 1))
    # The response ended with the first token that the last step accepted.
    assert compare.engine_record(steps, 6, True, HEADS) == Record(3, (2, 1, 0, 0))
    # Cut off by its length, the last step counts whole.
    assert compare.engine_record(steps, 6, False, HEADS) == Record(3, (2, 2, 1, 1))
    assert compare.engine_record([], 1, True, HEADS) == Record(0, (0, 0, 0, 0))


def test_deterministic_records_must_be_the_same_prompt_by_prompt():
    rng = np.random.default_rng(0)
    ours = decode(rng, (0.2, 0.2, 0.2, 0.2))
    assert compare.agreement(ours, ours, deterministic=True).passed
    # The same draft in other places: no sum gives it away, the prompts do.
    moved = ours[1:] + ours[:1]
    assert compare.agreement(moved, ours, deterministic=False).passed
    found = compare.agreement(moved, ours, deterministic=True)
    assert not found.passed and found.differing > 20
    # A near-tie in one of them is no difference.
    tie = [Record(41, ours[0].accepted), *ours[1:]]
    assert compare.agreement(tie, ours, deterministic=True).passed


def test_sampled_acceptance_agrees_within_its_intervals():
    rng = np.random.default_rng(1)
    rates = (0.2, 0.15, 0.15, 0.15)
    ours = decode(rng, rates)
    verdicts = [
        compare.agreement(decode(rng, rates), ours, deterministic=False).passed for _ in range(50)
    ]
    assert sum(verdicts) >= 45
    lower = compare.agreement(decode(rng, (0.14, *rates[1:])), ours, deterministic=False)
    assert not lower.passed and lower.intervals[0][1] < 0
    # Nothing accepted on either side: nothing was compared.
    nothing = decode(rng, (0, 0, 0, 0))
    assert not compare.agreement(nothing, nothing, deterministic=True).passed
    # A position that is never accepted has an interval as well.
    never = compare.agreement(decode(rng, (0.2, 0.2, 0, 0)), ours, deterministic=False)
    assert all(low < high for low, high in never.intervals)


def test_an_engine_takes_the_rounds_that_are_computed():
    """Two drafted tokens a round, each accepted by a coin; then an engine whose coin is worse."""
    rng, count, length = np.random.default_rng(0), 400, 41
    past = np.full((count * (length - 1), 2), 0.5)
    flat = np.ones(len(past))
    lengths = np.full(count, length)
    rounds = Rounds(np.arange(count), lengths, past, past, flat, flat == 0)

    def taken(rate):
        left, steps = lengths - 1, np.zeros(count, dtype=int)
        while (left > 0).any():
            steps += left > 0
            left = left - 1 - (rng.random((count, 2)) < rate).cumprod(1).sum(1)
        return steps.tolist()

    found = compare.prediction(rounds, taken(0.5), deterministic=False)
    assert found.passed and found.error < 0.01 * found.rounds
    assert found.narrower is None  # the responses are alike: computing leaves no interval at all
    assert not compare.prediction(rounds, taken(0.45), deterministic=False).passed

    certain = Rounds(np.arange(count), lengths, past > 1, past > 1, flat, flat == 0)
    steps = [40] * count
    assert compare.prediction(certain, steps, deterministic=True).passed
    assert compare.prediction(certain, [41, *steps[1:]], deterministic=True).differing == 1
    assert not compare.prediction(certain, taken(0.1), deterministic=True).passed


def test_score_interval_is_scipys():
    for count, trials in ((0, 40), (3, 1286), (207, 1286), (40, 40)):
        expected = stats.binomtest(count, trials).proportion_ci(0.95, method="wilson")
        low, high = compare.wilson(count, trials, stats.norm.ppf(0.975))
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_first_differing_token_and_its_gap_are_reported():
    expected = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6]]
    best = [[[(t, -0.1), (9, -0.1005)] for t in tokens] for tokens in expected]
    found = [[5, 6, 7], [5, 9, 1], [5, 8, 7], [5, 6, 4]]
    near, wrong, longer = compare.mismatches(found, expected, best)
    assert (near.prompt, near.position, near.expected, near.found) == (1, 1, 6, 9)
    assert near.gap == pytest.approx(0.0005) and near.near_tie
    assert (wrong.found, wrong.gap, wrong.near_tie) == (8, None, False)
    assert longer.position == 2 and not longer.near_tie


def test_an_mtp_module_becomes_vllms_mimo(tmp_path):
    size, heads, prefix = 8, 2, "model.layers.3."
    weights = {
        f"{prefix}{name}.weight": torch.randn(shape)
        for name, shape in {
            "embed_tokens": (20, size),
            "enorm": (size,),
            "hnorm": (size,),
            "eh_proj": (size, 2 * size),
            "shared_head.norm": (size,),
            "shared_head.head": (20, size),
            "self_attn.q_proj": (size, size),
            "self_attn.k_proj": (size // 2, size),
            "self_attn.v_proj": (size // 2, size),
            "mlp.gate_proj": (16, size),
        }.items()
    }
    config = {"hidden_size": size, "num_attention_heads": heads, "num_hidden_layers": 3}
    draft, served = tmp_path / "draft", tmp_path / "served"
    draft.mkdir()
    save_file(weights, draft / "model.safetensors")
    (draft / "config.json").write_text(json.dumps(config))
    write_mimo(draft, served)

    written = load_file(served / "model.safetensors")
    assert all(name.startswith("model.mtp_layers.0.") for name in written)
    assert not any("embed_tokens" in name or "shared_head" in name for name in written)
    embedded, state = torch.randn(2, size), torch.randn(2, size)
    there = torch.cat([state, embedded], -1) @ written["model.mtp_layers.0.input_proj.weight"].T
    here = torch.cat([embedded, state], -1) @ weights[f"{prefix}eh_proj.weight"].T
    torch.testing.assert_close(there, here)
    # vLLM would not notice that they are missing.
    assert not written["model.mtp_layers.0.self_attn.k_proj.bias"].any()

    (draft / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    with pytest.raises(ValueError, match="head_dim 16"):
        write_mimo(draft, served)


def test_every_part_of_the_check_must_pass(tmp_path):
    counts = dict(client_killed_at=1, server_killed_at=2, responses=4, tokens=40, with_ids=4)
    responses = ServedResponses(prompts=4, **counts, sampled_again=3, captured=4, passed=False)
    empty = ServingReport(settings={}, versions={}, training={})
    report = empty.model_copy(update={"server": responses})
    assert empty.passed and not report.passed
    (path, drawn) = write(report, tmp_path / "report.json")
    assert "tokens of 3 of them" in drawn.read_text() and "FAILED" in drawn.read_text()
    # Another run without the server keeps what was found.
    assert continued(empty, path).server == responses


def test_a_proposer_of_ours_is_named_with_its_draft():
    served = {draft.name: draft for draft in DRAFTS}
    draft = served["mlp_speculator_recipe"]
    module, _, name = draft.speculative_config("greedy")["model"].rpartition(".")
    assert name in import_module(module).__all__
    assert draft.engine_options["additional_config"] == {
        "specforge_lk": {"draft": str(draft.served)}
    }
    assert "additional_config" not in served["medusa"].engine_options


def test_what_is_loaded_into_the_class_of_vllm_has_the_whole_vocabulary():
    """The class takes no other; the recipe's draft, of a truncated one, is served by ours."""
    (loaded,) = (draft for draft in DRAFTS if draft.method is None)
    assert loaded.algorithm == "mlp_speculator" and not loaded.runs
    assert loaded.changes["draft_vocab_size"] == 49152


@pytest.mark.parametrize("value", ["eagle3", "eagle3=absent"])
def test_a_given_draft_that_is_not_one_is_named(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match=f"^{value}: NAME=DIR"):
        serve_check.main(given=[value])
