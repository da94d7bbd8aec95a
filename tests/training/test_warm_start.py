"""An exported draft of this package is where another training starts from, tensor for tensor."""

import copy
import json
from pathlib import Path

import pytest
import torch
from specforge.export.to_hf import export_to_hf
from specforge.modeling.auto import AutoDraftModel
from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model
from tiny_target import VOCAB_SIZE, draft_config, mtp_draft_config

HEADS, TRUNCATED = 3, 40
DRAFTS = {
    "medusa": draft_config(TRUNCATED, "medusa", HEADS),
    "medusa, whole vocabulary": draft_config(VOCAB_SIZE, "medusa", HEADS),
    "medusa, the target's head": draft_config(TRUNCATED, "medusa", HEADS)
    | {"original_lm_head": True},
    "mlp_speculator": draft_config(TRUNCATED, "mlp_speculator", HEADS),
    "mlp_speculator, tied": draft_config(VOCAB_SIZE, "mlp_speculator", HEADS)
    | {"tie_weights": True},
    "mtp": mtp_draft_config("llama"),
    "mtp, experts": mtp_draft_config("deepseek_v3"),
    "eagle3": draft_config(TRUNCATED),
    "peagle": draft_config(TRUNCATED, "peagle"),
    **{name: draft_config(VOCAB_SIZE, name) for name in ("dflash", "domino", "dspark")},
}
#: Draft, what its export has, what the run asks for, and a tensor that differs.
MISFITS = [
    ("medusa", {"num_hidden_layers": 2}, {"num_hidden_layers": 1}, "blocks.0.layers.1.weight"),
    ("medusa", {"num_heads": 3}, {"num_heads": 2}, "lm_heads.2.weight"),
    ("medusa", {"medusa_fc_bias": True}, {"medusa_fc_bias": False}, "blocks.0.layers.0.bias"),
    ("medusa", {"draft_vocab_size": 40}, {"draft_vocab_size": 48}, "lm_heads.0.weight"),
    ("medusa", {"draft_vocab_size": 40}, {"draft_vocab_size": VOCAB_SIZE}, "lm_heads.0.weight"),
    ("mlp_speculator", {"n_predict": 3}, {"n_predict": 2}, "speculator.head.2.weight"),
    ("eagle3", {"draft_vocab_size": 40}, {"draft_vocab_size": 48}, "lm_head.weight"),
    ("peagle", {"num_hidden_layers": 2}, {"num_hidden_layers": 1}, "layers.1.mlp.up_proj.weight"),
]


def build(config: dict, folder: Path, seed: int) -> torch.nn.Module:
    file = folder / "draft.json"
    file.write_text(json.dumps(config))
    torch.manual_seed(seed)
    draft = AutoDraftModel.from_config(load_draft_config_source(str(file)), torch.float32)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    return draft


@pytest.mark.parametrize("name", DRAFTS)
def test_exported_draft_is_loaded_whole(name: str, tmp_path: Path) -> None:
    config = DRAFTS[name]
    trained = build(config, tmp_path, seed=0)
    if config.get("draft_vocab_size", VOCAB_SIZE) < VOCAB_SIZE:
        ids = torch.randperm(VOCAB_SIZE)[:TRUNCATED].sort().values
        trained.d2t.copy_(ids - torch.arange(TRUNCATED))
        trained.t2d.zero_()[ids] = True
    state = {"draft_state_dict": trained.state_dict(), "strategy": name.split(",")[0]}
    torch.save(state, tmp_path / "training_state.pt")
    export_to_hf(str(tmp_path), str(tmp_path / "draft.json"), str(tmp_path / "export"))

    fresh = build(config, tmp_path, seed=1)
    report = warm_start_draft_model(
        fresh,
        str(tmp_path / "export"),
        draft_config=load_draft_config_source(str(tmp_path / "export")),
        strategy=name.split(",")[0],
        allow_missing_embedding=True,
    )
    assert not report.missing_keys
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "there", "here", "tensor"), MISFITS, ids=lambda value: str(value).strip("{}")
)
def test_export_of_another_architecture_is_refused(
    name: str, there: dict, here: dict, tensor: str, tmp_path: Path
) -> None:
    state = {
        "draft_state_dict": build(DRAFTS[name] | there, tmp_path, seed=0).state_dict(),
        "strategy": name,
    }
    torch.save(state, tmp_path / "training_state.pt")
    export_to_hf(str(tmp_path), str(tmp_path / "draft.json"), str(tmp_path / "export"))
    fresh = build(DRAFTS[name] | here, tmp_path, seed=1)
    config = load_draft_config_source(str(tmp_path / "draft.json"))
    with pytest.raises(ValueError, match="does not match this draft model") as refused:
        warm_start_draft_model(
            fresh,
            str(tmp_path / "export"),
            draft_config=config,
            strategy=name,
            allow_missing_embedding=True,
        )
    ((field, wanted),) = here.items()
    said = f"{field} is {there[field]} in the source, {wanted} in this run's draft config"
    for part in (said, tensor, str(tmp_path / "export"), "Leave out model.draft_model_config"):
        assert part in str(refused.value)


def test_bfloat16_rounds_neither_positions_nor_routing(tmp_path: Path) -> None:
    """From a released module to the next training, with an export between."""
    config = DRAFTS["mtp, experts"]
    exact = build(config, tmp_path, seed=0)
    (bias,) = (name for name in exact.state_dict() if name.endswith("e_score_correction_bias"))
    exact.get_buffer(bias).uniform_(5, 6)
    wanted = exact.get_buffer(bias).clone()
    assert not torch.equal(wanted.bfloat16().float(), wanted)
    trained = copy.deepcopy(exact).to(torch.bfloat16)
    state = {"draft_state_dict": trained.state_dict(), "strategy": "mtp"}
    torch.save(state, tmp_path / "training_state.pt")
    export_to_hf(str(tmp_path), str(tmp_path / "draft.json"), str(tmp_path / "export"))

    fresh = build(config, tmp_path, seed=1).to(torch.bfloat16)
    loaded = load_draft_config_source(str(tmp_path / "export"))
    warm_start_draft_model(fresh, str(tmp_path / "export"), draft_config=loaded, strategy="mtp")
    for draft in (trained, fresh):
        assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
        assert torch.equal(draft.get_buffer(bias), wanted)
        assert torch.equal(draft.rotary_emb.inv_freq, exact.rotary_emb.inv_freq)
