"""Training models of every algorithm, as `specforge train` assembles them, and random samples.

Nothing is loaded but the few tensors of a target that its drafts read, which are random too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from specforge.application import resolve_run
from specforge.config import Config
from specforge.config.schema import TrainingConfig
from specforge.modeling.target.target_utils import load_target_config
from specforge.optimizer import BF16Optimizer
from specforge.runtime.contracts import TrainBatch
from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
from specforge.training.controller import TrainerCore
from specforge.training.model_loading import resolve_draft_config
from transformers.initialization import no_init_weights

from benchmarks.gpu_check.record import ROOT
from specforge_lk.drafts.table import DRAFTS
from specforge_lk.files import atomic_write

FACTS: Final = ROOT / "configs/llama-3.1-8b-instruct/target-facts.json"
ALGORITHMS: Final = tuple(DRAFTS)
BLOCKS: Final = ("dflash", "domino", "dspark")
#: What captured files call the outputs of the target's layers, and its last hidden states.
_OF_BLOCKS: Final = ("hidden_states", "target_last_hidden_states")
_OF_CHAINS: Final = ("aux_hidden_state", "hidden_state")
#: The option that computes a loss without holding logits; None in a version that has none.
FUSED: Final = next((name for name in TrainingConfig.model_fields if "fused_head" in name), None)
#: By name, what a run's training section says of the objective.
WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "stock": {},
    "stock lk_lambda": {"lk_loss_type": "lambda"},
    "kl": {"loss": "kl"},
    "lk_lambda": {"loss": "lk_lambda"},
    **({"lk_lambda, fused head": {"loss": "lk_lambda", FUSED: True}} if FUSED else {}),
}

#: Of these, the ways that an algorithm may refuse.
OPTIONAL: Final = tuple(way for way, training in WAYS.items() if FUSED in training)


def ways_of(algorithm: str) -> tuple[str, ...]:
    """Return the ways in which an algorithm trains; SpecForge's own where it is SpecForge's."""
    own = DRAFTS[algorithm].trainer is None
    ways = ("stock", *(("stock lk_lambda",) if algorithm == "eagle3" else ())) if own else ("kl",)
    return (*ways, *(way for way in WAYS if way.startswith("lk_lambda")))


@dataclass(frozen=True)
class Size:
    """Of target, drafts and samples.

    Attributes:
        target: the target's config.json.
        draft_vocabulary: V_d, of drafts that have one of their own.
        heads: draft positions K; a block has as many slots.
        length: positions of a sample.
        batches: samples of a step by algorithm; others have ``batch``.
        anchors: blocks of a sample.
    """

    target: Mapping[str, Any]
    draft_vocabulary: int
    heads: int
    length: int
    batch: int
    anchors: int
    batches: Mapping[str, int] = field(default_factory=dict)

    def batch_of(self, algorithm: str) -> int:
        """Return the samples of a step; P-EAGLE takes one."""
        return 1 if algorithm == "peagle" else self.batches.get(algorithm, self.batch)


def llama() -> Size:
    """Return Llama-3.1-8B's sizes, EAGLE-3's those of the audit: 8 x 2048 positions, 7 steps."""
    facts = json.loads(FACTS.read_text())["config"]
    target = {"architectures": ["LlamaForCausalLM"], **facts}
    # An MTP module has the whole vocabulary at every draft position.
    return Size(target, 32_000, 7, 2048, 4, 512, {"eagle3": 8, "mtp": 2})


def tiny(vocabulary: int = 264) -> Size:
    """Return sizes for a rehearsal, and for what is compared with float64."""
    target = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    return Size(target, vocabulary * 3 // 8, 3, 14, 2, 4)


def multiples(*shape: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Return multiples of 1/256 below 2, which bfloat16 does not hold.

    Products of 32 of them are sums of multiples of 2^-16 below 4, which float32 holds exactly.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-511, 512, shape, generator=generator, device=device) / 256


def normal(*shape: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Return normal numbers scaled by the last dimension."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5


@dataclass
class Workshop:
    """Makes trainers of one size in one folder.

    Attributes:
        root: the folder, with the target and draft configs.
        size: of everything.
        device: torch device.
        dtype: of the drafts, and of the target's LM head where ``head`` is None.
        weights: makes the target's LM head, and the states of samples.
    """

    root: Path
    size: Size
    device: str
    dtype: str = "bfloat16"
    head: str | None = None
    weights: Callable[..., torch.Tensor] = normal
    #: The loss is replaced by what this makes of it.
    observe: Callable[[Any], Any] = field(default=lambda loss: loss)

    def __post_init__(self) -> None:
        if (self.root / "target").exists():
            return
        vocabulary, width = (self.size.target[name] for name in ("vocab_size", "hidden_size"))
        with atomic_write(self.root / "target") as temporary:
            temporary.mkdir(parents=True)
            (temporary / "config.json").write_text(json.dumps(self.size.target))
            tensors = {
                "lm_head.weight": self.head_weight(),
                "model.embed_tokens.weight": normal(vocabulary, width, seed=8, device=self.device),
                "model.norm.weight": torch.ones(width),
            }
            stored = {name: value.to("cpu", self._stored) for name, value in tensors.items()}
            save_file(stored, temporary / "model.safetensors")
        kept = self.draft_vocabulary
        d2t = kept.nonzero().squeeze(-1) - torch.arange(int(kept.sum()))
        torch.save({"t2d": kept, "d2t": d2t}, self.root / "mapping.pt")

    @property
    def _stored(self) -> torch.dtype:
        """As released; what is compared with float64 keeps its float32."""
        return torch.float32 if self.weights is multiples else torch.bfloat16

    def head_weight(self) -> torch.Tensor:
        """Return the target's LM head, [V, H]."""
        shape = (self.size.target[name] for name in ("vocab_size", "hidden_size"))
        return self.weights(*shape, seed=7, device=self.device)

    @cached_property
    def draft_vocabulary(self) -> torch.Tensor:
        """[V] bool."""
        kept = torch.zeros(self.size.target["vocab_size"], dtype=torch.bool)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(3))
        kept[order[: self.size.draft_vocabulary]] = True
        return kept

    def draft(self, algorithm: str) -> Drafted:
        """Return a draft with random weights, from which trainers of all ways are made."""
        config = self._config(algorithm, ways_of(algorithm)[0])
        chosen = resolve_run(config).algorithm
        provider = chosen.providers.model
        draft_config = resolve_draft_config(config, provider=provider.draft_config)
        # Filled on the device, where it takes no time.
        with no_init_weights(), redirect_stdout(io.StringIO()):
            draft = provider.build_draft(config, draft_config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                elif "embed_tokens" not in name:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return Drafted(self, algorithm, draft, draft_config)

    def _config(self, algorithm: str, way: str) -> Config:
        size, whole = self.size, DRAFTS[algorithm].whole_vocabulary
        path = self.root / f"{algorithm}.json"
        heads, kept = size.heads, None if whole else size.draft_vocabulary
        made = DRAFTS[algorithm].config(size.target, kept, heads)
        if algorithm == "peagle":
            made["ptd_token_id"] = 0
        if algorithm == "mlp_speculator" and self.weights is multiples:
            # Where gradients are compared, every head has its own.
            made["tie_weights"] = False
        path.write_text(json.dumps(made))
        training = {
            "strategy": algorithm,
            "attention_backend": "sdpa",
            **({"ttt_length": heads} if algorithm in ("eagle3", "mtp") else {}),
            **({"num_depths": heads} if algorithm == "peagle" else {}),
            **({"num_anchors": size.anchors} if algorithm in BLOCKS else {}),
            **WAYS[way],
        }
        model = {
            "target_model_path": str(self.root / "target"),
            "draft_model_config": str(path),
            "torch_dtype": self.dtype,
            **({} if whole else {"vocab_mapping_path": str(self.root / "mapping.pt")}),
            **({"target_head_dtype": self.head} if algorithm not in BLOCKS else {}),
        }
        data = {"hidden_states_path": str(self.root)}
        return Config.model_validate({"model": model, "data": data, "training": training})

    def states(self, algorithm: str, rank: int) -> torch.Tensor:
        """Return the target's last hidden states of a rank's samples, [B, L, H]."""
        shape = self.size.batch_of(algorithm), self.size.length, self.size.target["hidden_size"]
        found = self.weights(*shape, seed=11 + rank, device=self.device)
        # Logits of a few units, as a target's.
        return 3 * shape[-1] ** 0.5 * found if self.weights is normal else found

    def records(self, algorithm: str, rank: int) -> list[dict[str, torch.Tensor]]:
        """Return a rank's samples [L, ...], under the names that captured files have."""
        length, vocabulary = self.size.length, self.size.target["vocab_size"]
        layers = DRAFTS[algorithm].aux_layers
        found = []
        for row, states in enumerate(self.states(algorithm, rank)):
            generator = torch.Generator().manual_seed(100 * rank + row)
            mask = torch.ones(length, dtype=torch.long)
            mask[: length // 7] = 0
            record = {
                "input_ids": torch.randint(vocabulary, (length,), generator=generator),
                "loss_mask": mask,
            }
            named = {"hidden_state": states[None]}
            if layers:
                width = layers * states.shape[-1]
                aux = normal(1, length, width, seed=100 + row, device=self.device) * width**0.5
                names = _OF_BLOCKS if algorithm in BLOCKS else _OF_CHAINS
                named = dict(zip(names, (aux, states[None]), strict=True))
            # On the CPU, where a loader collates.
            stored = {name: value.to("cpu", self._stored) for name, value in named.items()}
            found.append(record | stored)
        return found


@dataclass
class Drafted:
    """A draft, and what makes trainers of it."""

    workshop: Workshop
    algorithm: str
    model: Any
    config: Any

    def trainer(self, way: str, *, sharding: str | None = None, rank: int = 0) -> Trainer:
        """Return a trainer; ``sharding`` wraps its model as SpecForge does, None does not."""
        shop = self.workshop
        config = shop._config(self.algorithm, way)
        algorithm = resolve_run(config).algorithm
        target = load_target_config(config.model.target_model_path)
        provider = algorithm.providers.model
        with redirect_stdout(io.StringIO()):
            parts = provider.build_training_model(config, self.model, self.config, target, None)
        if getattr(parts.model, "loss", None) is not None:
            parts.model.loss = shop.observe(parts.model.loss)
        if parts.target_head is not None:
            parts.target_head.requires_grad_(False)
        parallel = ParallelConfig.from_distributed(sharding_strategy=sharding or "NO_SHARD")
        backend = FSDPTrainingBackend(parallel, optimizer_factory=_optimizer)
        wrapped = backend.prepare_model(
            parts.model, wrap=sharding is not None, optimizer_target=self.model
        )
        bound = algorithm.providers.step.bind_runtime(
            config, self.model, parts.model, model_provenance={}
        )
        strategy = algorithm.providers.step.build(
            wrapped, target_head=parts.target_head, **bound.options
        )
        offline = algorithm.providers.offline_for("text")
        normalize, collate = offline.build_normalizer(shop.size.length), offline.build_collator()
        features = collate([normalize(record) for record in shop.records(self.algorithm, rank)])
        # On the device already, so that no copy is part of a step.
        tensors = {name: value.to(shop.device) for name, value in features.items()}
        batch = TrainBatch(["a"], self.algorithm, tensors, {"target_repr": "hidden_state"})
        return Trainer(TrainerCore(strategy, backend), batch, parts.model)


def _optimizer(model: Any) -> BF16Optimizer:
    return BF16Optimizer(model, lr=1e-5, total_steps=1000)


@dataclass
class Trainer:
    """One run's core, and the batch that it trains on over and over.

    Attributes:
        core: SpecForge's.
        batch: a rank's samples.
        model: the training model, without its wrapper.
    """

    core: TrainerCore
    batch: TrainBatch
    model: Any

    def step(self) -> float | None:
        """Train one step, the optimizer's included; returns the loss."""
        return self.core.train_step(self.batch).loss

    def gradients(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and whole gradients by the names of the draft's parameters."""
        out = self.core.strategy.forward_loss(self.batch)
        self.core.backend.backward(out.loss)
        return out.loss.detach(), _whole(self.core.strategy.trainable_module())


def _whole(wrapped: torch.nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def found() -> dict[str, torch.Tensor]:
        return {
            name.replace("_fsdp_wrapped_module.", "").split("draft_model.")[1]: p.grad.clone()
            for name, p in wrapped.named_parameters()
            if p.grad is not None
        }

    if not isinstance(wrapped, FSDP):
        return found()
    with FSDP.summon_full_params(wrapped, with_grads=True):
        return found()
