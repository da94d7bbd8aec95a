"""The losses of the plug-in.

`specforge_lk.losses.per_position` has those of one draft position, `specforge_lk.losses.chain` the
one of a whole chain, `specforge_lk.losses.rule` the serving rule that all of them train for.
"""

from specforge_lk.losses.chain import Tau
from specforge_lk.losses.contract import ChainLoss, DraftLoss, Loss, Mean, Target, Terms
from specforge_lk.losses.options import (
    AlphaOptions,
    CommonOptions,
    KLOptions,
    LambdaOptions,
    NoOptions,
    Number,
    ReverseKLOptions,
    TauOptions,
)
from specforge_lk.losses.per_position import KL, TV, LKAlpha, LKLambda, ReverseKL
from specforge_lk.losses.records import LOSSES, LossRecord

__all__ = [
    "KL",
    "LOSSES",
    "TV",
    "AlphaOptions",
    "ChainLoss",
    "CommonOptions",
    "DraftLoss",
    "KLOptions",
    "LKAlpha",
    "LKLambda",
    "LambdaOptions",
    "Loss",
    "LossRecord",
    "Mean",
    "NoOptions",
    "Number",
    "ReverseKL",
    "ReverseKLOptions",
    "Target",
    "Tau",
    "TauOptions",
    "Terms",
]
