"""Which states of the target the draft reads, and what it does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specforge_lk.doctor import edits
from specforge_lk.doctor.case import Case
from specforge_lk.doctor.findings import Finding
from specforge_lk.doctor.reading import (
    BLOCK,
    EAGLE,
    default_layers,
    layers_of,
    output_norm_of_vllm,
)

_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
_RENAME = (
    "set eagle_config.eagle_aux_hidden_state_layer_ids to {ours} (SGLang, from 0) and "
    "eagle_aux_hidden_state_layer_ids to {theirs} (vLLM, from 1) in the draft's config.json; "
    "exports by patched SpecForge have both"
)


def reads_layers(case: Case) -> str:
    """Return why there are no captured layers; empty where there are."""
    if case.kind.name in (*EAGLE, *BLOCK):
        return ""
    return f"{case.kind.title}: it reads the target's last hidden state"


def _trained_layers(case: Case) -> tuple[int, ...] | None:
    """Return the layers of the training, if the features or the run config tell."""
    if case.features and (captured := case.features.manifest.get("layers")):
        return tuple(captured)
    if case.run is None:
        return None
    config = case.run.draft_config
    if case.kind.name in BLOCK:
        named = (config.get("dflash_config") or {}).get("target_layer_ids")
        return tuple(named) if named else None
    named = case.run.get("model", "aux_hidden_state_layer_ids") or (
        config.get("eagle_config") or {}
    ).get("eagle_aux_hidden_state_layer_ids")
    return tuple(named) if named else default_layers(case.target.num_layers)


def _readings(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the layers that every engine takes."""
    if case.kind.name in BLOCK:
        return {"the engine": case.draft.capture_layers}
    return {_TITLES[name]: layers_of(name, case.config, case.target) for name in case.engines}


def layers(case: Case) -> Sequence[Finding]:
    """Compare the layers of the training with those that engines take from config.json."""
    trained = _trained_layers(case)
    intended = trained or case.draft.capture_layers
    source = "" if trained else " (by the export's config.json)"
    found = []
    for engine, reading in _readings(case).items():
        if reading == intended:
            continue
        remedy = _RENAME.format(ours=list(intended), theirs=[layer + 1 for layer in intended])
        if case.kind.name in BLOCK:
            remedy = f"set dflash_config.target_layer_ids to {list(intended)}"
        found.append(
            case.judged(
                f"{engine} gives the draft the outputs of other layers than it was trained on",
                trained=f"layers {_list(intended)}, counted from 0{source}",
                served=f"layers {_list(reading)}",
                remedy=remedy,
                remedied=case.served.but(edits.layers(intended)),
                as_served=case.served.but(edits.layers(reading)),
            )
        )
    return found


def neighbors(case: Case) -> Sequence[Finding]:
    """Measure the draft with all layers one lower and one higher."""
    assert case.bench is not None
    served = tuple(case.bench.load(case.served).capture_layers)
    if (trained := _trained_layers(case)) and trained != served:
        return []  # found by the comparison
    shifted = {
        by: tuple(layer + by for layer in served)
        for by in (-1, 1)
        if min(served) + by >= 0 and max(served) + by < case.target.num_layers
    }
    best = case.better(
        {_list(wanted): case.served.but(edits.layers(wanted)) for wanted in shifted.values()}
    )
    if best is None:
        return []
    name = best[0]
    wanted = next(layers for layers in shifted.values() if _list(layers) == name)
    remedy = _RENAME.format(ours=list(wanted), theirs=[layer + 1 for layer in wanted])
    if case.kind.name in BLOCK:
        remedy = f"set dflash_config.target_layer_ids to {list(wanted)}"
    return [
        case.judged(
            "the captured layers are counted from another number: all shifted by one fit better",
            trained=f"layers {name}, counted from 0",
            served=f"layers {_list(served)}",
            remedy=remedy,
            remedied=case.served.but(edits.layers(wanted)),
        )
    ]


def features_dtype(case: Case) -> Sequence[Finding]:
    """Measure the draft on features in the dtype that they were stored in for training."""
    assert case.features is not None
    stored = case.features.manifest.get("stored_dtype")
    if not stored or stored == case.dtype:
        return []
    rounded = case.served.but(edits.features_in(stored))
    if case.better({stored: rounded}) is None:
        return []
    return [
        case.judged(
            "the draft fits features as they were stored for training",
            trained=stored,
            served=case.dtype,
            remedy=f"serve the target in {stored}, or capture with model.torch_dtype={case.dtype}",
            remedied=rounded,
        )
    ]


# --------------------------------------------------------------------------- norms


def has_eagle_norms(case: Case) -> str:
    """Return why the order of norms is no question; empty where it is one."""
    return "" if case.kind.name in EAGLE else f"{case.kind.title}: engines have one order of norms"


def norm_before_residual(case: Case) -> Sequence[Finding]:
    """Measure the draft with its residual taken on the other side of the first norm."""
    layer = case.draft.midlayer if case.kind.name == "eagle3" else case.draft.layers[0]  # type: ignore[attr-defined]
    now = bool(layer._normalize_residual)
    other = case.served.having(norm_before_residual=not now)
    if case.better({"other": other}) is None:
        return []
    side = {True: "after the norm", False: "before the norm"}
    return [
        case.judged(
            "the residual of the draft's first layer is taken on the other side of the norm",
            trained=f"{side[not now]} (norm_before_residual {str(not now).lower()})",
            served=f"{side[now]} (norm_before_residual {str(now).lower()})",
            remedy=f"set norm_before_residual to {str(not now).lower()} in config.json",
            remedied=other,
        )
    ]


def output_norm(case: Case) -> Sequence[Finding]:
    """Compare SpecForge's meaning of ``norm_output`` with vLLM's."""
    edit = output_norm_of_vllm(case.config)
    if case.kind.name != "eagle3" or "vllm" not in case.engines or edit is None:
        return []
    if "LlamaForCausalLMEagle3" not in (case.config.get("architectures") or ()):
        return []  # a draft of vLLM's own kind
    kind = edit.name.partition(":")[0]
    normalized = bool(case.config["norm_output"])
    return [
        case.judged(
            "vLLM takes norm_output for whether the state after the output norm is fed back",
            trained="the state before the norm is fed back"
            if normalized
            else "no norm before the LM head",
            served="the state after the norm is fed back" if normalized else "a norm before it",
            remedy="remove norm_output from config.json"
            if normalized
            else "vLLM cannot serve this draft as it was trained: train with norm_output true",
            remedied=case.served.without(kind),
            as_served=case.served.but(edit),
        )
    ]


# -------------------------------------------------------------------------- rotary


def has_rotary(case: Case) -> str:
    """Return why there are no rotary embeddings; empty where there are."""
    if case.kind.name in (*EAGLE, *BLOCK, "mtp"):
        return ""
    return f"{case.kind.title}: no rotary embeddings"


def rotary(case: Case) -> Sequence[Finding]:
    """Compare rotary base and scaling with the training's, and measure the target's."""
    mine = _rope(case.config)
    if mine is None:
        return []
    written = case.run.draft_config if case.run else {}
    trained = _rope(written) if written else None
    if trained and trained != mine:
        return [
            case.judged(
                "rotary base or scaling is not that of the training",
                trained=_text(trained),
                served=_text(mine),
                remedy="give the export the training's rope_theta and rope_scaling",
                remedied=case.served.having(**_settings(trained)),
            )
        ]
    if case.bench is None:
        return []
    theirs = _rope(case.target.model.config.get_text_config().to_dict())
    candidates = {
        _text(rope): case.served.having(**_settings(rope))
        for rope in (theirs, {**mine, "rope_theta": 10000.0}, {"rope_theta": mine["rope_theta"]})
        if rope and rope != mine
    }
    best = case.better(candidates)
    if best is None:
        return []
    return [
        case.judged(
            "another rotary base or scaling fits the draft better",
            trained=best[0],
            served=_text(mine),
            remedy="give the export the rope_theta and rope_scaling that fit",
            remedied=candidates[best[0]],
        )
    ]


def rotary_precision(case: Case) -> Sequence[Finding]:
    """Measure the draft with rotary frequencies in bfloat16, as some trainings round them."""
    if not hasattr(case.draft, "_rotary"):
        return []
    rounded = case.served.but(edits.ROUND_FREQUENCIES)
    if case.better({"rounded": rounded}) is None:
        return []
    return [
        case.judged(
            "the draft was trained with rotary frequencies that were rounded",
            trained="bfloat16",
            served="float32, as engines compute them",
            remedy="train with patch 0014, which keeps them in float32",
            remedied=rounded,
        )
    ]


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return rotary base and scaling in one form; None where kinds of layers have their own."""
    rope = config.get("rope_parameters")
    if rope is None:
        rope = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    if any(isinstance(value, dict) for value in rope.values()):
        return None
    found = {name: value for name, value in rope.items() if value is not None}
    kind = found.pop("rope_type", found.pop("type", "default"))
    found = {"rope_theta": 10000.0, **found} | ({} if kind == "default" else {"rope_type": kind})
    return found | {"rope_theta": float(found["rope_theta"])}


def _settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", **rope},
        "rope_scaling": None,
        "rope_theta": None,
    }


def _text(rope: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(rope.items(), reverse=True))


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
