"""Apply, check and revert a patch series of SpecForge or SGLang (``PACKAGES``).

The series of a version is ``patches/<package>/<version>/``: a file ``series`` that names
``git format-patch`` files in order. An *installation* is what it is applied to: site-packages, an
unpacked wheel or a checkout of the package's repository.

How nothing is ever half done:

- The whole series is first applied by ``git apply`` (no fuzz, no three-way merge) to a copy of the
  files concerned. The installation is written only when every patch applied.
- ``.specforge-lk/`` in the package receives the original bytes, the new files and, last,
  ``manifest.json`` with the sha256 of every file before and after. Only then are the new files
  renamed over the old ones. The state of an installation is read from these hashes, not from a
  flag, so it is right after a crash at any point, kill -9 included, and both ``apply`` and
  ``revert`` recover from one. ``revert`` restores copies of the originals and removes the manifest
  last.
- ``apply`` and ``revert`` of one installation wait for each other.
- Renaming also leaves alone a package cache whose files pip or uv linked into the environment.

The RECORD of an installed wheel stays as it is, so ``revert`` gives back an identical tree. Hence
``pip uninstall`` of a patched install leaves the files that the series added and
``.specforge-lk/`` behind: revert first. ``pip install --force-reinstall`` needs only a new apply.
"""

from specforge_lk.patching.errors import (
    ForeignEditsError,
    GitError,
    InstallationError,
    PatchError,
    PatchFailedError,
    RefusedError,
    UnknownVersionError,
)
from specforge_lk.patching.installation import Installation, find_installation
from specforge_lk.patching.manifest import State
from specforge_lk.patching.series import (
    PACKAGES,
    SPECFORGE,
    SUPPORTED,
    Package,
    Patch,
    Series,
    git_apply,
    known_versions,
    load_series,
    series_root,
)
from specforge_lk.patching.transaction import (
    Applied,
    Change,
    Plan,
    Status,
    apply,
    plan,
    revert,
    status,
)

__all__ = [
    "PACKAGES",
    "SPECFORGE",
    "SUPPORTED",
    "Applied",
    "Change",
    "ForeignEditsError",
    "GitError",
    "Installation",
    "InstallationError",
    "Package",
    "Patch",
    "PatchError",
    "PatchFailedError",
    "Plan",
    "RefusedError",
    "Series",
    "State",
    "Status",
    "UnknownVersionError",
    "apply",
    "find_installation",
    "git_apply",
    "known_versions",
    "load_series",
    "plan",
    "revert",
    "series_root",
    "status",
]
