"""Run configs of SpecForge: read, and refused with file, field, value and remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Sections of which a run config has at least one.
_SECTIONS = ("model", "data", "training")
#: Most keys that a message names.
_NAMED = 3


def read_sections(path: Path) -> dict[str, Any]:
    """Read a run config as it is written: YAML where its name says so, or else JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no run config; the message says what it is, and what to give.
    """
    where = f"--config {path}"
    if path.is_dir():
        raise ValueError(f"{where} is a folder; give the run config that is in it")
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist; give a run config, YAML or JSON")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text in UTF-8; give a run config, YAML or JSON") from None
    found = _parsed(text, where, as_yaml=path.suffix in (".yaml", ".yml"))
    if not isinstance(found, dict) or not set(_SECTIONS) & set(found):
        held = f"keys {_some(found)}" if isinstance(found, dict) else repr(str(found)[:40])
        raise ValueError(
            f"{where} is no run config: it has {held}, and none of the sections "
            f"{', '.join(_SECTIONS)}; give the file that specforge train takes"
        )
    for name in _SECTIONS:
        if not isinstance(found.get(name), dict | None):
            raise ValueError(
                f"{where}: {name} must be a section of settings, got {str(found[name])[:40]!r}"
            )
    return found


def _parsed(text: str, where: str, *, as_yaml: bool) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if as_yaml else json.loads(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = f"{getattr(error, 'problem', None) or 'it cannot be read'}{place}"
        raise ValueError(f"{where} is not YAML ({reason}); mend it") from error
    except (ValueError, RecursionError) as error:
        remedy = "give a run config, which is named .yaml if it is YAML"
        raise ValueError(f"{where} is not JSON ({error}); {remedy}") from error


def load_run(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Return SpecForge's ``Config`` of a run config with overrides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no run config, or SpecForge refuses it.
    """
    from specforge.config import load_config

    read_sections(path)
    return load_config(str(path), list(overrides))


def _some(names: Any) -> str:
    shown = ", ".join(str(name)[:40] for name in list(names)[:_NAMED])
    return f"{shown}, …" if len(names) > _NAMED else shown


__all__ = ["load_run", "read_sections"]
