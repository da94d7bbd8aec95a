"""Single steps of SpecForge's own algorithms, with what 0.2.0 has and nothing of the patches.

usage: stock_steps.py DIRECTORY FILE
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp_cpu import install
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, draft_config

LENGTH, DRAFT_VOCAB_SIZE = 14, 96
BLOCKS = ("dflash", "domino", "dspark")


def draft(path: Path, config: dict, **options: Any) -> Any:
    """A draft of SpecForge's, in bfloat16."""
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    built = AutoDraftModel.from_config(
        AutoDraftModelConfig.from_file(str(path)), torch_dtype=torch.bfloat16, **options
    )
    return built.to(torch.bfloat16)


def target_head(directory: Path) -> Any:
    """SpecForge's, with a random head in the dtype that it has always had."""
    from specforge.modeling.target.target_head import TargetHead

    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": HIDDEN_SIZE,
                "vocab_size": VOCAB_SIZE,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
            }
        )
    )
    head = TargetHead(str(directory))
    torch.manual_seed(1)
    torch.nn.init.normal_(head.fc.weight)
    head.freeze_weights()
    return head.to(torch.bfloat16)


def model(algorithm: str, directory: Path) -> tuple[Any, Any]:
    """The training model and the class of its strategy."""
    from specforge.training.strategies import base

    path = directory / "draft.json"
    if algorithm in BLOCKS:
        from specforge.algorithms.common import dflash_family_model as family

        built = draft(path, draft_config(algorithm=algorithm, block_size=4))
        kind = {"dflash": "DFlash", "domino": "Domino", "dspark": "DSpark"}[algorithm]
        head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        embedding = torch.nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        wrapped = getattr(family, f"Online{kind}Model")(
            draft_model=built,
            target_lm_head=head.requires_grad_(False),
            target_embed_tokens=embedding.requires_grad_(False),
            mask_token_id=0,
            block_size=4,
            attention_backend="sdpa",
            num_anchors=8,
        )
        return wrapped.to(torch.bfloat16), getattr(base, f"{kind}TrainStrategy")
    from specforge.algorithms.eagle3.model import OnlineEagle3Model

    built = draft(path, draft_config(DRAFT_VOCAB_SIZE), attention_backend="sdpa")
    kept = torch.arange(VOCAB_SIZE) % 11 < 4
    built.t2d.copy_(kept)
    built.d2t.copy_(kept.nonzero().squeeze(-1) - torch.arange(DRAFT_VOCAB_SIZE))
    return OnlineEagle3Model(built, 3, attention_backend="sdpa"), base.Eagle3TrainStrategy


def step(name: str, directory: Path) -> dict[str, torch.Tensor]:
    """Loss and gradients of a sharded step."""
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig

    algorithm, _, teacher = name.partition("-")
    built, strategy_type = model(algorithm, directory)
    parallel = ParallelConfig.from_distributed(sharding_strategy="SHARD_GRAD_OP")
    backend = FSDPTrainingBackend(parallel)
    wrapped = backend.prepare_model(built, optimizer_target=built.draft_model)
    options = {}
    if "target_head" in inspect.signature(strategy_type).parameters:
        options = {"target_head": target_head(directory)}
    if teacher:
        options |= {"compact_teacher": True, "compact_teacher_chunk_size": 100}
    strategy = strategy_type(wrapped, **options)
    torch.manual_seed(2)
    width = 2 if algorithm in BLOCKS else 3
    aux = torch.randn(2, LENGTH, width * HIDDEN_SIZE).bfloat16()
    final = torch.randn(2, LENGTH, HIDDEN_SIZE).bfloat16()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    # Without the positions that a patch shifts on purpose: everything is supervised, to the end.
    tensors = {
        "input_ids": torch.randint(VOCAB_SIZE, (2, LENGTH)),
        "attention_mask": torch.ones_like(mask),
        "loss_mask": mask,
        "hidden_state": aux,
        "hidden_states": aux,
        "target": final,
        "target_last_hidden_states": final,
    }
    if algorithm in ("dflash", "domino"):
        del tensors["target_last_hidden_states"]
    batch = TrainBatch(["a"], algorithm, tensors, {"target_repr": "hidden_state"})
    out = strategy.forward_loss(batch)
    backend.backward(out.loss)
    gradients = {
        name: value.grad for name, value in wrapped.named_parameters() if value.grad is not None
    }
    return {"loss": out.loss.detach(), **gradients}


def peagle_loss() -> dict[str, torch.Tensor]:
    """P-EAGLE's loss with its gradient and metrics, from random logits."""
    from specforge.algorithms.peagle.model import (
        compute_peagle_metrics,
        generate_cod_sample_indices,
    )

    torch.manual_seed(0)
    vocabulary, length = 40, 30
    mask = (torch.rand(1, length) < 0.8).long()
    t2d = torch.arange(vocabulary) % 3 > 0
    anchors, depth = generate_cod_sample_indices(length, mask, 5)
    logits = torch.randn(1, len(anchors), int(t2d.sum()), requires_grad=True)
    loss, metrics = compute_peagle_metrics(
        logits=2 * logits,
        targets=3 * torch.randn(1, length, vocabulary),
        loss_mask=mask,
        anchor_pos=anchors,
        depth=depth,
        num_depths=5,
        t2d=t2d,
    )
    loss.backward()
    return {"loss": loss.detach(), "gradient": logits.grad, **metrics}


def main(directory: Path, file: str) -> None:
    """Every algorithm that 0.2.0 trains on a CPU, EAGLE-3 with the compact teacher, and P-EAGLE."""
    install()
    store = dist.FileStore(f"{file}.store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    names = ("eagle3", "eagle3-compact", *BLOCKS)
    saved = {f"sharded {name}": step(name, directory) for name in names}
    saved["loss of peagle"] = peagle_loss()
    torch.save(saved, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
