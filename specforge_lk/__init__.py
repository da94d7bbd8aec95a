"""LK losses for SpecForge: draft models trained on the acceptance rate itself."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["OverlapTerms", "Projection", "__version__", "linear_overlap", "overlap_terms"]

if TYPE_CHECKING:
    from specforge_lk.overlap import OverlapTerms, Projection, linear_overlap, overlap_terms


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `specforge-lk patch` does not need it.
    if name in __all__:
        from specforge_lk import overlap

        return getattr(overlap, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
