"""What each fix of the series changes, measured in the SpecForge that is on the path.

``python -m tools.defect_probes NAME`` prints the figures of one probe as JSON. It runs with the
SpecForge of any patch level, so it imports nothing that a patch adds; `tools.defects` compares
levels. A figure is a number, or a sentence for what is accepted or refused.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Figure = float | int | str
Figures = dict[str, Figure]

#: A batch of teacher-forced positions: target vocabulary, draft vocabulary.
BATCH, LENGTH, VOCABULARY, DRAFT_VOCABULARY = 4, 64, 2000, 500
#: Shares of supervised positions; the rest is masked padding behind the same positions.
SHARES = (1.0, 0.5, 0.1)
#: The smallest draft and target configuration that SpecForge builds.
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def outcome(action: Callable[[], Any], done: str = "accepted") -> str:
    """``done``, or the error that ``action`` raised."""
    try:
        action()
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return done


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def supported(function: Callable[..., Any], **options: Any) -> Any:
    """Call ``function`` with those of ``options`` that it has at this patch level."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in known})


# ------------------------------------------------------------------------------ one batch


def batch(share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target logits [B, T, V], draft logits [B, T, V_d], loss mask [B, T, 1].

    The draft knows the target, with noise; the draft vocabulary, the first V_d tokens, holds most
    of the target's mass but not every argmax. Masked positions that make ``share`` follow.
    """
    generator = torch.Generator().manual_seed(0)
    target = 3 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)
    target[..., :DRAFT_VOCABULARY] += 3
    noise = torch.randn(BATCH, LENGTH, DRAFT_VOCABULARY, generator=generator)
    logits = target[..., :DRAFT_VOCABULARY] + 1.5 * noise
    mask = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    padding = round(LENGTH / share) - LENGTH
    return tuple(F.pad(tensor, (0, 0, 0, padding)) for tensor in (target, logits, mask))


def t2d() -> torch.Tensor:
    return torch.arange(VOCABULARY) < DRAFT_VOCABULARY


def objective(share: float = 1.0, **settings: Any) -> tuple[float, float, torch.Tensor]:
    """Reported acceptance rate, loss and gradient [B, T, V_d] of EAGLE-3's objective."""
    from specforge.algorithms.eagle3.model import (
        _compute_loss_and_acceptance_rate,
        _compute_target_p,
    )

    target, logits, mask = batch(share)
    target_p, target_p_on_draft, _, position_mask = _compute_target_p(target, t2d(), mask)
    logits.requires_grad_(True)
    rate, loss = supported(
        _compute_loss_and_acceptance_rate,
        logits=logits,
        target_p=target_p,
        target_p_on_draft=target_p_on_draft,
        position_mask=position_mask,
        loss_mask=mask,
        **settings,
    )
    loss.backward()
    return rate.item(), loss.item(), logits.grad


def exact_alpha() -> torch.Tensor:
    """Acceptance rate of every position, [B, T], in float64 by its definition."""
    target, logits, _ = (tensor.double() for tensor in batch())
    p = target.softmax(-1)[..., :DRAFT_VOCABULARY]
    return torch.minimum(p, logits.softmax(-1)).sum(-1)


# --------------------------------------------------------------------------------- probes


def without_triton() -> Figures:
    sys.modules["triton"] = None
    figures: Figures = {}

    def load() -> None:
        import specforge.core.loss  # noqa: F401

    figures["import of EAGLE-3's loss where there is no Triton"] = outcome(load, "works")
    if figures["import of EAGLE-3's loss where there is no Triton"] == "works":
        _, loss, gradient = objective(lk_loss_type=None, kl_scale=1.0, kl_decay=1.0)
        target, logits, _ = (tensor.double() for tensor in batch())
        logits.requires_grad_(True)
        supervised = (target.argmax(-1) < DRAFT_VOCABULARY)[..., None]
        p = target[..., :DRAFT_VOCABULARY].softmax(-1)
        expected = -(supervised * p * logits.log_softmax(-1)).sum(-1).mean()
        expected.backward()
        figures["relative error of its value, against float64"] = abs(loss / expected.item() - 1)
        figures["relative error of its gradient (L2), against float64"] = (
            (gradient - logits.grad).norm() / logits.grad.norm()
        ).item()
    return figures


def target_head_files() -> Figures:
    from safetensors.torch import save_file

    weight = torch.randn(TINY["vocab_size"], TINY["hidden_size"])
    index = "model.safetensors.index.json"
    layouts: dict[str, tuple[bool, str, bool]] = {
        "an indexed checkpoint": (False, "lm_head.weight", True),
        "one model.safetensors": (False, "lm_head.weight", False),
        "one model.safetensors, tied embeddings": (True, "model.embed_tokens.weight", False),
        "an indexed checkpoint, tied embeddings": (True, "model.embed_tokens.weight", True),
    }
    figures: Figures = {}
    for name, (tied, key, indexed) in layouts.items():
        with scratch() as directory:
            save_file({key: weight}, directory / "model.safetensors")
            if indexed:
                content = json.dumps({"weight_map": {key: "model.safetensors"}})
                (directory / index).write_text(content)
            _write_target(directory, tie_word_embeddings=tied)
            figures[f"target head from {name}"] = outcome(lambda: _head(directory), "loads")
    return figures


def _write_target(directory: Path, **changes: Any) -> None:
    config = {**TINY, "architectures": ["LlamaForCausalLM"], **changes}
    (directory / "config.json").write_text(json.dumps(config))


def _head(directory: Path, **options: Any) -> Any:
    from specforge.modeling.target.target_head import TargetHead

    return supported(TargetHead.from_pretrained, model_path=str(directory), **options)


def target_logits() -> Figures:
    """Random targets that do more than multiply by a weight; loading rounds to bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, dict[str, Any]] = {
        "cohere": {"logit_scale": 0.0625},
        "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
        "granite": {"logits_scaling": 8.0},
        "phi": {},
    }
    figures: Figures = {}
    for family, setting in settings.items():
        sizes = {**TINY, "model_type": family, "pad_token_id": 0}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes, **setting)).eval()
        tokens = torch.arange(40)[None]
        with scratch() as directory, torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.copy_(torch.randn_like(parameter).bfloat16())
            states = model.get_decoder()(input_ids=tokens).last_hidden_state
            p = model(input_ids=tokens).logits.softmax(-1)
            model.save_pretrained(directory)
            head = _head(directory).float()
            q = head(states.to(head.fc.weight.device)).softmax(-1).cpu()
            distance = (p - q).abs().sum(-1).mean() / 2
        figures[f"total variation from a {family} target's own p"] = distance.item()
    return figures


def target_head_precision() -> Figures:
    """Weights and states that bfloat16 holds exactly, so that the logits alone are rounded."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = 256, 4096
    states = torch.randn(1, 512, hidden, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, hidden, generator=generator)
    # The largest logit of a position is then near 20.
    weight = (weight * (20 / (4 * hidden**0.5))).bfloat16()
    with scratch() as directory:
        save_file({"lm_head.weight": weight}, directory / "model.safetensors")
        _write_target(directory, hidden_size=hidden, vocab_size=vocabulary)
        head = _head(directory, dtype=torch.float32)
        with torch.no_grad():
            logits = head(states.to(head.fc.weight.dtype)).double()
    exact = states.double() @ weight.double().T
    p, q = exact.softmax(-1), logits.softmax(-1)
    likely = p > 0.01
    return {
        "largest logit of a position, median": exact.max(-1).values.median().item(),
        "largest relative error of a target probability above 0.01": (
            (q / p - 1).abs()[likely].max().item()
        ),
        "acceptance rate of the exact target as its own draft": (
            torch.minimum(p, q).sum(-1).mean().item()
        ),
    }


def missing_features() -> Figures:
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    with scratch() as directory:
        return {
            f"samples read from {name}": _count(OfflineManifestReader(str(path)).read)
            for name, path in (
                ("a feature path that does not exist", directory / "absent"),
                ("a directory without feature files", directory),
            )
        }


def _count(read: Callable[[], list[Any]]) -> Figure:
    try:
        return len(read())
    except Exception as error:
        return f"refused: {type(error).__name__}"


class _CreateFile:
    """Unpickling this runs code: it creates ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def pickled_code() -> Figures:
    from specforge.export.checkpoint_io import resolve_training_state
    from specforge.runtime.data_plane.feature_store import load_feature_file
    from specforge.training.checkpoint import CheckpointManager

    figures: Figures = {}
    for name, file, load in (
        ("a feature file is read", "sample.ckpt", load_feature_file),
        ("a run resumes from a checkpoint", "training_state.pt", _read(CheckpointManager)),
        ("a checkpoint is exported", "training_state.pt", _parent(resolve_training_state)),
    ):
        with scratch() as directory:
            marker, path = directory / "ran", directory / file
            torch.save({"global_step": _CreateFile(marker)}, path)
            # What follows the load may fail on such content; only what ran counts.
            with contextlib.suppress(Exception):
                load(str(path))
            figures[f"code in a pickle, when {name}"] = "runs" if marker.exists() else "does not"
    return figures


def _parent(load: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda path: load(str(Path(path).parent))


def _read(manager: Any) -> Callable[[str], Any]:
    return _parent(manager.read_resume_state)


def lk_objective() -> Figures:
    from specforge.config.schema import TrainingConfig
    from specforge.core.lk_loss import compute_acceptance_rate

    figures: Figures = {}
    settings = {"lk_loss_type": "lambda", "kl_scale": 1.0, "kl_decay": 3.0}
    for share in SHARES:
        _, loss, gradient = objective(share, **settings)
        figures[f"lambda loss, {share:.0%} of the positions supervised"] = loss
        figures[f"norm of its gradient, {share:.0%} supervised"] = gradient.norm().item()
    target, _, _ = batch()
    coverage = target.softmax(-1)[..., :DRAFT_VOCABULARY].sum(-1).mean()
    outside = (target.argmax(-1) >= DRAFT_VOCABULARY).float().mean()
    figures["coverage of the draft vocabulary"] = coverage.item()
    figures["share of positions whose target argmax is outside it"] = outside.item()
    reported = objective(**settings)[0]
    figures["acceptance rate, reported"] = reported
    figures["acceptance rate, sum of min(p, q) in float64"] = exact_alpha().mean().item()

    rows = {
        "the draft's probability underflows": ([0.0, 200.0], [1.0, 0.0]),
        "the draft vocabulary has none of the target's mass": ([0.0, 0.0], [0.0, 0.0]),
    }
    for name, (logits, probabilities) in rows.items():
        row = torch.tensor([[logits]], requires_grad=True)
        _, log_rate = compute_acceptance_rate(
            logits=row,
            target_probs=torch.tensor([[probabilities]]),
            position_mask=torch.ones(1, 1, 1),
        )
        (-log_rate).backward()
        figures[f"alpha loss where {name}"] = -log_rate.item() + 0.0
        figures[f"its gradient of two logits, where {name}"] = str(row.grad.flatten().tolist())
    figures["kl_scale=1.5, a negative weight on total variation"] = outcome(
        lambda: TrainingConfig(lk_loss_type="lambda", kl_scale=1.5)
    )
    return figures


def kl_decay_default() -> Figures:
    from specforge.config.schema import TrainingConfig

    decay, rate = TrainingConfig(lk_loss_type="lambda").kl_decay, exact_alpha().mean().item()
    return {
        "default kl_decay": decay,
        f"weight of KL at an acceptance rate of {rate:.2f}": math.exp(-decay * rate),
    }


def acceptance_metric() -> Figures:
    """32 samples of unlike length and difficulty, evaluated in batches of 4 in two orders."""
    generator = torch.Generator().manual_seed(0)
    count, size = 32, 4
    lengths = torch.randint(40, 400, (count,), generator=generator)
    supervised = (lengths * (0.1 + 0.6 * torch.rand(count, generator=generator))).long()
    # Long samples are easier, as code and repetition are.
    rates = 0.3 + 0.5 * lengths / 400
    by_length = lengths.argsort()
    orders = {
        "batched by length": by_length,
        "batched at random": torch.randperm(count, generator=generator),
    }
    figures: Figures = {}
    for name, order in orders.items():
        samples = [(lengths[i], supervised[i], rates[i]) for i in order.tolist()]
        groups = [samples[i : i + size] for i in range(0, count, size)]
        figures[f"acceptance rate of one evaluation, {name}"] = _evaluated(groups)
    exact = (rates * supervised).sum() / supervised.sum()
    figures["mean of the acceptance rate over the supervised positions"] = exact.item()
    return figures


def _evaluated(groups: list[list[tuple[torch.Tensor, ...]]]) -> float:
    from specforge.eval import Evaluator
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.strategies.base import StepOutput

    def forward(batch: TrainBatch) -> StepOutput:
        group = groups[int(batch.sample_ids[0])]
        lengths, supervised, rates = (
            torch.stack(column).double() for column in zip(*group, strict=True)
        )
        denominator = supervised.sum()
        metrics = {
            "acc_corrects": [torch.zeros(())],
            "acc_denoms": [denominator],
            "acceptance_rates": [(rates * supervised).sum() / denominator],
            "plosses": [torch.ones(())],
            "metric_losses": [torch.ones(())],
            # Stock KL's own denominator: the batch, padding included.
            "metric_loss_denoms": [torch.tensor(float(len(lengths) * lengths.max()))],
        }
        return StepOutput(loss=torch.ones(()), metrics=metrics)

    batches = [
        TrainBatch(sample_ids=[str(index)], strategy="eagle3", tensors={}, metadata={})
        for index in range(len(groups))
    ]
    return Evaluator().run(forward, batches)["eval/acceptance_rate_0"]


def streamed_sample(
    length: int, response: slice = slice(None), hidden: int = 4
) -> dict[str, torch.Tensor]:
    """Features of EAGLE-3 from a capture server; ``response`` is supervised."""
    loss_mask = torch.zeros(1, length, dtype=torch.long)
    loss_mask[:, response] = 1
    return {
        "input_ids": torch.arange(length).unsqueeze(0) + 1,
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "loss_mask": loss_mask,
        "hidden_state": torch.randn(1, length, 3 * hidden),
        "target": torch.randn(1, length, hidden),
    }


def streamed_samples() -> Figures:
    from specforge.algorithms.eagle3.data import (
        build_offline_collator,
        build_server_collator,
        normalize_offline_sample,
    )

    def captured(states: int) -> dict[str, torch.Tensor]:
        sample = streamed_sample(64)
        stored = {
            "input_ids": sample["input_ids"][0],
            "loss_mask": sample["loss_mask"][0],
            "aux_hidden_state": sample["hidden_state"],
            "hidden_state": sample["target"][:, :states],
        }
        return normalize_offline_sample(stored, max_len=64)

    return {
        "a streamed batch of samples of 64 and 48 tokens": outcome(
            lambda: build_server_collator()([streamed_sample(64), streamed_sample(48)])
        ),
        "a captured sample of 64 tokens with 63 target states": outcome(
            lambda: build_offline_collator()([captured(63)])
        ),
    }


def supervised_states() -> Figures:
    """The states that supervise the first draft position of one sample of 64 tokens."""
    from specforge.algorithms.eagle3.data import build_server_collator, normalize_offline_sample
    from specforge.modeling.target.target_head import TargetHead

    def states(batch: dict[str, torch.Tensor]) -> str:
        numbers = torch.arange(1.0, 65).view(1, 64, 1)
        _, shifted, mask = TargetHead.preprocess(
            None, batch["input_ids"], numbers, batch["loss_mask"]
        )
        found = (shifted[mask.bool()] - 1).int().tolist()
        return f"{found[0]} to {max(found)}" + (" and a zero state" if -1 in found else "")

    figures: Figures = {}
    for name, response in (("20 to 39", slice(20, 40)), ("20 to 63", slice(20, 64))):
        sample = streamed_sample(64, response)
        captured = {
            "input_ids": sample["input_ids"][0],
            "loss_mask": sample["loss_mask"][0],
            "aux_hidden_state": sample["hidden_state"],
            "hidden_state": sample["target"],
        }
        offline = normalize_offline_sample(captured, max_len=64)
        streamed = build_server_collator()([sample])
        for source, batch in (("files", offline), ("a server", streamed)):
            figures[f"response of tokens {name}, from {source}: trained on states"] = states(batch)
    return figures


def vocabulary_mapping() -> Figures:
    from safetensors.torch import load_file
    from specforge.export.to_hf import export_to_hf
    from specforge.export.to_sglang import export_to_sglang
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    kept = 16

    def mapping(path: Path, first: int = 0, contradiction: int = 0) -> str:
        mask = torch.zeros(TINY["vocab_size"], dtype=torch.bool)
        mask[first : first + kept] = True
        offsets = torch.full((kept,), first + contradiction)
        torch.save({"t2d": mask, "d2t": offsets}, path)
        return str(path)

    with scratch() as directory:
        config = directory / "draft.json"
        content = {**TINY, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": kept}
        config.write_text(json.dumps(content))
        draft = AutoDraftModel.from_config(
            AutoDraftModelConfig.from_file(str(config)), torch_dtype=torch.float32
        )
        contradictory = mapping(directory / "contradictory.pt", contradiction=1)
        figures: Figures = {
            "training with t2d and d2t that disagree": outcome(
                lambda: draft.load_vocab_mapping(contradictory)
            )
        }
        draft.load_vocab_mapping(mapping(directory / "trained.pt"))
        checkpoint = directory / "training_state.pt"
        torch.save({"strategy": "eagle3", "draft_state_dict": draft.state_dict()}, checkpoint)
        other = mapping(directory / "other.pt", first=5)
        for form, export in (("sglang", export_to_sglang), ("hf", export_to_hf)):
            name = f"of {kept} draft tokens, those that mean another one, exported to {form}"
            try:
                export(str(checkpoint), str(config), str(directory), vocab_mapping_path=other)
            except ValueError as error:
                figures[f"{name} with another mapping"] = f"refused: {type(error).__name__}"
                continue
            exported = load_file(directory / "model.safetensors")["d2t"]
            figures[f"{name} with another mapping"] = int((exported != draft.d2t).sum())
    return figures


def exported_settings() -> Figures:
    from specforge.export.checkpoint_io import materialize_draft
    from specforge.modeling.draft import resolve_draft
    from transformers import LlamaConfig, Qwen3Config

    token, layers = 5, (0, 2, 4)

    def export(strategy: str, architecture: str, config: Any, **trained: Any) -> Any:
        draft = resolve_draft(architecture)(config)
        state = {"strategy": strategy, "draft_state_dict": draft.state_dict(), **trained}
        with scratch() as directory:
            path = directory / "config.json"
            content = {**config.to_dict(), "architectures": [architecture]}
            path.write_text(json.dumps(content))
            return materialize_draft(state, str(path)).config

    shared = {name: value for name, value in TINY.items() if name != "model_type"}
    llama = LlamaConfig(**shared, draft_vocab_size=16, ptd_token_id=1)
    dflash = Qwen3Config(**shared, head_dim=8, layer_types=["full_attention"])
    dflash.block_size, dflash.num_target_layers = 4, 6
    dflash.dflash_config = {"target_layer_ids": [2]}
    peagle = export("peagle", "PEagleDraftModel", llama, peagle_mask_token_id=token)
    dflash = export("dflash", "DFlashDraftModel", dflash, dflash_mask_token_id=token)
    key = "eagle_aux_hidden_state_layer_ids"

    def streamed(target: str, layers: Sequence[int]) -> tuple[str, str]:
        """What eagle_config names, and what vLLM takes from the export as inputs of layers."""
        with scratch() as source:
            (source / "config.json").write_text(json.dumps({"architectures": [target]}))
            provenance = {
                "capture_layers": tuple(layers),
                "target_model": ("directory-stat-v2", str(source), ()),
            }
            exported = export(
                "eagle3",
                "LlamaForCausalLMEagle3",
                llama,
                specforge_model_provenance=tuple(provenance.items()),
            )
        named = (getattr(exported, "eagle_config", None) or {}).get(key)
        return _listed(named), _listed(getattr(exported, key, named))

    named, inputs = streamed("LlamaForCausalLM", layers)
    _, deepseek = streamed("DeepseekV3ForCausalLM", (2, 30, 58))
    return {
        f"P-EAGLE: exported mask token, trained with {token}, draft config with 1": (
            peagle.ptd_token_id
        ),
        f"DFlash: exported mask token, trained with {token}": dflash.dflash_config.get(
            "mask_token_id", "none"
        ),
        f"EAGLE-3, streamed with the outputs of layers {_listed(layers)}: outputs exported": named,
        f"EAGLE-3, streamed with the outputs of layers {_listed(layers)}: inputs that vLLM takes "
        "from the export": inputs,
        "EAGLE-3, streamed from a DeepSeek V3 with the inputs of layers 2, 30, 58: inputs that "
        "vLLM takes from the export": deepseek,
    }


def rotary_angles() -> Figures:
    from specforge.modeling.auto import AutoDraftModel
    from transformers import Qwen3Config

    distance, size, base = 1000, 128, 1e6
    shared = {name: value for name, value in TINY.items() if name != "model_type"}
    rope = {"rope_type": "default", "rope_theta": base}
    config = Qwen3Config(
        **shared, head_dim=size, layer_types=["full_attention"], rope_parameters=rope
    )
    config.architectures = ["DFlashDraftModel"]
    config.block_size, config.num_target_layers = 4, 6
    config.dflash_config = {"target_layer_ids": [2]}
    draft = AutoDraftModel.from_config(config, torch_dtype=torch.bfloat16)
    exact = base ** -(torch.arange(0, size, 2).double() / size)
    error = (draft.rotary_emb.inv_freq.double() - exact).abs().max() * distance
    name = f"rotary angle in bfloat16, largest error over {distance} tokens [rad]"
    return {name: round(error.item(), 3)}


def evaluation_random_numbers() -> Figures:
    """4 steps of training with the real samplers, and an evaluation after every step or none."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.algorithms.peagle.model import generate_cod_sample_indices
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.controller import TrainerController, TrainerCore
    from specforge.training.strategies.base import StepOutput

    class Strategy:
        """Keeps the positions that it samples."""

        name = "recording"

        def __init__(self, sample: Callable[[], torch.Tensor]) -> None:
            self.sample, self.model = sample, torch.nn.Linear(1, 1)
            self.trained: list[list[int]] = []
            self.evaluated: list[list[int]] = []

        def trainable_module(self) -> torch.nn.Module:
            return self.model

        def forward_loss(self, _batch: Any, _ctx: Any = None) -> StepOutput:
            kept = self.trained if self.model.training else self.evaluated
            kept.append(self.sample().tolist())
            return StepOutput(loss=self.model(torch.ones(1)).sum(), metrics={})

        def checkpoint_state_filter(self, state: dict[str, Any]) -> dict[str, Any]:
            return state

    class Backend:
        name = "plain"

        def backward(self, loss: torch.Tensor, *, is_boundary: bool = True) -> None:
            loss.backward()

        def step(self) -> torch.Tensor:
            return torch.tensor(1.0)

        def state_dict(self) -> dict[str, Any]:
            return {"model": {"w": torch.ones(1)}, "optimizer": None, "rng": {}}

    def batches(count: int) -> list[TrainBatch]:
        return [TrainBatch(["s"], strategy="s", tensors={}, metadata={}) for _ in range(count)]

    def run(sample: Callable[[], torch.Tensor], eval_interval: int) -> Strategy:
        strategy = Strategy(sample)
        torch.manual_seed(3)
        with scratch() as directory:
            TrainerController(
                TrainerCore(strategy, Backend(), accumulation_steps=1),
                run_id="run",
                output_dir=str(directory),
                max_steps=4,
                eval_interval=eval_interval,
                eval_data_factory=lambda: batches(1),
            ).fit(batches(4))
        return strategy

    mask = torch.ones(1, LENGTH, dtype=torch.long)
    dflash = OnlineDFlashModel.__new__(OnlineDFlashModel)
    torch.nn.Module.__init__(dflash)
    dflash.num_anchors = 8
    samplers = {
        "P-EAGLE": lambda: torch.cat(generate_cod_sample_indices(LENGTH, mask, num_depths=4)),
        "DFlash": lambda: dflash._sample_anchor_positions(LENGTH, mask, mask.device)[0],
    }
    figures: Figures = {}
    for name, sample in samplers.items():
        alone, beside = run(sample, 0), run(sample, 1)
        figures[f"{name}: of 4 steps, those that train on other positions if evaluated"] = sum(
            one != other for one, other in zip(alone.trained, beside.trained, strict=True)
        )
        figures[f"{name}: of 4 evaluations, those of other positions than the first"] = sum(
            positions != beside.evaluated[0] for positions in beside.evaluated
        )
    return figures


def _listed(layers: Sequence[int] | None) -> str:
    return ", ".join(map(str, layers)) if layers else "none"


# ----------------------------------------------------------------------------- migration


def legacy_lambda() -> Figures:
    """``training.lk_loss_type: lambda`` with the default decay of this patch level."""
    return _legacy("lambda")


def legacy_alpha() -> Figures:
    return _legacy("alpha")


def _legacy(objective_name: str) -> Figures:
    from specforge.config.schema import TrainingConfig

    config = TrainingConfig(lk_loss_type=objective_name)
    settings = {name: getattr(config, name) for name in ("lk_loss_type", "kl_scale", "kl_decay")}
    figures: Figures = {}
    for share in SHARES:
        rate, loss, gradient = objective(share, **settings)
        figures |= _row(share, loss, gradient, rate)
    return figures


def registered_lk_lambda() -> Figures:
    return _registered("lk_lambda")


def registered_lk_alpha() -> Figures:
    return _registered("lk_alpha")


def _registered(name: str) -> Figures:
    """``training.loss`` with default options; only where the series is applied as a whole."""
    from specforge.core.target_distribution import TargetDistribution
    from specforge.losses.reduction import reduce_head_loss

    from specforge_lk.losses import LOSSES

    record = next(record for record in LOSSES if record.name == name)
    loss = record.build(record.options())
    figures: Figures = {}
    for share in SHARES:
        target, logits, mask = batch(share)
        logits.requires_grad_(True)
        mask = mask.squeeze(-1).bool()
        terms = loss.terms(logits, TargetDistribution.from_logits(target, t2d()), mask)
        head = reduce_head_loss(loss, terms, mask)
        head.loss.backward()
        rate = (head.sum("alpha") / mask.sum()).item()
        figures |= _row(share, head.loss.item(), logits.grad, rate)
    return figures


def _row(share: float, loss: float, gradient: torch.Tensor, rate: float) -> Figures:
    return {
        f"loss, {share:.0%} supervised": loss,
        f"norm of the gradient, {share:.0%} supervised": gradient.norm().item(),
        f"acceptance rate, {share:.0%} supervised": rate,
    }


PROBES: dict[str, Callable[[], Figures]] = {
    probe.__name__: probe
    for probe in (
        without_triton,
        target_head_files,
        target_logits,
        target_head_precision,
        missing_features,
        pickled_code,
        lk_objective,
        kl_decay_default,
        acceptance_metric,
        streamed_samples,
        supervised_states,
        vocabulary_mapping,
        exported_settings,
        rotary_angles,
        evaluation_random_numbers,
        legacy_lambda,
        legacy_alpha,
        registered_lk_lambda,
        registered_lk_alpha,
    )
}


if __name__ == "__main__":
    # Libraries print as they load; the answer is the only output.
    with contextlib.redirect_stdout(io.StringIO()):
        figures = PROBES[sys.argv[1]]()
    print(json.dumps(figures))
