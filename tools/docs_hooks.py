"""What mkdocs does beyond docs/: pages from elsewhere in the repository, and links among them.

A page links to another page or to a file of the repository with a path relative to itself, as on
any forge. When the site is built, a link to a page becomes a link of the site, a link to another
file becomes its path, and a path that does not exist is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from specforge_lk.patching import PACKAGES, SUPPORTED, known_versions

ROOT: Final = Path(__file__).resolve().parents[1]
_SPECFORGE: Final = f"patches/specforge/{SUPPORTED['specforge']}"

#: Pages and pictures of the site that lie outside docs/, and where in the repository.
ELSEWHERE: Final = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "recipes.md": "configs/README.md",
    "examples/plugin_loss.md": "examples/plugin_loss/README.md",
    "examples/plugin_draft.md": "examples/plugin_draft/README.md",
    "patches/specforge.md": f"{_SPECFORGE}/README.md",
    "patches/migration.md": f"{_SPECFORGE}/MIGRATION.md",
    **{
        f"patches/sglang-{version}.md": f"patches/sglang/{version}/README.md"
        for version in known_versions(PACKAGES["sglang"])
    },
    "reports/benchmark.md": "benchmarks/results/summary.md",
    "reports/benchmark-how.md": "benchmarks/README.md",
    "reports/gpu.md": "benchmarks/results/gpu/README.md",
    "reports/time.png": "benchmarks/results/time.png",
    "reports/memory.png": "benchmarks/results/memory.png",
    "reports/defects.md": "tools/results/defects.md",
    "reports/upstream-tests.md": "tools/results/upstream-tests.md",
    **{
        f"reports/{name}": f"experiments/results/{name}"
        for name in (
            *(
                "demo.md",
                "algorithms.md",
                "paper.md",
                "serving.md",
                "agreement.md",
                "gains.md",
                "gains_served.md",
            ),
            *("demo.png", "algorithms.png", "paper.png", "gains.png"),
        )
    },
}

#: [text](path) or ![text](path), with an anchor or without; not a URL, not an anchor alone.
_LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside docs/."""
    for uri, source in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Resolve the page's relative links.

    Raises:
        PluginError: a link names a file that does not exist.
    """
    uri = page.file.src_uri
    return resolve(markdown, uri, ELSEWHERE.get(uri, f"docs/{uri}"))


def resolve(markdown: str, uri: str, source: str) -> str:
    """The markdown of ``source``, shown at ``uri``, with its links rewritten for the site.

    Raises:
        PluginError: a link names a file that does not exist.
    """
    shown = {path: name for name, path in ELSEWHERE.items()}

    def link(found: re.Match[str]) -> str:
        mark, text, path, anchor = found.groups(default="")
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / linked).exists():
            raise PluginError(f"{source}: [{text}]({path}) is not a file of the repository")
        page = shown.get(linked) or (linked[5:] if linked.startswith("docs/") else None)
        if page is None:
            name = text.strip("`")
            return f"`{linked}`" if name in (linked, path) else f"{text} (`{linked}`)"
        return f"{mark}[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"

    return _LINK.sub(link, markdown)
