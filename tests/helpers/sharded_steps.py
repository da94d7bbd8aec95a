"""One training step of every algorithm under SpecForge's own backend, by the ranks of one group.

A worker writes what the loss was given, and the loss and gradients that came out.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from fsdp_cpu import install
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_model
from torch.overrides import TorchFunctionMode
from training_run import DRAFT_VOCAB_SIZE, algorithm_settings

from specforge_lk.drafts.table import DRAFTS

BUILT_IN = tuple(name for name, draft in DRAFTS.items() if draft.trainer is None)
ALGORITHMS = tuple(DRAFTS)
WHOLE_VOCABULARY = tuple(name for name, draft in DRAFTS.items() if draft.whole_vocabulary)
SHARDINGS = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
LENGTH, ROWS = 14, 2
#: Three captured layers for EAGLE-3's family, two for DFlash's.
CAPTURED = {"eagle3": 3, "peagle": 3, "dflash": 2, "domino": 2, "dspark": 2}


class Case(NamedTuple):
    """What a step is trained with.

    Attributes:
        algorithm: ``training.strategy``.
        dtype: of the draft, and in which FSDP computes.
        head: ``model.target_head_dtype``; None for unset.
        compact: the compact teacher.
        streamed: the collator of streamed samples.
        fused: ``training.loss_fused_head``.
    """

    algorithm: str
    dtype: str
    head: str | None
    compact: bool = False
    streamed: bool = False
    fused: bool = False


def runs(world: int) -> list[tuple[Case, str]]:
    """The steps of a world: every combination that an algorithm has, with every sharding.

    Of one process FSDP makes NO_SHARD with mixed precision, so SHARD_GRAD_OP stands for FULL_SHARD
    there. Two processes shard. Streamed samples differ by their collator alone, and the head's
    dtype by what is loaded: the two that shard meet each of them once.
    """
    found = []
    for algorithm, dtype, head in itertools.product(
        ALGORITHMS, ("bfloat16", "float32"), ("float32",) if world > 1 else (None, "float32")
    ):
        teachers = (False, True) if algorithm == "eagle3" else (False,)
        found += [
            (Case(algorithm, dtype, head, compact), sharding)
            for compact in teachers
            for sharding in (SHARDINGS if world > 1 else SHARDINGS[:2])
        ]
    for algorithm in ALGORITHMS:
        found.append((Case(algorithm, "bfloat16", "float32", streamed=True), "SHARD_GRAD_OP"))
        if world > 1:
            case = Case(algorithm, "bfloat16", None)
            found += [(case, sharding) for sharding in SHARDINGS[:2]]
    return found


# ---------------------------------------------------------------------------- what is given


def head_weight() -> torch.Tensor:
    """[V, H] multiples of 1/256 below 2, which bfloat16 does not hold."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-511, 512, (VOCAB_SIZE, HIDDEN_SIZE), generator=generator) / 256


def states(rank: int) -> torch.Tensor:
    """[B, L, H] final states of a rank's samples, multiples of 1/256 below 2.

    bfloat16 does not hold them. Their products with the head are sums of 32 multiples of 2^-16
    below 4, so float32 has every logit exactly.
    """
    generator = torch.Generator().manual_seed(11 + rank)
    return torch.randint(-511, 512, (ROWS, LENGTH, HIDDEN_SIZE), generator=generator) / 256


def draft_vocabulary() -> torch.Tensor:
    """[V] bool."""
    kept = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    kept[torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(3))[:96]] = True
    return kept


def prepare(root: Path) -> None:
    """The target, the draft vocabulary and the drafts' configs."""
    model = build_model()
    model.lm_head.weight.data = head_weight()
    model.save_pretrained(root / "target")
    kept = draft_vocabulary()
    d2t = kept.nonzero().squeeze(-1) - torch.arange(DRAFT_VOCAB_SIZE)
    torch.save({"t2d": kept, "d2t": d2t}, root / "mapping.pt")
    for algorithm in ALGORITHMS:
        draft, *_ = algorithm_settings(algorithm, model.config.to_dict())
        (root / f"{algorithm}.json").write_text(json.dumps(draft))


def _records(algorithm: str, rank: int) -> list[dict[str, torch.Tensor]]:
    """Samples [1, L, ...] with the names that streams give them."""
    generator = torch.Generator().manual_seed(rank)
    rows = 1 if algorithm == "peagle" else ROWS
    found = []
    for row in range(rows):
        mask = torch.ones(1, LENGTH, dtype=torch.long)
        mask[:, :2] = 0
        record = {
            "input_ids": torch.randint(VOCAB_SIZE, (1, LENGTH), generator=generator),
            "loss_mask": mask,
            "attention_mask": torch.ones_like(mask),
        }
        final = states(rank)[row : row + 1]
        captured = CAPTURED.get(algorithm, 0)
        aux = torch.randn(1, LENGTH, captured * HIDDEN_SIZE, generator=generator)
        if algorithm in ("eagle3", "peagle"):
            record |= {"hidden_state": aux, "target": final}
        elif captured:
            record |= {"hidden_states": aux, "target_last_hidden_states": final}
        else:
            record["hidden_state"] = final
        found.append(record)
    return found


#: The names that captured files give to what streams call otherwise.
_IN_FILES = {"hidden_state": "aux_hidden_state", "target": "hidden_state"}


def _batch(algorithm: Any, name: str, rank: int, streamed: bool) -> dict[str, torch.Tensor]:
    records = _records(name, rank)
    if streamed:
        collate = algorithm.providers.server_streaming_for("text").build_collator()
        return collate(records)
    provider = algorithm.providers.offline_for("text")
    renamed = _IN_FILES if name in ("eagle3", "peagle") else {}
    normalize, collate = provider.build_normalizer(LENGTH), provider.build_collator()
    features = [
        normalize(
            {
                renamed.get(key, key): value[0] if value.dim() == 2 else value
                for key, value in record.items()
            }
        )
        for record in records
    ]
    return collate(features)


# ---------------------------------------------------------------------------- one step


class Recorder:
    """A loss that keeps what it was given."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.seen = loss, []

    def terms(self, logits: torch.Tensor, target: Any, mask: torch.Tensor) -> dict:
        """The loss's own; of supervised positions the target's fields are kept."""
        if not torch._C._current_graph_task_id() + 1:
            fields = (target.logits, target.log_normalizer, target.log_coverage)
            perfect = self.loss.terms(target.logits, target, mask)["alpha"]
            self.seen.append([value[mask.bool()].clone() for value in (*fields, perfect)])
        return self.loss.terms(logits, target, mask)

    def restrict_target(self, logits: torch.Tensor, kept: torch.Tensor | None) -> Any:
        """The loss's own."""
        return self.loss.restrict_target(logits, kept)

    def combine(self, terms: dict, mean: Any) -> dict:
        """The loss's own."""
        return self.loss.combine(terms, mean)


def _config(case: Case, root: Path) -> Any:
    from specforge.config import Config

    _, model, training = algorithm_settings(case.algorithm, {})
    model = {
        "target_model_path": str(root / "target"),
        "draft_model_config": str(root / f"{case.algorithm}.json"),
        "vocab_mapping_path": str(root / "mapping.pt"),
        "torch_dtype": case.dtype,
        **model,
        "target_head_dtype": case.head,
    }
    training = {
        "strategy": case.algorithm,
        "attention_backend": "sdpa",
        "compact_teacher": case.compact,
        "compact_teacher_chunk_size": 100 if case.compact else None,
        "loss": "lk_lambda",
        "loss_fused_head": case.fused,
        **training,
    }
    data = {"hidden_states_path": str(root)}
    return Config.model_validate({"model": model, "data": data, "training": training})


class Built(NamedTuple):
    """Strategy and backend of a case, as `specforge train` assembles them."""

    strategy: Any
    backend: Any
    algorithm: Any
    recorder: Recorder

    def batch(self, case: Case, rank: int, name: str = "a") -> Any:
        """A rank's samples, and random numbers of its own to train on them."""
        return batch_of(self.algorithm, case, rank, name)


def batch_of(algorithm: Any, case: Case, rank: int = 0, name: str = "a") -> Any:
    """A rank's samples, and random numbers of its own to train on them."""
    from specforge.runtime.contracts import TrainBatch

    tensors = _batch(algorithm, case.algorithm, rank, case.streamed)
    torch.manual_seed(1 + rank)
    return TrainBatch([name], case.algorithm, tensors, {"target_repr": "hidden_state"})


def assemble(case: Case, root: Path) -> tuple[Any, Any]:
    """The algorithm and what `specforge train` makes of the case before it is wrapped."""
    from specforge.application import resolve_run
    from specforge.training.assembly import build_model_bundle

    config = _config(case, root)
    algorithm = resolve_run(config).algorithm
    torch.manual_seed(0)
    return algorithm, build_model_bundle(config, algorithm=algorithm)


def strategy_of(algorithm: Any, bundle: Any, model: Any) -> Any:
    """The training step of a model, wrapped or not."""
    options = bundle.strategy_kwargs.options
    return algorithm.providers.step.build(model, target_head=bundle.target_head, **options)


def build(case: Case, sharding: str, root: Path) -> Built:
    """The training model, wrapped."""
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig

    algorithm, bundle = assemble(case, root)
    model = bundle.model
    recorder = model.loss = Recorder(model.loss)
    parallel = ParallelConfig.from_distributed(sharding_strategy=sharding)
    backend = FSDPTrainingBackend(parallel, optimizer_factory=_Descent)
    wrapped = backend.prepare_model(model, optimizer_target=model.draft_model)
    return Built(strategy_of(algorithm, bundle, wrapped), backend, algorithm, recorder)


class _Descent:
    """Gradient descent: AdamW reads its step counters, which are not the device's."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def step(self, before_update: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """The gradient's norm on this rank."""
        trained = [p for p in self.parameters if p.grad is not None]
        norm = torch.stack([p.grad.float().norm() for p in trained]).norm()
        if before_update:
            before_update(norm)
        for parameter in trained:
            parameter -= 1e-2 * parameter.grad
            parameter.grad = None
        return norm


def step(case: Case, sharding: str, root: Path, rank: int) -> dict[str, Any]:
    """Loss, gradients, and the target as the loss saw it."""
    built = build(case, sharding, root)
    out = built.strategy.forward_loss(built.batch(case, rank))
    built.backend.backward(out.loss)
    fields = [torch.cat(column) for column in zip(*built.recorder.seen, strict=True)]
    return {
        "loss": out.loss.detach(),
        "gradients": _gradients(built.strategy.trainable_module()),
        **dict(zip(("logits", "log_normalizer", "log_coverage", "perfect"), fields, strict=True)),
    }


class Reads(TorchFunctionMode):
    """Counts the operations that wait for a device."""

    waiting = frozenset({"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Every function of torch comes by here."""
        self.count += getattr(function, "__name__", "") in self.waiting
        return function(*args, **(kwargs or {}))


def reads(algorithm: str, root: Path, rank: int) -> list[int]:
    """Reads of every micro-step of a window of three, but for what is read inside the model."""
    from specforge.training.controller import TrainerCore

    case = Case(algorithm, "bfloat16", "float32")
    built = build(case, "SHARD_GRAD_OP", root)
    core = TrainerCore(built.strategy, built.backend, accumulation_steps=3)
    found = []
    for _ in range(3):
        batch = built.batch(case, rank)
        out = built.strategy.forward_loss(batch)
        given = mock.patch.object(built.strategy, "forward_loss", lambda *_, out=out: out)
        with given, Reads() as counted:
            core.train_step(batch)
        found.append(counted.count)
    return found


def broken(algorithm: str, sharding: str, root: Path, rank: int) -> tuple[str, bool]:
    """How training ends when rank 1 meets a state that is not finite in the middle of a window.

    Returns:
        The error's text, and whether the weights are as before.
    """
    from specforge.training.controller import TrainerCore

    case = Case(algorithm, "bfloat16", "float32")
    built = build(case, sharding, root)
    core = TrainerCore(built.strategy, built.backend, accumulation_steps=3)
    before = [parameter.detach().clone() for parameter in built.backend.module.parameters()]
    try:
        for name in "abc":
            batch = built.batch(case, rank, f"{rank}{name}")
            if (rank, name) == (1, "b"):
                for state in ("hidden_state", "hidden_states", "target"):
                    if state in batch.tensors:
                        batch.tensors[state][:, LENGTH // 2] = torch.nan
            core.train_step(batch)
    except FloatingPointError as error:
        after = built.backend.module.parameters()
        return str(error), all(map(torch.equal, before, after))
    return "", False


def unsupervised(algorithm: str, root: Path, rank: int) -> dict[str, torch.Tensor]:
    """Loss and gradients where no position of rank 1 is supervised."""
    case = Case(algorithm, "bfloat16", "float32")
    built = build(case, "SHARD_GRAD_OP", root)
    batch = built.batch(case, rank)
    if rank:
        batch.tensors["loss_mask"].zero_()
    out = built.strategy.forward_loss(batch)
    built.backend.backward(out.loss)
    return {"loss": out.loss.detach()} | _gradients(built.strategy.trainable_module())


def accumulated(case: Case, sharding: str, root: Path, rank: int) -> dict[str, torch.Tensor]:
    """Gradients of a window of two micro-steps, in the second of which rank 1 has no position."""
    built = build(case, sharding, root)
    losses = []
    for index in range(2):
        batch = built.batch(case, rank)
        if rank and index:
            batch.tensors["loss_mask"].zero_()
        out = built.strategy.forward_loss(batch)
        built.backend.backward(out.loss, is_boundary=index == 1)
        losses.append(out.loss.detach())
    return {"loss": torch.stack(losses)} | _gradients(built.strategy.trainable_module())


def windows() -> list[tuple[str, str]]:
    """Algorithms with trained and with frozen heads, and how their windows are sharded."""
    everywhere = ("eagle3", "mtp", "dflash")
    return [
        (name, sharding)
        for name in ALGORITHMS
        for sharding in (SHARDINGS if name in everywhere else ("SHARD_GRAD_OP",))
    ]


def _gradients(wrapped: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by the names of the draft's parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    @contextmanager
    def whole() -> Iterator[None]:
        if isinstance(wrapped, FSDP):
            with FSDP.summon_full_params(wrapped, with_grads=True):
                yield
        else:
            yield

    with whole():
        return {
            name.replace("_fsdp_wrapped_module.", "").split("draft_model.")[1]: value.grad.clone()
            for name, value in wrapped.named_parameters()
            if value.grad is not None
        }


def main(root: Path, rank: int, world: int) -> None:
    """Everything that a world does, into ``root/<world>-<rank>.pt``."""
    install()
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results: dict = {
        (tuple(case), sharding): step(case, sharding, root, rank) for case, sharding in runs(world)
    }
    if world == 1:
        results["reads"] = {name: reads(name, root, rank) for name in ALGORITHMS}
    else:
        results["unsupervised"] = {name: unsupervised(name, root, rank) for name in ALGORITHMS}
        results["accumulated"] = {
            (name, sharding, fused): accumulated(
                Case(name, "float32", "float32", fused=fused), sharding, root, rank
            )
            for name, sharding in windows()
            for fused in (False, True)
        }
        results["broken"] = {
            (name, sharding): broken(name, sharding, root, rank)
            for name in ALGORITHMS
            for sharding in SHARDINGS[: 3 if name in ("eagle3", "peagle", "dflash") else 2]
        }
    torch.save(results, root / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
