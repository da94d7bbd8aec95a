"""Linear heads as an algorithm of SpecForge: `training.strategy: linear_heads`."""

from __future__ import annotations

from specforge.plugins import Plugin

from specforge_lk.drafts.algorithms import HeadAlgorithm

ALGORITHM = HeadAlgorithm(
    name="linear_heads",
    architecture="LinearHeadsModel",
    # Imported by whoever trains with it, not by every command that looks for plug-ins.
    module="specforge_linear_heads.model",
)


def create_plugin() -> Plugin:
    """Return the plug-in; the entry point in pyproject.toml names this function."""
    return Plugin(
        name="linear-heads",
        api_version=1,
        algorithms=(ALGORITHM.registration(),),
        drafts=(ALGORITHM.draft_registration(),),
    )
