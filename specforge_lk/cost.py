"""What a training run costs, computed from its config: parameters, memory, steps, FLOPs, features.

The draft is built on torch's meta device, so that parameters and matrix products are counted on
the module that trains, without its memory. Everything else is a formula of these counts and says
so in the sheet; two lines, the memory of unfused losses, are ratios that benchmarks/ measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from specforge_lk.drafts.table import DRAFTS
from specforge_lk.drafts.work import Work, WorkOf

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

#: Prompts that the paper trains on (section 5).
PROMPTS: Final = 660_000
#: A trained parameter in an optimizer step of SpecForge: in bfloat16 itself and its gradient, in
#: float32 copies of both and AdamW's moments. Where it is float32 its gradient is not copied.
TRAINING_STATE_BYTES: Final = 2 + 2 + 4 + 4 + 8
#: Forward + backward beyond the inputs, in float32 tensors of [N, V_d], N = 1024 and V_d = 32000:
#: 375.0 and 562.5 of 125 MiB in benchmarks/results/summary.md.
UNFUSED_KL: Final = 3.0
UNFUSED_LAMBDA: Final = 4.5
FORMULA, MEASURED, COUNTED = "formula", "measured", "counted"


#: Rows of logits that ``training.loss_fused_head`` has at a time on an accelerator, where their
#: vocabulary is not a small one.
CHUNK_ROWS: Final = 1024
#: SpecForge shapes so many of a position's target logits at a time, on average.
TARGET_CHUNK: Final = 32768
#: Algorithms that keep the target's logits on the draft vocabulary also then.
TARGET_HELD: Final = ("eagle3", "peagle")


@dataclass(frozen=True)
class StepLogits:
    """What the logits of one forward and backward pass take as the backward pass begins.

    Attributes:
        positions: N, supervised, of which every draft position has logits.
        heads: K.
        kept: V_d.
        vocabulary: V.
        element: bytes of a draft logit.
        target_element: bytes of a target logit as the target's head makes it.
        target_held: whether the algorithm is one of `TARGET_HELD`.
        trained: parameters of LM heads that learn, each counted once.
        shaped: whether a serving rule makes other target logits, in float32, of these.
        chunk: rows at a time.
    """

    positions: int
    heads: int
    kept: int
    vocabulary: int
    element: int
    target_element: int
    target_held: bool
    trained: int = 0
    shaped: bool = False
    chunk: int = CHUNK_ROWS

    @property
    def kept_element(self) -> int:
        """Bytes of a target logit on the draft vocabulary."""
        return 4 if self.shaped else self.target_element

    @property
    def held(self) -> int:
        """Bytes: target logits, draft logits of all heads, the gradient of one."""
        of_draft = (self.heads + 1) * self.element
        return self.positions * self.kept * (self.kept_element + of_draft)

    @property
    def fused(self) -> int:
        """Bytes of one chunk, of the LM heads' gradients in float32, and of a target that is held.

        A chunk's peak is either its target's logits, with those on the draft vocabulary, or the
        latter, a copy of the rows that one head is compared with, its logits and their gradient.
        """
        making = 0
        if not self.target_held:
            making = self.vocabulary * self.target_element
            if self.shaped:
                making += 4 * self.kept + 8 * min(self.vocabulary, TARGET_CHUNK)
            elif self.kept < self.vocabulary:
                making += self.target_element * self.kept
        comparing = self.kept * 2 * (self.kept_element + self.element)
        held = self.kept_element * self.kept * self.positions if self.target_held else 0
        in_float32 = 4 * self.trained if self.element < 4 else 0
        return held + self.chunk * max(making, comparing) + in_float32


@dataclass(frozen=True)
class Line:
    """A line of the sheet: what, how much, in which unit, and where the figure is from."""

    name: str
    value: float
    unit: str
    source: str
    how: str


def build_on_meta(run: Any) -> nn.Module:
    """Return the draft that a run config trains, without memory.

    Raises:
        ValueError: the run config names no draft config, or an algorithm without a cost model.
    """
    import torch
    from specforge.modeling.auto import AutoDraftModel
    from specforge.training.model_loading import load_draft_config_source

    cost_model(run.training.strategy)
    if not run.model.draft_model_config:
        raise ValueError("model.draft_model_config is not set; the sheet is computed from it")
    config = load_draft_config_source(run.model.draft_model_config)
    with torch.device("meta"):
        draft = AutoDraftModel.from_config(config, getattr(torch, run.model.torch_dtype))
    if hasattr(draft, "freeze_embedding"):
        draft.freeze_embedding()
    return draft


def heads_of(run: Any, draft: nn.Module) -> int:
    """Return the draft positions K that are trained: the draft's own, or training.ttt_length."""
    return getattr(draft, "heads", None) or run.training.ttt_length


def cost_model(algorithm: str) -> WorkOf:
    """Return the function that counts the matrix products of an algorithm's draft.

    Raises:
        ValueError: there is no cost sheet of the algorithm.
    """
    row = DRAFTS.get(algorithm)
    if row is None or row.work is None:
        known = ", ".join(row.name for row in DRAFTS.values() if row.work)
        raise ValueError(f"training.strategy={algorithm}: there are cost sheets of {known} only")
    return row.work


def work_of(algorithm: str, draft: nn.Module, heads: int) -> Work:
    """Return the matrix products of a draft of ``heads`` draft positions; see `cost_model`."""
    return cost_model(algorithm)(draft, heads)


def feature_bytes(hidden_size: int, aux_layers: int, element: int) -> int:
    """Return the bytes of captured features per token: states, and ids and mask in int64.

    Args:
        hidden_size: H of the target.
        aux_layers: captured decoder layers beside the last hidden state.
        element: bytes of a number.
    """
    return (aux_layers + 1) * hidden_size * element + 2 * 8


def forward_flops(work: Work, heads: int, length: float) -> float:
    """Return FLOPs of a draft's forward pass per token: two per weight and product in attention.

    A query of draft position k = 0, 1, ... sees the first one's keys up to its own,
    (length + 1) / 2 on average, and k of its chain; the sum over all draft positions follows.
    """
    keys = heads * (length + heads) / 2
    return 2 * (work.trained + work.frozen + work.attention * keys)


def sheet(run: Any, *, prompts: int = PROMPTS, mean_tokens: float) -> list[Line]:
    """Return the cost sheet of a run config.

    Args:
        run: SpecForge's ``Config``.
        prompts: samples of an epoch.
        mean_tokens: mean length of a sample, prompt and response.

    Raises:
        ValueError: there are too few prompts for a step, the GPUs do not divide into groups, or
            the algorithm has no cost sheet.
    """
    draft = build_on_meta(run)
    plan = _plan(run, prompts)
    return [
        *_memory(run, draft),
        *_steps(run, plan, prompts, mean_tokens),
        *_arithmetic(run, draft, plan.batch, prompts * mean_tokens, mean_tokens),
        *_features(run, draft, prompts * mean_tokens),
    ]


def _hidden_size(draft: nn.Module) -> int:
    config: Any = draft.config
    return int(getattr(config, "target_hidden_size", config.hidden_size))


def _memory(run: Any, draft: Any) -> list[Line]:
    """Return parameters, activations, logits and what losses keep."""
    import torch

    heads = heads_of(run, draft)
    work = work_of(run.training.strategy, draft, heads)
    element = getattr(torch, run.model.torch_dtype).itemsize
    head_element = getattr(torch, run.model.target_head_dtype or "bfloat16").itemsize
    kept, vocabulary = len(draft.d2t), len(draft.t2d)
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in draft.parameters()) - trained
    positions = run.training.batch_size * run.data.max_length
    logits = StepLogits(
        positions,
        heads,
        kept,
        vocabulary,
        element,
        head_element,
        shaped=bool(run.training.loss_options.get("serving")),
        target_held=run.training.strategy in TARGET_HELD,
        trained=_trained_heads(draft, kept),
    )
    return [
        Line("trained parameters", trained, "", COUNTED, "on the module"),
        Line("frozen parameters in the draft", frozen, "", COUNTED, "lent by the target"),
        Line(
            "training state", trained * TRAINING_STATE_BYTES, "B", FORMULA,
            f"{TRAINING_STATE_BYTES} B per trained parameter in an optimizer step, before sharding",
        ),
        Line(
            "activations per token", work.features * element, "B/token", FORMULA,
            "inputs and outputs of all matrix products, kept for the backward pass; an estimate",
        ),
        Line(
            "draft logits per token", heads * kept * element, "B/token", FORMULA,
            f"{heads} heads x V_d {kept} x {element} B, kept by any loss on logits",
        ),
        Line(
            "target logits per token", vocabulary * head_element, "B/token", FORMULA,
            f"V {vocabulary} x {head_element} B (model.target_head_dtype), once for all heads",
        ),
        Line(
            "of these, kept by the loss", kept * logits.kept_element, "B/token", FORMULA,
            f"V_d {kept} x {logits.kept_element} B, for the backward pass of all heads",
        ),
        Line(
            "logits of a full micro-batch, held", logits.held, "B", FORMULA,
            f"{positions} tokens, all supervised: target, draft, gradient of one head",
        ),
        Line(
            "the same, training.loss_fused_head", logits.fused, "B", FORMULA,
            f"a chunk of {CHUNK_ROWS} rows"
            + (", the target" if logits.target_held else "")
            + (", float32 gradient of LM heads" if logits.trained and element < 4 else ""),
        ),
        Line(
            "loss per supervised token and head, fused", kept * element, "B/token", FORMULA,
            "the gradient of the logits and vectors: any loss of this package",
        ),
        Line(
            "the same, SpecForge's KL, eager", UNFUSED_KL * kept * 4, "B/token", MEASURED,
            "3.0 float32 rows of V_d, on a CPU at 1024 x 32000 (benchmarks/results)",
        ),
        Line(
            "the same, SpecForge's KL + acceptance, eager", UNFUSED_LAMBDA * kept * 4, "B/token",
            MEASURED, "4.5 float32 rows of V_d, likewise",
        ),
    ]  # fmt: skip


def _trained_heads(draft: nn.Module, kept: int) -> int:
    """Return the parameters of LM heads that learn; a weight that several share counts once."""
    from torch import nn

    weights = {
        part.weight: part.weight.numel()
        for part in draft.modules()
        if isinstance(part, nn.Linear) and part.out_features == kept and part.weight.requires_grad
    }
    return sum(weights.values())


@dataclass(frozen=True)
class _Plan:
    """Steps of a run: samples of each, their number, and micro-batches left over at the end."""

    batch: int
    steps: int
    left: int


def _plan(run: Any, prompts: int) -> _Plan:
    from specforge.training.schedule import resolve_total_steps

    training, trainer = run.training, run.deployment.trainer
    processes = trainer.nproc_per_node * trainer.nnodes
    run.validate_world_size(processes)
    ranks = processes // (training.tp_size * training.sp_ulysses_size * training.sp_ring_size)
    samples = math.ceil(prompts / ranks)
    steps = resolve_total_steps(
        total_steps=None,
        max_steps=None,
        num_samples=samples,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        num_epochs=training.num_epochs,
    )
    micro_batches = samples // training.batch_size * training.num_epochs
    return _Plan(
        training.batch_size * training.accumulation_steps * ranks,
        steps,
        micro_batches % training.accumulation_steps,
    )


def _steps(run: Any, plan: _Plan, prompts: int, mean_tokens: float) -> list[Line]:
    """Return tokens and steps."""
    training, steps, left = run.training, plan.steps, plan.left
    refused = left and (training.max_steps or math.inf) > steps
    return [
        Line(
            "tokens per epoch", prompts * mean_tokens, "", FORMULA,
            f"{prompts} prompts x {mean_tokens:g}",
        ),
        Line(
            "samples per step", plan.batch, "", FORMULA,
            "batch x accumulation x GPUs x nodes / GPUs that share a sample",
        ),
        Line(
            "steps per epoch", steps / training.num_epochs, "", FORMULA,
            "as SpecForge counts: complete batches, accumulated across the ends of epochs",
        ),
        Line(
            "steps in all", min(steps, training.max_steps or steps), "", FORMULA,
            f"set training.max_steps={steps}: SpecForge refuses to leave {left} micro-batches over"
            if refused else "x training.num_epochs, at most training.max_steps",
        ),
    ]  # fmt: skip


def _arithmetic(run: Any, draft: Any, batch: int, tokens: float, mean_tokens: float) -> list[Line]:
    """Return floating-point operations."""
    heads = heads_of(run, draft)
    work = work_of(run.training.strategy, draft, heads)
    # The gradient of a weight and that of its input cost a forward pass each; frozen weights have
    # the latter only.
    forward = forward_flops(work, heads, mean_tokens)
    backward = 2 * forward - 2 * work.frozen
    target = 2 * _hidden_size(draft) * len(draft.t2d)
    per_token = forward + backward + target
    return [
        Line("forward pass of the draft", forward, "FLOP/token", FORMULA, "2 x weights, attention"),
        Line("backward pass", backward, "FLOP/token", FORMULA, "twice that, once where frozen"),
        Line("the target's head", target, "FLOP/token", FORMULA, "2 x H x V, once for all heads"),
        Line("a step", per_token * mean_tokens * batch, "FLOP", FORMULA, "without padding"),
        Line("an epoch", per_token * tokens, "FLOP", FORMULA, "without padding and capture"),
    ]


def _features(run: Any, draft: nn.Module, tokens: float) -> list[Line]:
    """Return the size of captured features."""
    import torch

    row = DRAFTS[run.training.strategy]
    element = getattr(torch, run.model.torch_dtype).itemsize
    stored = feature_bytes(_hidden_size(draft), row.aux_layers, element)
    return [
        Line("captured features per token", stored, "B/token", FORMULA, "states, ids, mask"),
        Line("captured features", stored * tokens, "B", FORMULA, "offline training; once"),
    ]


def load_run(path: Path, overrides: list[str]) -> Any:
    """Return a validated run config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: SpecForge refuses it.
    """
    from specforge.application.composition import resolve_run

    from specforge_lk import run_config

    return resolve_run(run_config.load_run(path, overrides)).config


def as_json(lines: list[Line]) -> list[dict[str, Any]]:
    """Return the sheet for a file."""
    return [asdict(line) for line in lines]


__all__ = [
    "Line",
    "StepLogits",
    "Work",
    "as_json",
    "build_on_meta",
    "cost_model",
    "feature_bytes",
    "forward_flops",
    "heads_of",
    "load_run",
    "sheet",
    "work_of",
]
