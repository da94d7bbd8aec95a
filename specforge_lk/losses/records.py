"""The losses as SpecForge registers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from specforge_lk.losses.chain import Tau
from specforge_lk.losses.options import (
    AlphaOptions,
    CommonOptions,
    KLOptions,
    LambdaOptions,
    ReverseKLOptions,
    TauOptions,
)
from specforge_lk.losses.per_position import KL, TV, LKAlpha, LKLambda, ReverseKL
from specforge_lk.losses.sampled import check_sampling


@dataclass(frozen=True)
class LossRecord:
    """A loss as SpecForge's ``LossRegistration`` has it, without importing SpecForge.

    Attributes:
        name: what ``training.loss`` names.
        options: model of ``training.loss_options``, with a description of every option.
        build: makes the loss, a `DraftLoss` or a `ChainLoss`, from its options; the first line of
            its docstring says what it is.
        algorithm_defaults: defaults that differ, by algorithm and option.
        check: looks at the options and the run's config when the run is planned; may warn, or raise
            ValueError.
    """

    name: str
    options: type[BaseModel]
    build: Callable[[Any], Any]
    algorithm_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Callable[[Any, Any], None] | None = check_sampling


#: The paper's rate for MEDUSA.
_ETA: Final = {"medusa": {"eta": 10.0}}

LOSSES: Final = (
    LossRecord("kl", KLOptions, KL),
    LossRecord("tv", CommonOptions, TV),
    LossRecord("lk_alpha", AlphaOptions, LKAlpha),
    LossRecord("lk_lambda", LambdaOptions, LKLambda, _ETA),
    LossRecord("tau", TauOptions, Tau),
    LossRecord("reverse_kl", ReverseKLOptions, ReverseKL),
)
