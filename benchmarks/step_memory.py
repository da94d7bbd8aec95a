"""The memory of a training step with its logits held, and with ``training.loss_fused_head``.

One step of EAGLE-3, DFlash and MTP in SpecForge's own training models, of drafts so small that
logits are nearly all of it. Only bytes are counted, so that other work on the machine does not
matter. The target of EAGLE-3 is made by its compact teacher: what a whole vocabulary of its logits
takes is another matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from rich.console import Console
from specforge.modeling.target.target_head import TargetHead
from torch import nn

from benchmarks.measure import Results, peak_allocated
from specforge_lk.cli.progress import each
from specforge_lk.losses import LOSSES

SOURCES: Final = ("benchmarks.step_memory",)
HIDDEN: Final = 32
HEADS: Final = 3
#: Positions of a sequence: attention's square of it is to be small.
LENGTH: Final = 128

#: The config.json of a target that is hardly more than its vocabulary.
TARGET: Final = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HIDDEN // 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1 << 15,
    "initializer_range": 0.02,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Cell:
    """One step: N supervised positions in sequences of `LENGTH`, V tokens; float32, three heads.

    EAGLE-3's draft vocabulary is V of 2 V; the others have the whole one. The positions of DFlash
    are the slots of its blocks, as many as tokens.
    """

    algorithm: str
    tokens: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.tokens} x {self.vocabulary}"


ALGORITHMS: Final = ("eagle3", "dflash", "mtp")
GRID: Final = tuple(
    Cell(algorithm, tokens, 16384) for algorithm in ALGORITHMS for tokens in (256, 512, 1024)
)
QUICK: Final = tuple(Cell(algorithm, LENGTH, 512) for algorithm in ALGORITHMS)


def run(
    path: Path, grid: tuple[Cell, ...], *, budget: float, fresh: bool, console: Console
) -> None:
    """Measure the cells that ``path`` does not hold yet; arguments as for `operation.run`."""
    results = Results(path, *SOURCES, fresh=fresh)
    waiting = [cell for cell in grid if not results.has(asdict(cell))]
    for cell in each("step memory", waiting, console):
        results.add(asdict(cell), peaks={name: peak(cell, name == "fused") for name in WAYS})


WAYS: Final = ("held", "fused")


def peak(cell: Cell, fused: bool) -> int:
    """Return the most bytes of one forward and backward pass beyond weights and features."""
    torch.manual_seed(0)
    step = _STEPS[cell.algorithm](cell, fused)
    step()  # what is made once stays
    return peak_allocated(step)


def _loss() -> Any:
    record = next(record for record in LOSSES if record.name == "lk_lambda")
    return record.build(record.options())


def _draft(algorithm: str, target: dict[str, Any], kept: int) -> nn.Module:
    from specforge.modeling.auto import AutoDraftModel
    from specforge.training.model_loading import load_draft_config_source

    from specforge_lk.drafts.table import DRAFTS

    with TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(DRAFTS[algorithm].config(target, kept, HEADS)))
        config = load_draft_config_source(str(path))
    options = {}
    if algorithm == "eagle3":
        options = {"attention_backend": "sdpa"}
    else:
        config._attn_implementation = "sdpa"
    return AutoDraftModel.from_config(config, torch_dtype=torch.float32, **options)


def _head(target: dict[str, Any]) -> TargetHead:
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(target))
        head = TargetHead(directory)
    head.freeze_weights()
    return head.eval()


def _features(cell: Cell, **shapes: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(cell.tokens // LENGTH, LENGTH, dtype=torch.long)
    return {
        "input_ids": torch.randint(cell.vocabulary, mask.shape),
        "attention_mask": mask,
        "loss_mask": mask.clone(),
        **{name: torch.randn(*mask.shape, size) for name, size in shapes.items()},
    }


def _step(strategy: Any, algorithm: str, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
    from specforge.runtime.contracts import TrainBatch

    names = list(map(str, range(len(tensors["input_ids"]))))
    batch = TrainBatch(names, algorithm, tensors, {"target_repr": "hidden_state"})
    module = strategy.trainable_module()

    def step() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        strategy.forward_loss(batch).loss.backward()

    return step


def _eagle3(cell: Cell, fused: bool) -> Callable[[], None]:
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.training.strategies.base import Eagle3TrainStrategy

    target = {**TARGET, "vocab_size": 2 * cell.vocabulary}
    draft: Any = _draft("eagle3", target, cell.vocabulary)
    draft.t2d[:] = torch.arange(2 * cell.vocabulary) < cell.vocabulary
    draft.d2t.zero_()
    draft.freeze_embedding()
    model = OnlineEagle3Model(
        draft, HEADS, attention_backend="sdpa", loss=_loss(), loss_fused_head=fused
    )
    strategy = Eagle3TrainStrategy(
        model,
        target_head=_head(target),
        compact_teacher=True,
        compact_teacher_chunk_size=cell.vocabulary // 8,
    )
    return _step(strategy, "eagle3", _features(cell, hidden_state=3 * HIDDEN, target=HIDDEN))


def _dflash(cell: Cell, fused: bool) -> Callable[[], None]:
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.target.target_utils import LentHead
    from specforge.training.strategies.base import DFlashTrainStrategy
    from transformers import LlamaConfig

    target = {**TARGET, "vocab_size": cell.vocabulary}
    head = LentHead(HIDDEN, cell.vocabulary, LlamaConfig(**target)).requires_grad_(False)
    draft: Any = _draft("dflash", target, cell.vocabulary)
    model = OnlineDFlashModel(
        draft,
        head,
        nn.Embedding(cell.vocabulary, HIDDEN).requires_grad_(False),
        mask_token_id=0,
        block_size=draft.block_size,
        attention_backend="sdpa",
        num_anchors=LENGTH // draft.block_size,
        loss=_loss(),
        loss_fused_head=fused,
    )
    states = {"hidden_states": 3 * HIDDEN, "target_last_hidden_states": HIDDEN}
    return _step(DFlashTrainStrategy(model), "dflash", _features(cell, **states))


def _mtp(cell: Cell, fused: bool) -> Callable[[], None]:
    from specforge_lk.drafts.training import HeadModel, HeadTrainStrategy

    target = {**TARGET, "vocab_size": cell.vocabulary}
    draft: Any = _draft("mtp", target, cell.vocabulary)
    model = HeadModel(draft, HEADS, _loss(), loss_fused_head=fused)
    strategy = HeadTrainStrategy(model, target_head=_head(target), name="mtp")
    return _step(strategy, "mtp", _features(cell, hidden_state=HIDDEN))


_STEPS: Final = {"eagle3": _eagle3, "dflash": _dflash, "mtp": _mtp}
