"""What a training run costs, computed from its config: parameters, memory, steps, FLOPs, features.

The draft is built on torch's meta device, so that parameters and matrix products are counted on
the module that trains, without its memory. Everything else is a formula of these counts and says
so in the sheet; two lines, the memory of unfused losses, are ratios that benchmarks/ measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

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


@dataclass(frozen=True)
class Work:
    """Matrix products of a draft, per position and over all heads.

    Attributes:
        trained: weights that a position is multiplied with and that learn.
        frozen: those that do not learn.
        features: sizes of these products' inputs and outputs, unembeddings' outputs excepted.
        attention: width heads * (d_qk + d_v) of attention, per head of the draft; 0 without.
    """

    trained: float
    frozen: float
    features: float
    attention: int


@dataclass(frozen=True)
class Line:
    """A line of the sheet: what, how much, in which unit, and where the figure is from."""

    name: str
    value: float
    unit: str
    source: str
    how: str


def build_on_meta(run: Any) -> nn.Module:
    """The draft that a run config trains, without memory.

    Raises:
        ValueError: the run config names no draft config, or an algorithm without a cost model.
    """
    import torch
    from specforge.modeling.auto import AutoDraftModel
    from specforge.training.model_loading import load_draft_config_source

    if run.training.strategy not in _WORK:
        raise ValueError(
            f"training.strategy={run.training.strategy}: there are cost sheets of "
            f"{', '.join(_WORK)} only"
        )
    if not run.model.draft_model_config:
        raise ValueError("model.draft_model_config is not set; the sheet is computed from it")
    config = load_draft_config_source(run.model.draft_model_config)
    with torch.device("meta"):
        draft = AutoDraftModel.from_config(config, getattr(torch, run.model.torch_dtype))
    if hasattr(draft, "freeze_embedding"):
        draft.freeze_embedding()
    return draft


def heads_of(run: Any, draft: nn.Module) -> int:
    """Heads K that are trained: the draft's own, or training.ttt_length."""
    return getattr(draft, "heads", None) or run.training.ttt_length


def work_of(algorithm: str, draft: nn.Module, heads: int) -> Work:
    """Matrix products of a draft of ``heads`` heads."""
    return _WORK[algorithm](draft, heads)


def _linears(modules: list[Any], repeats: float = 1, vocabulary: int = 0) -> Work:
    """Work of linear layers, each used ``repeats`` times."""
    trained = frozen = features = 0.0
    for module in modules:
        size = module.weight.numel() * repeats
        trained, frozen = (
            (trained + size, frozen) if module.weight.requires_grad else (trained, frozen + size)
        )
        outputs, inputs = module.weight.shape
        features += repeats * (inputs + (outputs if outputs != vocabulary else 0))
    return Work(trained, frozen, features, 0)


def _sum(*parts: Work, attention: int = 0) -> Work:
    return Work(
        sum(part.trained for part in parts),
        sum(part.frozen for part in parts),
        sum(part.features for part in parts),
        attention,
    )


def _all_linears(module: nn.Module) -> list[Any]:
    from torch import nn

    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _eagle3(draft: Any, heads: int) -> Work:
    """fc once, the layer and the unembedding for every test-time-training step."""
    layers = [part for part in _all_linears(draft) if part is not draft.fc]
    config, vocabulary = draft.config, draft.lm_head.out_features
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _sum(
        _linears([draft.fc]),
        _linears(layers, heads, vocabulary),
        attention=2 * config.num_attention_heads * width,
    )


def _medusa(draft: Any, heads: int) -> Work:
    unembeddings = draft._unembeddings[:heads]
    blocks = [part for block in draft.blocks[:heads] for part in _all_linears(block)]
    return _sum(_linears(blocks), _linears(unembeddings, 1, len(draft.d2t)))


def _mlp_speculator(draft: Any, heads: int) -> Work:
    # Tied modules are in the lists once for every head.
    return _sum(
        _linears(list(draft.proj)[:heads]), _linears(list(draft.head)[:heads], 1, len(draft.d2t))
    )


def _mtp(draft: Any, heads: int) -> Work:
    """The module once for every head; of its experts those that a token activates."""
    config = draft.config
    experts = [p for name, p in draft.named_parameters() if ".experts." in name and p.ndim == 3]
    routers = [p for name, p in draft.named_parameters() if name.endswith(".gate.weight")]
    dense = _linears(_all_linears(draft), heads, config.vocab_size)
    sparse = 0.0
    features = 0.0
    if experts:
        active = config.num_experts_per_tok
        sparse = heads * (
            sum(p.numel() for p in experts) * active / experts[0].shape[0]
            + sum(p.numel() for p in routers)
        )
        features = heads * active * sum(sum(p.shape[1:]) for p in experts)
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    value = getattr(config, "v_head_dim", None) or width
    return _sum(
        dense,
        Work(sparse, 0, features, 0),
        attention=config.num_attention_heads * (width + value),
    )


_WORK: Final = {
    "eagle3": _eagle3,
    "medusa": _medusa,
    "mlp_speculator": _mlp_speculator,
    "mtp": _mtp,
}


def feature_bytes(algorithm: str, hidden_size: int, captured: int, element: int) -> int:
    """Bytes of captured features per token: states, and ids and mask in int64."""
    states = (captured + 1 if algorithm == "eagle3" else 1) * hidden_size
    return states * element + 2 * 8


def forward_flops(work: Work, heads: int, length: float) -> float:
    """FLOPs of a draft's forward pass per token: two per weight and per product in attention.

    A query of head k = 0, 1, ... sees the first head's keys up to its own, (length + 1) / 2 on
    average, and k of its chain; the sum over all heads follows.
    """
    keys = heads * (length + heads) / 2
    return 2 * (work.trained + work.frozen + work.attention * keys)


def sheet(run: Any, *, prompts: int = PROMPTS, mean_tokens: float) -> list[Line]:
    """The cost sheet of a run config.

    Args:
        run: SpecForge's ``Config``.
        prompts: samples of an epoch.
        mean_tokens: mean length of a sample, prompt and response.

    Raises:
        ValueError: there are too few prompts for a step, or the GPUs do not divide into groups.
    """
    import torch
    from specforge.training.schedule import resolve_total_steps

    draft = build_on_meta(run)
    algorithm, training = run.training.strategy, run.training
    heads = heads_of(run, draft)
    work = work_of(algorithm, draft, heads)
    element = getattr(torch, run.model.torch_dtype).itemsize
    head_element = getattr(torch, run.model.target_head_dtype or "bfloat16").itemsize
    config = draft.config
    hidden = getattr(config, "target_hidden_size", config.hidden_size)
    kept, vocabulary = len(draft.d2t), len(draft.t2d)
    captured = 3 if algorithm == "eagle3" else 0
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in draft.parameters()) - trained

    logits = heads * kept * element
    gradient = kept * element
    tokens = prompts * mean_tokens
    trainer = run.deployment.trainer
    processes = trainer.nproc_per_node * trainer.nnodes
    run.validate_world_size(processes)
    ranks = processes // (training.tp_size * training.sp_ulysses_size * training.sp_ring_size)
    batch = training.batch_size * training.accumulation_steps * ranks
    samples = math.ceil(prompts / ranks)
    steps = resolve_total_steps(
        total_steps=None,
        max_steps=None,
        num_samples=samples,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        num_epochs=training.num_epochs,
    )
    left = samples // training.batch_size * training.num_epochs % training.accumulation_steps
    refused = left and (training.max_steps or math.inf) > steps
    # The gradient of a weight and that of its input cost a forward pass each; frozen weights have
    # the latter only.
    forward = forward_flops(work, heads, mean_tokens)
    backward = 2 * forward - 2 * work.frozen
    target = 2 * hidden * vocabulary
    per_token = forward + backward + target
    stored = feature_bytes(algorithm, hidden, captured, element)

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
            "draft logits per token", logits, "B/token", FORMULA,
            f"{heads} heads x V_d {kept} x {element} B, kept by any loss on logits",
        ),
        Line(
            "target logits per token", vocabulary * head_element, "B/token", FORMULA,
            f"V {vocabulary} x {head_element} B (model.target_head_dtype), once for all heads",
        ),
        Line(
            "of these, kept by the loss", kept * 4, "B/token", FORMULA,
            f"V_d {kept} x 4 B, for the backward pass of all heads",
        ),
        Line(
            "loss per supervised token and head, fused", gradient, "B/token", FORMULA,
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
        Line("tokens per epoch", tokens, "", FORMULA, f"{prompts} prompts x {mean_tokens:g}"),
        Line(
            "samples per step", batch, "", FORMULA,
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
        Line("forward pass of the draft", forward, "FLOP/token", FORMULA, "2 x weights, attention"),
        Line("backward pass", backward, "FLOP/token", FORMULA, "twice that, once where frozen"),
        Line("the target's head", target, "FLOP/token", FORMULA, "2 x H x V, once for all heads"),
        Line("a step", per_token * mean_tokens * batch, "FLOP", FORMULA, "without padding"),
        Line("an epoch", per_token * tokens, "FLOP", FORMULA, "without padding and capture"),
        Line("captured features per token", stored, "B/token", FORMULA, "states, ids, mask"),
        Line("captured features", stored * tokens, "B", FORMULA, "offline training; once"),
    ]  # fmt: skip


def load_run(path: Path, overrides: list[str]) -> Any:
    """A validated run config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: SpecForge refuses it.
    """
    from specforge.application.composition import resolve_run
    from specforge.config import load_config

    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    return resolve_run(load_config(str(path), overrides)).config


def as_json(lines: list[Line]) -> list[dict[str, Any]]:
    """The sheet for a file."""
    return [asdict(line) for line in lines]


__all__ = [
    "Line",
    "Work",
    "as_json",
    "build_on_meta",
    "feature_bytes",
    "forward_flops",
    "heads_of",
    "load_run",
    "sheet",
    "work_of",
]
