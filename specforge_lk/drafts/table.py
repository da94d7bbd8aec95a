"""One row for every draft: what decoding, costs, recipes, training and tests know of it.

A new draft is a row here, a module that trains it (unless SpecForge has one), a class that decodes
it, and a function each in `configs` and, for a cost sheet, in `work`. Importing this imports none
of them that needs torch, transformers or SpecForge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from specforge_lk.drafts import configs, work
from specforge_lk.drafts.work import WorkOf

if TYPE_CHECKING:
    from specforge_lk.decode.base import BaseDraft
    from specforge_lk.drafts.model import HeadDraftModel

Config = Mapping[str, Any]


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True)
class DraftType:
    """A draft, by the algorithm that trains it.

    Attributes:
        name: ``training.strategy`` in a run config, and ``algorithm`` in a report.
        title: in a sentence.
        architectures: values of ``architectures`` in config.json, that of SpecForge's exports
            first.
        decoder: returns the class that decodes it, and loads it.
        config: (the target's config.json, V_d, K) -> a draft's; see `configs`.
        trainer: returns the class of this package that trains it; None where SpecForge has one.
        work: (the module that trains, K) -> its matrix products; None without a cost sheet.
        implied: whether a config.json is of this draft though ``architectures`` does not say so.
        whole_vocabulary: whether it always drafts from the whole vocabulary.
        aux_layers: decoder layers of the target whose outputs are captured for it beside the last
            hidden state, for the cost sheet.
        vllm: whether vLLM serves it, under ``name``.
        sglang: its name in SGLang; None where that does not serve it.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    decoder: Callable[[], type[BaseDraft]]
    config: Callable[[Config, int | None, int], dict[str, Any]]
    trainer: Callable[[], type[HeadDraftModel]] | None = None
    work: WorkOf | None = None
    implied: Callable[[Config], bool] = _never
    whole_vocabulary: bool = False
    aux_layers: int = 0
    vllm: bool = False
    sglang: str | None = None


# ------------------------------------------------------------------- classes that decode


def _eagle3() -> type[BaseDraft]:
    from specforge_lk.decode.eagle3 import Eagle3Draft

    return Eagle3Draft


def _peagle() -> type[BaseDraft]:
    from specforge_lk.decode.peagle import PEagleDraft

    return PEagleDraft


def _dflash() -> type[BaseDraft]:
    from specforge_lk.decode.dflash import DFlashDraft

    return DFlashDraft


def _domino() -> type[BaseDraft]:
    from specforge_lk.decode.dflash import DominoDraft

    return DominoDraft


def _dspark() -> type[BaseDraft]:
    from specforge_lk.decode.dflash import DSparkDraft

    return DSparkDraft


def _medusa() -> type[BaseDraft]:
    from specforge_lk.decode.heads import MedusaDraft

    return MedusaDraft


def _mlp_speculator() -> type[BaseDraft]:
    from specforge_lk.decode.heads import MLPSpeculatorDraft

    return MLPSpeculatorDraft


def _mtp() -> type[BaseDraft]:
    from specforge_lk.decode.mtp import MTPDraft

    return MTPDraft


# -------------------------------------------------------------------- classes that train


def _medusa_model() -> type[HeadDraftModel]:
    from specforge_lk.drafts.medusa import MedusaModel

    return MedusaModel


def _mlp_speculator_model() -> type[HeadDraftModel]:
    from specforge_lk.drafts.mlp_speculator import MLPSpeculatorPreTrainedModel

    return MLPSpeculatorPreTrainedModel


def _mtp_model() -> type[HeadDraftModel]:
    from specforge_lk.drafts.mtp import MTPDraftModel

    return MTPDraftModel


# -------------------------------------------------------------------------------- drafts

DRAFTS: Final[Mapping[str, DraftType]] = {
    draft.name: draft
    for draft in (
        DraftType(
            "eagle3",
            "EAGLE-3 draft",
            ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"),
            _eagle3,
            configs.eagle3,
            work=work.eagle3,
            implied=lambda config: config.get("speculators_model_type") == "eagle3",
            aux_layers=3,
            vllm=True,
            sglang="EAGLE3",
        ),
        DraftType(
            "peagle", "P-EAGLE draft", ("PEagleDraftModel",), _peagle, configs.peagle, aux_layers=3
        ),
        DraftType(
            "dflash",
            "DFlash draft",
            ("DFlashDraftModel",),
            _dflash,
            configs.dflash,
            whole_vocabulary=True,
            aux_layers=3,
        ),
        DraftType(
            "domino",
            "Domino draft",
            ("DominoDraftModel",),
            _domino,
            configs.domino,
            whole_vocabulary=True,
            aux_layers=3,
        ),
        DraftType(
            "dspark",
            "DSpark draft",
            ("DSparkDraftModel",),
            _dspark,
            configs.dspark,
            whole_vocabulary=True,
            aux_layers=3,
        ),
        DraftType(
            "medusa",
            "MEDUSA heads",
            ("MedusaModel",),
            _medusa,
            configs.medusa,
            trainer=_medusa_model,
            work=work.medusa,
            # Released drafts may have no architectures; older ones have no model_type either.
            implied=lambda config: (
                config.get("model_type") == "medusa"
                or (not config.get("architectures") and "medusa_num_heads" in config)
            ),
            vllm=True,
        ),
        DraftType(
            "mlp_speculator",
            "MLP speculator",
            ("MLPSpeculatorPreTrainedModel",),
            _mlp_speculator,
            configs.mlp_speculator,
            trainer=_mlp_speculator_model,
            work=work.mlp_speculator,
            implied=lambda config: config.get("model_type") == "mlp_speculator",
        ),
        DraftType(
            "mtp",
            "MTP module",
            ("MTPDraftModel",),
            _mtp,
            configs.mtp,
            trainer=_mtp_model,
            work=work.mtp,
            # Maybe among the target's own layers, with the target's architectures.
            implied=lambda config: bool(config.get("num_nextn_predict_layers")),
            whole_vocabulary=True,
            vllm=True,
            sglang="NEXTN",
        ),
    )
}
#: Every known value of ``architectures``.
ARCHITECTURES: Final[Mapping[str, DraftType]] = {
    name: draft for draft in DRAFTS.values() for name in draft.architectures
}


def draft_type(config: Config) -> DraftType | None:
    """Return the type of draft that a config.json is of; None where it is of none here."""
    named = (config.get("architectures") or [None])[0]
    if named in ARCHITECTURES:
        return ARCHITECTURES[named]
    return next((draft for draft in DRAFTS.values() if draft.implied(config)), None)
