"""Expected failures; every message names the file or the value, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable


class PatchError(Exception):
    """An expected failure; the message names the file or value and the remedy."""


class InstallationError(PatchError):
    """No package of a known version where it was looked for."""


class UnknownVersionError(InstallationError):
    """There is no patch series for the installation's version."""


class GitError(PatchError):
    """``git`` cannot be run."""


class RefusedError(PatchError):
    """The installation cannot be patched or reverted as it is; nothing was written."""


class ForeignEditsError(RefusedError):
    """``files`` hold edits that neither the package nor the series made."""

    def __init__(self, files: Iterable[str], remedy: str) -> None:
        self.files = tuple(files)
        super().__init__(f"foreign edits in {', '.join(self.files)}: {remedy}")


class PatchFailedError(RefusedError):
    """A patch does not apply; ``reason`` is what git said."""

    def __init__(self, patch: str, reason: str) -> None:
        self.patch, self.reason = patch, reason
        super().__init__(f"{patch} does not apply: {reason}")
