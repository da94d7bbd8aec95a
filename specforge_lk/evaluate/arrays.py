"""Arrays of one measurement, kept in a file beside the report, from which drafts are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np

from specforge_lk.files import atomic_write


@dataclass(frozen=True)
class Arrays:
    """Base of dataclasses whose fields are all arrays."""

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file, whole or not at all."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read arrays written by `save`.

        Raises:
            ValueError: the file is damaged, or of another version.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in arrays.files})
        except (ValueError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} holds no arrays of this version ({error}); delete it, and run the same "
                "command again: what it held is measured anew"
            ) from error


__all__ = ["Arrays"]
