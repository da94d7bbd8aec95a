"""The formulas of the cost sheet against what modules, files and the allocator show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge.losses import fused_head
from specforge.modeling.auto import AutoDraftModel
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.optimizer import BF16Optimizer
from specforge.training.model_loading import load_draft_config_source
from specforge.training.schedule import validate_fixed_accumulation_plan
from tiny_target import HIDDEN_SIZE, draft_config, mtp_draft_config
from torch.utils.flop_counter import FlopCounterMode
from training_run import HEADS, prepare_with_features
from typer.testing import CliRunner

from benchmarks import step_memory
from benchmarks.measure import peak_allocated
from specforge_lk import cost, overlap_terms
from specforge_lk.cli import app
from specforge_lk.drafts import table
from specforge_lk.drafts.work import Work

ROOT = Path(__file__).parent.parent
BATCH, LENGTH, KEPT = 2, 24, 96
DRAFTS = {
    "eagle3": draft_config(KEPT),
    "medusa": draft_config(KEPT, "medusa", HEADS),
    "mlp_speculator": draft_config(KEPT, "mlp_speculator", HEADS),
    "mlp_speculator, tied": draft_config(KEPT, "mlp_speculator", HEADS) | {"tie_weights": True},
    "mtp": mtp_draft_config("llama"),
    "mtp, experts": mtp_draft_config("deepseek_v3"),
}
#: Operators of linear layers and of experts; attention's have other names.
MATRIX_PRODUCTS = {"mm", "addmm", "_grouped_mm"}


def build(name: str, folder: Path) -> torch.nn.Module:
    (folder / "draft.json").write_text(json.dumps(DRAFTS[name]))
    config = load_draft_config_source(str(folder / "draft.json"))
    return AutoDraftModel.from_config(config, torch.float32)


def forward(draft: torch.nn.Module) -> None:
    """All heads' logits, as training computes them."""
    tokens = torch.randint(KEPT, (BATCH, LENGTH))
    hidden = torch.randn(BATCH, LENGTH, HIDDEN_SIZE)
    if not isinstance(draft, LlamaForCausalLMEagle3):
        list(draft.head_logits(hidden, tokens, torch.ones_like(tokens), HEADS))
        return
    state = draft.project_hidden_states(hidden.repeat(1, 1, 3))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    attention = draft.prepare_decoder_attention_mask(mask, state, BATCH, LENGTH, 0)
    cache = [[], []]
    for _ in range(HEADS):
        state = draft.backbone(
            input_embeds=draft.embed_input_ids(tokens),
            hidden_states=state,
            cache_hidden=cache,
            attention_mask=attention,
            position_ids=torch.arange(LENGTH).expand(BATCH, -1),
            past_key_values=None,
            use_cache=True,
        )
        draft.compute_logits(state)


@pytest.mark.parametrize("name", DRAFTS)
def test_matrix_products_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    draft = build(name, tmp_path)
    work = cost.work_of(name.split(",")[0], draft, HEADS)
    with FlopCounterMode(display=False) as counter:
        forward(draft)
    counted = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if str(operator).split(".")[-1] in MATRIX_PRODUCTS
    )
    assert counted == 2 * (work.trained + work.frozen) * BATCH * LENGTH


def test_attention_sees_its_prefix_and_its_chain() -> None:
    pairs = sum(start + 1 + head for start in range(LENGTH) for head in range(HEADS))
    work = Work(trained=0, frozen=0, features=0, attention=8)
    assert cost.forward_flops(work, HEADS, LENGTH) == 2 * 8 * pairs / LENGTH


@pytest.mark.parametrize("name", ["eagle3", "medusa", "mlp_speculator", "mtp", "mtp, experts"])
def test_activations_are_about_what_autograd_keeps(name: str, tmp_path: Path) -> None:
    """An estimate: norms and residual sums keep more, products that share an input less."""
    draft = build(name, tmp_path)
    lent = {parameter.untyped_storage().data_ptr() for parameter in draft.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lent:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(draft)
    size = sum(storage.nbytes() for storage in kept.values()) / (BATCH * LENGTH)
    estimate = cost.work_of(name.split(",")[0], draft, HEADS).features * 4
    assert 0.5 < estimate / size < 1.5, (estimate, size)


def test_loss_allocates_the_gradient_and_vectors() -> None:
    rows, kept = 512, 4096
    draft = torch.randn(rows, kept, requires_grad=True)
    target = torch.randn(rows, kept)
    normalizer = target.logsumexp(-1) + 0.1

    def step() -> None:
        draft.grad = None
        terms = overlap_terms(draft, target, normalizer)
        (terms.kl.mean() - terms.log_alpha.mean()).backward()

    step()
    draft.grad = None
    assert peak_allocated(step) / rows == pytest.approx(kept * draft.element_size(), rel=0.02)


def test_ratios_of_unfused_losses_are_the_measured_ones() -> None:
    cells = json.loads((ROOT / "benchmarks/results/operation.json").read_text())["cells"]
    wanted = {"tokens": 1024, "vocabulary": 32000, "dtype": "float32", "supervised": 1.0}
    (cell,) = (cell for cell in cells if cell["cell"] == wanted)
    tensor = 1024 * 32000 * 4
    for name, ratio in (
        ("specforge kl", cost.UNFUSED_KL),
        ("specforge lk_lambda", cost.UNFUSED_LAMBDA),
    ):
        measured = cell["implementations"][name]["memory"]["allocated"]
        assert measured / tensor == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("algorithm", step_memory.ALGORITHMS)
def test_logits_of_a_step_are_the_measured_ones(algorithm: str) -> None:
    """What a further position takes, up to the draft's own tensors, and what the setting saves."""
    found = json.loads((ROOT / "benchmarks/results/step_memory.json").read_text())["cells"]
    peaks = {step_memory.Cell(**f["cell"]): f["peaks"] for f in found}
    cells = sorted((c for c in peaks if c.algorithm == algorithm), key=lambda c: c.tokens)
    saved = []
    for way in step_memory.WAYS:
        formula = [getattr(_step_logits(cell), way) for cell in cells]
        measured = [peaks[cell][way] for cell in cells]
        further = cells[-1].tokens - cells[-2].tokens
        slopes = [(many - few) / further for *_, few, many in (formula, measured)]
        assert 0 <= slopes[1] - slopes[0] < 1.5 * cells[-1].vocabulary
        saved.append((formula[-1], measured[-1]))
    computed, measured = (held - fused for held, fused in zip(*saved, strict=True))
    assert measured == pytest.approx(computed, rel=0.15)


def _step_logits(cell: step_memory.Cell) -> cost.StepLogits:
    held = cell.algorithm in cost.TARGET_HELD
    return cost.StepLogits(
        positions=cell.tokens,
        # All slots of a block are one head's positions.
        heads=1 if cell.algorithm == "dflash" else step_memory.HEADS,
        kept=cell.vocabulary,
        vocabulary=cell.vocabulary * (1 + held),
        element=4,
        target_element=4,
        target_held=held,
        chunk=fused_head._CPU_CHUNK_BYTES // (4 * cell.vocabulary),
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_trained_lm_heads_count_once(name: str, tmp_path: Path) -> None:
    draft = build(name, tmp_path)
    width = getattr(draft.config, "inner_dim", HIDDEN_SIZE)
    heads = {"medusa": HEADS, "mlp_speculator": HEADS, "mtp": 0, "mtp, experts": 0}.get(name, 1)
    assert cost._trained_heads(draft, KEPT) == heads * KEPT * width


@pytest.mark.parametrize(("algorithm", "captured"), [("eagle3", 3), ("medusa", 0)])
def test_features_have_the_bytes_of_a_captured_file(algorithm, captured, tmp_path) -> None:
    setup = prepare_with_features(tmp_path, algorithm=algorithm)
    record = torch.load(sorted(setup.features.glob("*.ckpt"))[0], weights_only=True)
    size = sum(tensor.nbytes for tensor in record.values())
    assert table.DRAFTS[algorithm].aux_layers == captured
    per_token = cost.feature_bytes(HIDDEN_SIZE, captured, 4)
    assert size == per_token * len(record["input_ids"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_state_is_what_the_optimizer_holds(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(64, 32, dtype=dtype)
    optimizer = BF16Optimizer(module, lr=1e-3, total_steps=10, warmup_steps=1)
    held = {}

    def hold(inner: torch.optim.Optimizer, *_) -> None:
        masters = inner.param_groups[0]["params"]
        both = [*module.parameters(), *masters]
        moments = [value for state in inner.state.values() for value in state.values()]
        for tensor in [*both, *(parameter.grad for parameter in both), *moments]:
            if tensor.ndim:  # AdamW's count of steps is a scalar
                held[tensor.data_ptr()] = tensor.nbytes

    optimizer.optimizer.register_step_post_hook(hold)
    module(torch.ones(1, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    trained = sum(parameter.numel() for parameter in module.parameters())
    assert sum(held.values()) == cost.TRAINING_STATE_BYTES * trained


def sheet(path: str | Path, *overrides: str, column: str = "value") -> dict[str, Any]:
    arguments = ["cost", "--config", str(path), "--mean-tokens", "500", "--json", *overrides]
    done = CliRunner().invoke(app, arguments)
    assert not done.exit_code, done.output
    lines = json.loads(done.output)
    assert {line["source"] for line in lines} == {"formula", "measured", "counted"}
    return {line["name"]: line[column] for line in lines}


def test_sheet_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """660,000 prompts of 500 tokens: 82,500 to each of 8 GPUs, 20,625 batches of 4."""
    monkeypatch.chdir(ROOT)
    path = "configs/llama-3.1-8b-instruct/eagle3.yaml"
    lines = sheet(path)
    assert lines["tokens per epoch"] == 330_000_000
    # Every second batch completes a step, across the ends of epochs, too.
    assert (lines["steps per epoch"], lines["steps in all"]) == (10_312.5, 103_125)
    assert lines["captured features per token"] == 4 * 4096 * 2 + 16
    # Micro-batches of 4 x 2048, six draft positions, 32000 of 128256 tokens; the draft in
    # bfloat16, the target's LM head in float32.
    assert lines["logits of a full micro-batch, held"] == 8192 * 32000 * (4 + 7 * 2)
    fused = 8192 * 32000 * 4 + 1024 * 32000 * 12 + 32000 * 4096 * 4
    assert lines["the same, training.loss_fused_head"] == fused
    assert lines["an epoch"] / lines["a step"] == pytest.approx(660_000 / 64)
    assert sheet(path, "training.max_steps=7")["steps in all"] == 7


def test_sheet_says_where_a_run_has_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """82,500 micro-batches for each GPU, 8 of them to a step."""
    monkeypatch.chdir(ROOT)
    path = "configs/deepseek-v3-0324/mtp.yaml"
    plan = dict(num_samples=82_500, batch_size=1, accumulation_steps=8, num_epochs=1)
    with pytest.raises(ValueError, match="max_steps <= 10312"):
        validate_fixed_accumulation_plan(**plan, max_steps=None)
    assert "training.max_steps=10312:" in sheet(path, column="how")["steps in all"]
    validate_fixed_accumulation_plan(**plan, max_steps=10312)
    assert "set" not in sheet(path, "training.max_steps=10312", column="how")["steps in all"]


def test_target_wider_than_its_draft(tmp_path: Path) -> None:
    """Features and the target's head have the target's size."""
    draft = draft_config(KEPT) | {"target_hidden_size": 3 * HIDDEN_SIZE}
    (tmp_path / "draft.json").write_text(json.dumps(draft))
    config = ROOT / "configs/smollm2-135m/eagle3.yaml"
    lines = sheet(config, f"model.draft_model_config={tmp_path / 'draft.json'}")
    assert lines["captured features per token"] == 4 * 3 * HIDDEN_SIZE * 4 + 16
    assert lines["the target's head"] == 2 * 3 * HIDDEN_SIZE * draft["vocab_size"]


def test_algorithms_without_a_sheet_are_refused() -> None:
    config = ROOT / "configs/smollm2-135m/dflash.yaml"
    refused = CliRunner().invoke(app, ["cost", "--config", str(config)])
    assert refused.exit_code == 1
    assert "training.strategy=dflash: there are cost sheets of eagle3, medusa" in refused.output
