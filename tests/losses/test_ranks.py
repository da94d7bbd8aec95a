"""Averages over two data-parallel ranks: the same λ and gradients as one rank with all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from specforge.core.target_distribution import TargetDistribution
from specforge.losses.reduction import pool_heads, reduce_heads, target_shape

from specforge_lk.losses import LOSSES

ROWS, HEADS, VOCAB, DRAFT_VOCAB = 11, 3, 40, 24
#: Ranks of unlike size: a mean of the ranks' means would be another number.
SPLIT = (slice(0, 3), slice(3, ROWS))
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{record.name: (record.name, {}) for record in LOSSES},
    "weighted in the chain": ("lk_lambda", {"chain_weight": "dpace"}),
    "served": ("tau", {"serving": "temperature=0.8,top_k=20,drafting=greedy"}),
}


def rows() -> tuple[torch.Tensor, ...]:
    """Draft logits [rows, heads, V_d], target logits [.., V]; tokens, mask, weight [.., heads]."""
    generator = torch.Generator().manual_seed(0)
    draft = 2 * torch.randn(ROWS, HEADS, DRAFT_VOCAB, generator=generator)
    target = 2 * torch.randn(ROWS, HEADS, VOCAB, generator=generator)
    tokens = torch.randint(VOCAB, (ROWS, HEADS), generator=generator)
    # A chain is supervised up to some draft position.
    mask = (torch.rand(ROWS, HEADS, generator=generator) < 0.8).cumprod(1).bool()
    # The last head is supervised on the second rank alone.
    mask[SPLIT[0], -1] = False
    weight = torch.rand(ROWS, HEADS, generator=generator)
    return draft, target, tokens, mask, weight


def step(
    name: str, part: slice, group: object = None, chunk: int = ROWS
) -> dict[str, torch.Tensor]:
    """Loss, λ per head and the gradient of one rank's rows, its terms computed in chunks."""
    name, options = CASES[name]
    record = next(record for record in LOSSES if record.name == name)
    loss = record.build(record.options(**options))
    draft, target, tokens, mask, weight = (tensor[part] for tensor in rows())
    draft = draft.clone().requires_grad_()
    t2d = torch.arange(VOCAB) % 5 < 3
    terms = []
    for head in range(HEADS):
        pieces = [
            loss.terms(
                draft[i, head],
                TargetDistribution.from_logits(
                    target[i, head], t2d, shape=target_shape(loss)
                ).with_labels(tokens[i, head], t2d),
                mask[i, head],
            )
            for i in torch.arange(len(draft)).split(chunk)
        ]
        terms.append({key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]})
    of_heads = range(HEADS)
    heads = reduce_heads(
        loss,
        terms,
        [mask[:, head] for head in of_heads],
        position_weights=[weight[:, head] for head in of_heads],
        group=group,
    )
    total = pool_heads(heads)
    total.backward()
    # Losses without a λ are compared in what λ would be made of.
    used = [head.vectors.get("lambda", head.vectors["alpha"]) for head in heads]
    return {"loss": total.detach(), "lambda": torch.stack(used, 1), "grad": draft.grad}


def run_rank(rank: int, directory: str) -> None:
    store = dist.FileStore(f"{directory}/store", len(SPLIT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(SPLIT))
    results = {}
    for name in CASES:
        result = step(name, SPLIT[rank], dist.group.WORLD, chunk=2)
        # Data-parallel training averages gradients over ranks.
        results[name] = {**result, "grad": result["grad"] / len(SPLIT)}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(directory),), nprocs=len(SPLIT))
    return [torch.load(directory / f"{rank}.pt") for rank in range(len(SPLIT))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_in_chunks_equal_one(ranks, name):
    whole = step(name, slice(None))
    parts = [rank[name] for rank in ranks]
    for part in parts:
        torch.testing.assert_close(part["loss"], whole["loss"], rtol=1e-6, atol=1e-7)
    for key in ("lambda", "grad"):
        joined = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(joined, whole[key], rtol=2e-6, atol=1e-8)


def test_a_rank_by_itself_has_another_lambda():
    """What the two ranks above would have if they did not average together."""
    whole, alone = step("lk_lambda", slice(None)), step("lk_lambda", SPLIT[0])
    assert (alone["lambda"][0, 0] - whole["lambda"][0, 0]).abs() > 1e-3
