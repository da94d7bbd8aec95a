"""SpecForge's entry point to this package (group ``specforge.plugins``)."""

from typing import TYPE_CHECKING

from specforge_lk.losses import LOSSES

if TYPE_CHECKING:
    from specforge.plugins import Plugin


def create_plugin() -> "Plugin":
    """Return the plug-in with everything this package registers.

    Raises:
        ImportError: the installed SpecForge has no plug-in support (not patched).
    """
    try:
        from specforge.losses import LossRegistration
        from specforge.plugins import Plugin

        from specforge_lk.drafts.algorithms import ALGORITHMS
    except ImportError as error:
        from specforge_lk.patching import SUPPORTED

        raise ImportError(
            "specforge has no plug-in support: install "
            f"specforge=={SUPPORTED['specforge']} and run 'specforge-lk patch apply'"
        ) from error

    return Plugin(
        name="specforge-lk",
        api_version=1,
        algorithms=tuple(algorithm.registration() for algorithm in ALGORITHMS),
        drafts=tuple(algorithm.draft_registration() for algorithm in ALGORITHMS),
        losses=tuple(LossRegistration(**vars(loss)) for loss in LOSSES),
    )
