"""The target distribution inside the model, under SpecForge's own sharding and mixed precision.

Every algorithm, one and two processes, NO_SHARD (which is DDP), SHARD_GRAD_OP and FULL_SHARD, the
draft in bfloat16 and in float32. Target states and head are such that float32 holds every logit
exactly, and bfloat16 neither the states nor the head nor the logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_steps
import torch
from sharded_steps import (
    ALGORITHMS,
    WHOLE_VOCABULARY,
    Case,
    draft_vocabulary,
    head_weight,
    prepare,
    runs,
    states,
    windows,
)

pytestmark = pytest.mark.slow

WORLDS = (1, 2)
Results = dict[tuple[int, int], dict]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank of every world wrote."""
    root: Path = tmp_path_factory.mktemp("sharded")
    prepare(root)
    found = {}
    for world in WORLDS:
        command = [sys.executable, sharded_steps.__file__, root]
        ranks = [
            subprocess.Popen(
                [*map(str, command), str(rank), str(world)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in ranks]
        for rank, process in enumerate(ranks):
            assert not process.returncode, outputs[rank][-4000:]
            found[world, rank] = torch.load(root / f"{world}-{rank}.pt")
    return found


def of_algorithm(results: Results, algorithm: str) -> list[tuple[int, Case, str, dict]]:
    """Rank, case, sharding and what was written, of every step of an algorithm."""
    return [
        (rank, case, sharding, of_rank[tuple(case), sharding])
        for (world, rank), of_rank in results.items()
        for case, sharding in runs(world)
        if case.algorithm == algorithm
    ]


def definition(case: Case, rank: int) -> torch.Tensor:
    """[positions, V_d] log p in float64, of logits in the dtype that the case's head has."""
    whole = case.algorithm in WHOLE_VOCABULARY and case.algorithm != "mtp"
    # DFlash's family reads the head that it drafts with, which has the draft's dtype.
    dtype = getattr(torch, case.head or (case.dtype if whole else "bfloat16"))
    hidden, weight = states(rank).to(dtype).double(), head_weight().to(dtype).double()
    logits = (hidden @ weight.T).to(dtype).double().flatten(0, 1)
    kept = slice(None) if case.algorithm in WHOLE_VOCABULARY else draft_vocabulary()
    return logits.log_softmax(dim=-1)[:, kept]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_sees_the_distribution_of_the_head(results: Results, algorithm: str) -> None:
    """Log p of the definition, and for a perfect draft the definition's acceptance rate.

    A logit and a normalizer are rounded once, to half a unit in the last place of numbers below 64:
    2e-6 each. What is left of the 1e-5 is for the sum under the logarithm.
    """
    for rank, case, sharding, seen in of_algorithm(results, algorithm):
        expected = definition(case, rank)
        log_p = (seen["logits"].double() - seen["log_normalizer"].double()[:, None]).float()
        assert len(log_p) > 8
        # Which position a row is of is tested elsewhere; no two are within 1 of each other.
        gaps = (log_p[:, None].double() - expected).abs().amax(-1)
        closest = gaps.min(-1)
        assert closest.values.max() < 1e-5, (case, sharding, closest.values.max())
        alpha = expected[closest.indices].exp().sum(-1)
        torch.testing.assert_close(seen["perfect"].double(), alpha, rtol=1e-5, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_probabilities_sum_to_the_coverage(results: Results, algorithm: str) -> None:
    """But for the rounding of a normalizer below 64, half a unit in its last place: 2e-6 of p."""
    for _, case, sharding, seen in of_algorithm(results, algorithm):
        p = (seen["logits"].double() - seen["log_normalizer"].double()[:, None]).exp()
        coverage = seen["log_coverage"].double().exp()
        assert coverage.max() <= 1
        assert (p.sum(-1) - coverage).abs().max() < 3e-6, (case, sharding)
        if algorithm not in WHOLE_VOCABULARY:
            assert coverage.min() < 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sharding_changes_neither_loss_nor_gradients(results: Results, algorithm: str) -> None:
    """The same products and sums; a mean over two ranks is one rounded sum, halved, in any way.

    Weights lie elsewhere in memory, which may change how a product is rounded: a unit in the last
    place of the draft's dtype, carried through the dozen products of a tiny draft.
    """
    for (world, rank), of_rank in results.items():
        for case, sharding in runs(world):
            if case.algorithm != algorithm or case.streamed:
                continue
            plain, other = of_rank[tuple(case), "NO_SHARD"], of_rank[tuple(case), sharding]
            tolerance = 16 * torch.finfo(getattr(torch, case.dtype)).eps
            torch.testing.assert_close(other["loss"], plain["loss"], rtol=tolerance, atol=0)
            assert plain["gradients"].keys() <= other["gradients"].keys()
            assert any(gradient.any() for gradient in plain["gradients"].values())
            for name, gradient in plain["gradients"].items():
                atol = tolerance * float(gradient.abs().max())
                torch.testing.assert_close(other["gradients"][name], gradient, rtol=0, atol=atol)
            # Ranks train on samples of their own and end with one gradient.
            if rank:
                first = results[world, 0][tuple(case), sharding]
                assert not torch.equal(first["loss"], other["loss"])
                for name, gradient in first["gradients"].items():
                    assert torch.equal(gradient, other["gradients"][name]), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_metrics_are_read_once_where_they_are_logged(results: Results, algorithm: str) -> None:
    assert results[1, 0]["reads"][algorithm] == [0, 0, 1]


def test_gradients_are_those_of_logits(results: Results) -> None:
    """With ``training.loss_fused_head``, accumulated without and with synchronization.

    In float32, sums of some hundred products in another order: 16 units in the last place of the
    largest gradient.
    """
    for rank in range(2):
        found = results[2, rank]["accumulated"]
        for name, sharding in windows():
            plain, fused = (dict(found[name, sharding, fused]) for fused in (False, True))
            assert plain.keys() == fused.keys()
            assert plain["loss"][0] > 0 and bool(plain["loss"][1] > 0) == (rank == 0)
            for key, expected in plain.items():
                atol = 16 * torch.finfo(torch.float32).eps * float(expected.abs().max())
                torch.testing.assert_close(fused[key], expected, rtol=0, atol=atol)


def test_a_loss_that_is_not_finite_ends_all_ranks(results: Results) -> None:
    """With one message, before the update: a rank that left alone would keep the other waiting."""
    first, second = (results[2, rank]["broken"] for rank in range(2))
    for key, (message, unchanged) in first.items():
        assert (message, unchanged) == second[key], key
        assert unchanged, key
        assert "not finite at samples ['1b'] of rank 1:" in message, (key, message)


def test_a_rank_without_a_supervised_position_goes_along(results: Results) -> None:
    """It has no loss of its own, and the gradient of the other; none waits in a collective."""
    first, second = (results[2, rank]["unsupervised"] for rank in range(2))
    for algorithm in ALGORITHMS:
        assert first[algorithm]["loss"] > 0, algorithm
        assert second[algorithm].pop("loss") == 0, algorithm
        for name, gradient in second[algorithm].items():
            assert gradient.isfinite().all(), (algorithm, name)
            assert torch.equal(gradient, first[algorithm][name]), (algorithm, name)
        assert any(gradient.any() for gradient in second[algorithm].values()), algorithm
