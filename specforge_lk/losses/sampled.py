"""Whether a run's responses are samples of the rule that its loss trains for."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from specforge_lk.losses.options import ServingOptions
from specforge_lk.serving import Sampling

#: Rows of a streamed run's file that are read: it may have 10^6.
ROWS: Final = 1000


def check_sampling(options: ServingOptions, config: Any) -> None:
    """Warn where the responses were sampled by another rule than the loss's, or by one unknown.

    Recorded tokens stand for what the target will generate: in the chances to get past them, and as
    the contexts that the draft is trained in.

    Args:
        options: a loss's options.
        config: SpecForge's run config.

    Raises:
        ValueError: what the data say of their sampling cannot be read.
    """
    rule, data = options.rule, config.data
    place = Path(data.hidden_states_path or data.prompts_path or data.train_data_path)
    if not place.exists():
        return  # `capture` plans the run, too, before it makes them
    offline = bool(data.hidden_states_path)
    found = set((_of_features if offline else _of_rows)(place))
    known = sorted(str(sampling) for sampling in found if sampling is not None)
    others = [sampling for sampling in known if sampling != str(rule.target)]
    remedy = (
        f"`specforge-lk generate --target {config.model.target_model_path} --serving {rule} "
        "--prompts PROMPTS.jsonl --out RESPONSES.jsonl` makes responses that fit"
        + (", `specforge-lk capture` features of them" if offline else "")
    )
    if others:
        warnings.warn(
            f"training.loss_options.serving={rule} is for responses sampled at {rule.target}, and "
            f"{place} has some that were sampled at {'; '.join(others)}. {remedy}",
            stacklevel=2,
        )
    elif None in found or not found:
        warnings.warn(
            f"{place} does not say of all responses what they were sampled by; "
            f"training.loss_options.serving={rule} is for {rule.target}. If they were sampled "
            f"otherwise, {remedy}",
            stacklevel=2,
        )


def _of_features(folder: Path) -> Iterable[Sampling | None]:
    """Yield what `specforge-lk capture` wrote; nothing where it did not."""
    from specforge_lk.data.capture import MANIFEST

    path = folder / MANIFEST
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8")).get("sampling", [])
    return _read({"id": str(path), "sampling": row} for row in rows)


def _of_rows(path: Path) -> Iterable[Sampling | None]:
    """Yield what the first rows of a file say."""
    from specforge_lk.data.jsonl import read_jsonl

    return _read(itertools.islice(read_jsonl(path), ROWS))


def _read(rows: Iterable[dict[str, Any]]) -> Iterable[Sampling | None]:
    from specforge_lk.data.responses import sampling_of

    return map(sampling_of, rows)
