"""Every algorithm wrapped by SpecForge's backend on the device, in bfloat16.

What a loss is given is compared with the definition in float64, and so are the terms that it
makes of it; sharding and a second process must change neither loss nor gradients. Target states
and LM head are such that float32 holds every product exactly.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.baselines import load
from benchmarks.gpu_check.record import ROOT, Record
from benchmarks.gpu_check.trainers import ALGORITHMS, BLOCKS, Workshop, multiples, tiny
from benchmarks.gpu_check.trainers import WAYS as ALL_WAYS
from specforge_lk.drafts.table import DRAFTS
from specforge_lk.overlap import overlap_terms

DTYPE: Final = "bfloat16"
SHARDINGS: Final = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
#: The registered loss, with logits and without.
WAYS: Final = tuple(way for way in ALL_WAYS if way.startswith("lk_lambda"))
PLAIN: Final = WAYS[0], "NO_SHARD"
VOCABULARY: Final = 1000
#: A log-probability is the difference of two numbers below 64, rounded to half a unit in the last
#: place each; the rest is for the sum under the logarithm.
LOG_P: Final = 1e-5
#: Terms of float32 logits below 64: eight roundings of half an eps.
TERMS: Final = 4 * torch.finfo(torch.float32).eps * 64
#: Weights lie elsewhere in memory, which may change how a product is rounded: units in the last
#: place of the draft's dtype, carried through the products of a small draft.
SAME: Final = 16 * torch.finfo(getattr(torch, DTYPE)).eps


class Observed:
    """A loss that compares its terms with float64, and what it is given with the definition."""

    def __init__(self, loss: Any, log_p: torch.Tensor) -> None:
        self._loss, self._log_p = loss, log_p
        self.errors: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def terms(self, logits: torch.Tensor, target: Any, mask: torch.Tensor, *more: Any) -> Any:
        """Return the loss's own terms."""
        found = self._loss.terms(logits, target, mask, *more)
        with torch.no_grad():
            self._compare(found, logits.detach(), target, mask.bool())
        return found

    def _compare(
        self, found: Mapping[str, torch.Tensor], z: torch.Tensor, target: Any, mask: torch.Tensor
    ) -> None:
        y, log_z = target.logits[mask].double(), target.log_normalizer[mask].double()
        if not len(y):
            return
        # Which position a row is of is tested elsewhere; no two are within 1 of each other.
        gaps = ((y - log_z[:, None])[:, None] - self._log_p).abs().amax(-1).amin(-1)
        exact = overlap_terms(z[mask].double(), y, log_z, impl="reference")
        self._note("log_p", gaps)
        for name in ("kl", "alpha"):
            if name in found:
                self._note(name, (found[name][mask].double() - getattr(exact, name)).abs())

    def _note(self, name: str, error: torch.Tensor) -> None:
        worst = float(error.nan_to_num(math.inf).max())
        self.errors[name] = max(worst, self.errors.get(name, 0.0))


def run(record: Record) -> None:
    """Check one process, then two on one device."""
    for world in record.each((1, 2)):
        # nccl refuses two processes on one device.
        backend = "nccl" if record.device == "cuda" and world == 1 else "gloo"
        with record.guarded(section="sharded", world=world, backend=backend):
            found = _group(record, world, backend)
            if isinstance(found, str):
                # What gloo lacks for a GPU's tensors is no fault of what is checked.
                wrong = {} if record.device == "cuda" and backend == "gloo" else {"ok": False}
                record.row(section="refused", world=world, backend=backend, reason=found, **wrong)
                continue
            for row in _compared(found, world, backend):
                record.row(**row)


# ---------------------------------------------------------------------------- processes


def _group(record: Record, world: int, backend: str) -> list[dict[Any, Any]] | str:
    """Return what every rank found, or why a rank could not begin or end."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # Forked, so that nothing is imported again; the device is not touched before.
        context = multiprocessing.get_context("fork")
        arguments = root, world, backend, record.device, record.dry
        ranks = [
            context.Process(target=_rank, args=(rank, *arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(record.seconds_left)
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        for rank in range(world):
            if (root / f"{rank}.error").exists():
                return (root / f"{rank}.error").read_text()
        if late or any(process.exitcode for process in ranks):
            return "a process did not end in time" if late else "a process died"
        return [torch.load(root / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, root: Path, world: int, backend: str, device: str, dry: bool) -> None:
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        if device == "cuda":
            torch.cuda.set_device(0)
        else:
            # FSDP1 on a CPU, as the suite has it.
            load(ROOT / "tests/helpers/fsdp_cpu.py").install()
            torch.set_num_threads(1)
        store = dist.FileStore(str(root / "store"), world)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        # Whether the backend takes two processes on one device shows at the first collective.
        dist.all_reduce(torch.zeros(1, device=device))
        found = _steps(rank, root / str(rank), world, device, dry)
        torch.save(found, root / f"{rank}.pt")
        dist.destroy_process_group()
    except Exception as error:
        line = " ".join(str(error).split()) or traceback.format_exc()[-300:]
        (root / f"{rank}.error").write_text(f"{type(error).__name__}: {line}"[:400])


def _steps(rank: int, root: Path, world: int, device: str, dry: bool) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    size = tiny(264 if dry else VOCABULARY)
    shop = Workshop(root, size, device, DTYPE, "float32", multiples)
    # One algorithm that shards as a whole and one by blocks are enough for a rehearsal.
    for algorithm in ("eagle3", "dflash") if dry else ALGORITHMS:
        shop.observe = partial(Observed, log_p=_definition(shop, algorithm, rank))
        for way in WAYS:
            for sharding in SHARDINGS if way == WAYS[0] or world > 1 else SHARDINGS[:2]:
                found[algorithm, way, sharding] = _step(shop, algorithm, way, sharding, rank)
    return found


def _step(shop: Workshop, algorithm: str, way: str, sharding: str, rank: int) -> Any:
    try:
        # A draft of its own: FSDP keeps the parameters of the one that it has wrapped.
        trainer = shop.draft(algorithm).trainer(way, sharding=sharding, rank=rank)
        torch.manual_seed(1 + rank)
        loss, gradients = trainer.gradients()
        errors = trainer.model.loss.errors
        return {
            "loss": loss.cpu(),
            "gradients": {k: v.cpu() for k, v in gradients.items()},
            "errors": errors,
        }
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return " ".join(str(error).split())[:300]


def _definition(shop: Workshop, algorithm: str, rank: int) -> torch.Tensor:
    """[positions, V_d] log p in float64, of logits in the dtype that the LM head has."""
    # DFlash's family reads the head that it drafts with, which has the draft's dtype.
    dtype = getattr(torch, DTYPE if algorithm in BLOCKS else "float32")
    hidden = shop.states(algorithm, rank).to(dtype).double()
    logits = (hidden @ shop.head_weight().to(dtype).double().T).to(dtype).double().flatten(0, 1)
    log_p = logits.log_softmax(-1)
    if DRAFTS[algorithm].whole_vocabulary:
        return log_p
    return log_p[:, shop.draft_vocabulary.to(log_p.device)]


# ---------------------------------------------------------------------------- comparison


def _compared(ranks: list[dict[Any, Any]], world: int, backend: str) -> list[dict[str, Any]]:
    rows = []
    for algorithm, way, sharding in ranks[0]:
        row: dict[str, Any] = {
            "section": "sharded",
            "algorithm": algorithm,
            "way": way,
            "sharding": sharding,
            "world": world,
            "backend": backend,
        }
        found = [of[algorithm, way, sharding] for of in ranks]
        plain = [of[algorithm, *PLAIN] for of in ranks]
        if failures := [of for of in (*found, *plain) if isinstance(of, str)]:
            # gloo may lack FSDP's collectives for a GPU's tensors, and some drafts hold logits.
            rows.append({**row, "failure": failures[0]})
            continue
        pairs = zip(found, plain, strict=True)
        errors: dict[str, float] = {}
        for of, other in pairs:
            for name, error in (*of["errors"].items(), *_differences(of, other).items()):
                errors[name] = max(error, errors.get(name, 0.0))
        same = all(
            torch.equal(gradient, of["gradients"][name])
            for of in found[1:]
            for name, gradient in found[0]["gradients"].items()
        )
        bounds = {"log_p": LOG_P, "kl": TERMS, "alpha": TERMS, "loss": SAME, "gradient": SAME}
        right = same and all(errors[name] <= bounds[name] for name in errors)
        rows.append({**row, "errors": errors, "ranks_agree": same, "ok": right})
    return rows


def _differences(found: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, float]:
    """Return how far loss and gradients are from those of the plain step, over their size."""
    worst = 0.0
    for name, gradient in plain["gradients"].items():
        other = found["gradients"].get(name)
        if other is None:
            return {"gradient": math.inf}
        size = float(gradient.abs().max())
        gap = float((other.double() - gradient.double()).abs().nan_to_num(math.inf).max())
        worst = max(worst, gap / size if size else gap)
    loss = abs(float(found["loss"]) / float(plain["loss"]) - 1)
    return {"loss": loss, "gradient": worst}
