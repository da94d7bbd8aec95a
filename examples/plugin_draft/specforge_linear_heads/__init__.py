"""Linear heads as an algorithm of SpecForge: `training.strategy: linear_heads`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specforge.plugins import Plugin

from specforge_lk.drafts.algorithms import HeadAlgorithm

if TYPE_CHECKING:
    from specforge_lk.drafts.model import HeadDraftModel


def load() -> type[HeadDraftModel]:
    """Import the draft: only who trains with it does, not every command that looks for plug-ins."""
    from .model import LinearHeadsModel

    return LinearHeadsModel


ALGORITHM = HeadAlgorithm(name="linear_heads", architecture="LinearHeadsModel", load=load)


def create_plugin() -> Plugin:
    """Return the plug-in; the entry point in pyproject.toml names this function."""
    return Plugin(
        name="linear-heads",
        api_version=1,
        algorithms=(ALGORITHM.registration(),),
        drafts=(ALGORITHM.draft_registration(),),
    )
