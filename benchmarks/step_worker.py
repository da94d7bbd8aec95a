"""Training steps on request: a line with a loss on stdin, a line with its figures on stdout.

Runs in a process of its own with the SpecForge that is on its path, patched or not; what the
unpatched one lacks is not imported. See `training_step`.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
from specforge.modeling.target.target_head import TargetHead
from specforge.optimizer import BF16Optimizer
from specforge.runtime.contracts import TrainBatch
from specforge.training.backend import TrainingBackend
from specforge.training.controller import TrainerCore
from specforge.training.strategies.base import Eagle3TrainStrategy
from transformers import PretrainedConfig

from benchmarks.measure import peak_resident, timed
from specforge_lk.losses import LOSSES

DRAFT_CONFIG: Final = Path(__file__).parent.parent / "configs/smollm2-135m/eagle3-draft.json"
PATCHED: Final = "loss" in inspect.signature(OnlineEagle3Model.__init__).parameters
#: `lk_loss_type` of SpecForge's own objectives.
STOCK: Final = {"kl": None, "lk_alpha": "alpha", "lk_lambda": "lambda"}


class _OneProcess(TrainingBackend):
    """What SpecForge's own backend does on one rank; that one needs a process group."""

    name = "one_process"

    def __init__(self, optimizer: BF16Optimizer) -> None:
        self.optimizer = optimizer

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def backward(self, loss: torch.Tensor, *, is_boundary: bool = True) -> None:
        loss.backward()

    def step(self, *before_update: Callable[[torch.Tensor], None]) -> torch.Tensor | None:
        # Unpatched, SpecForge's optimizer takes nothing.
        return self.optimizer.step(*before_update)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise NotImplementedError(
            "the benchmark starts every optimizer anew: there is none to load"
        )


def main() -> None:
    cell = json.loads(sys.argv[1])
    # Whatever libraries print must not mix with the answers; errors go to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    config = AutoDraftModelConfig.from_file(str(DRAFT_CONFIG))
    config.draft_vocab_size = cell["vocabulary"]
    batch, head = _batch(config, cell), _target_head(config)
    cores: dict[str, TrainerCore] = {}
    for line in sys.stdin:
        loss = line.strip()
        if loss not in cores:
            cores[loss] = _core(config, cell["heads"], loss, head)
        answer = {"patched": PATCHED, **_step(cores[loss], batch)}
        print(json.dumps(answer), file=answers, flush=True)


def _step(core: TrainerCore, batch: TrainBatch) -> dict[str, float]:
    results = []
    with peak_resident() as grown:
        seconds = timed(lambda: results.append(core.train_step(batch)))
        resident = grown()
    return {"seconds": seconds, "resident": resident, "loss": results[0].metrics["loss"]}


def _core(config: PretrainedConfig, heads: int, loss: str, head: TargetHead) -> TrainerCore:
    torch.manual_seed(0)
    draft = AutoDraftModel.from_config(config, attention_backend="sdpa", torch_dtype=torch.float32)
    step = config.vocab_size // config.draft_vocab_size
    draft.t2d.zero_()
    draft.t2d[: config.draft_vocab_size * step : step] = True
    draft.d2t.copy_(torch.arange(config.draft_vocab_size) * (step - 1))
    draft.freeze_embedding()
    objective: dict[str, Any]
    if PATCHED:
        record = next(known for known in LOSSES if known.name == loss)
        objective = {"loss": record.build(record.options())}
    else:
        objective = {"lk_loss_type": STOCK[loss], "kl_decay": 3.0}
    model = OnlineEagle3Model(draft, heads, attention_backend="sdpa", **objective)
    optimizer = BF16Optimizer(draft, lr=1e-4, total_steps=1000)
    strategy = Eagle3TrainStrategy(model, target_head=head)
    return TrainerCore(strategy, _OneProcess(optimizer))


def _target_head(config: PretrainedConfig) -> TargetHead:
    with TemporaryDirectory() as directory:
        described = {"model_type": "llama"}
        described |= {name: getattr(config, name) for name in ("hidden_size", "vocab_size")}
        (Path(directory) / "config.json").write_text(json.dumps(described))
        torch.manual_seed(1)
        head = TargetHead(directory)
    torch.nn.init.normal_(head.fc.weight, std=2 * config.hidden_size**-0.5)
    head.freeze_weights()
    return head.eval()


def _batch(config: PretrainedConfig, cell: dict[str, int]) -> TrainBatch:
    generator = torch.Generator().manual_seed(2)
    shape = cell["batch"], cell["sequence"]
    loss_mask = torch.zeros(shape, dtype=torch.long)
    loss_mask[:, cell["sequence"] // 2 :] = 1
    tensors = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "loss_mask": loss_mask,
        "hidden_state": torch.randn(*shape, 3 * config.hidden_size, generator=generator),
        "target": torch.randn(*shape, config.hidden_size, generator=generator),
    }
    metadata = {"target_repr": "hidden_state"}
    return TrainBatch(list(map(str, range(shape[0]))), "eagle3", tensors, metadata)


if __name__ == "__main__":
    main()
