"""One examination, from folders to a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specforge_lk.data.conversations import Tokens
from specforge_lk.data.rows import LeftOut, MalformedRow
from specforge_lk.data.vocabulary import require_known
from specforge_lk.decode.checkpoint import DraftError, read_config
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.doctor import edits
from specforge_lk.doctor.case import Case, Features, Run
from specforge_lk.doctor.checks import CHECKS, examine
from specforge_lk.doctor.engine import Counts, observe
from specforge_lk.doctor.findings import (
    Cost,
    Expected,
    Finding,
    Outcome,
    Report,
    State,
    Weight,
)
from specforge_lk.doctor.measure import SERVED, Bench, Condition
from specforge_lk.doctor.reading import EAGLE, as_served, layers_of
from specforge_lk.drafts.table import DraftType
from specforge_lk.evaluate.report import versions
from specforge_lk.evaluate.responses import Chosen, Recorded, conversations_of, held_out_rows
from specforge_lk.serving import Sampling, Serving

#: K where neither the command nor the engine's counts nor the draft say it.
HEADS = 5
_LOADS = "loads"
_ENGINE = "the engine's counts"


@dataclass(frozen=True)
class Given:
    """What an examination was given beside target and draft.

    Attributes:
        rule: the serving rule.
        engine: ``vllm`` or ``sglang``; None when unknown.
        held_out: JSONL of the target's own responses.
        limit: how many of them to measure, from the file's start.
        sampled_by: what those were sampled by that do not say it.
        off_policy: measure along responses that are no samples of the rule.
        left_out: what becomes of rows that cannot be used.
        max_length: longest of them, in tokens; longer ones are left out.
        heads: drafted tokens per verification step, K.
        run, features, counts: see `Case` and `Counts`.
        tolerance: smallest cost that counts, in τ.
    """

    rule: Serving
    engine: str | None = None
    held_out: str | None = None
    limit: int = 32
    sampled_by: Sampling | None = None
    off_policy: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)
    max_length: int = 2048
    heads: int | None = None
    run: Run | None = None
    features: Features | None = None
    counts: Counts | None = None
    tolerance: float = 0.01


def diagnose(
    target: Target,
    target_name: str,
    dtype: str,
    path: Path,
    given: Given,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compare how a draft was trained with how it will be served.

    Args:
        target: the target.
        target_name: as it was given.
        dtype: name of the dtype that the target was loaded, and will be served, in.
        path: the exported draft's folder.
        given: see `Given`.
        progress: called with what is about to be checked or measured.

    Raises:
        DraftError: the folder is no draft at all.
        ValueError: an input cannot be used; the message says what to change.
    """
    config, kind = read_config(path)
    report = Report(
        target_name,
        str(path),
        kind.name,
        str(given.rule),
        given.engine,
        given.heads or HEADS,
        given.tolerance,
        (),
        None,
        None,
        versions(),
    )
    try:
        draft, base = _load(path, config, kind, target, given.engine)
    except DraftError as error:
        return replace(report, outcomes=_unloaded(error))
    heads = _heads(given, draft)
    served = as_served(given.engine, kind, config, target)
    served = Condition(config=base.config, edits=served.edits or base.edits)
    case = Case(
        target, dtype, path, config, kind, draft, served, given.rule, given.engine,
        run=given.run, features=given.features, tolerance=given.tolerance,
    )  # fmt: skip
    for number, (ids, _) in enumerate(given.features.samples if given.features else ()):
        try:
            require_known(ids, target.vocab_size)
        except MalformedRow as error:
            raise ValueError(f"--features: sample {number}: {error}") from error
    caveat = ""
    if given.held_out:
        case.rows, tokens, caveat = _responses(target, target_name, given)
        report = replace(report, malformed_rows_left_out=len(given.left_out.left_out))
        case.bench = Bench(target, path, {SERVED: tokens}, given.rule, heads, progress)
    outcomes = [Outcome(_LOADS, State.OK)]
    for check in CHECKS:
        progress(check.name)
        outcomes.append(examine(case, check))
    expected = _expected(case, caveat)
    observed = observe(given.counts, expected) if given.counts else None
    outcomes.append(_engine(given.counts, expected, observed.within if observed else None, heads))
    return replace(
        report, heads=heads, outcomes=tuple(outcomes), expected=expected, observed=observed
    )


def _load(
    path: Path, config: dict[str, Any], kind: DraftType, target: Target, engine: str | None
) -> tuple[Draft, Condition]:
    """Load a draft; where its two namings of layers contradict one another, by the engine's."""
    try:
        return load_draft(path, target), Condition()
    except DraftError:
        eagle = config.get("eagle_config") or {}
        ours = eagle.get("eagle_aux_hidden_state_layer_ids")
        if kind.name not in EAGLE or not (ours and "eagle_aux_hidden_state_layer_ids" in config):
            raise
        layers = layers_of(engine or "sglang", config, target)
        removed = {**eagle, "layer_ids": None}
        condition = Condition().having(eagle_aux_hidden_state_layer_ids=None, eagle_config=removed)
        return load_draft(path, target, layers), condition.but(edits.layers(layers))


def _unloaded(error: DraftError) -> tuple[Outcome, ...]:
    finding = Finding(
        "the draft does not load",
        "a draft that fits itself and its target",
        str(error),
        str(error).rpartition("; ")[2],
        Weight.UNKNOWN,
        caveat="nothing can be measured before it loads",
    )
    rest = (Outcome(check.name, State.NOT_CHECKED, "the draft does not load") for check in CHECKS)
    return Outcome(_LOADS, State.FOUND, findings=(finding,)), *rest


def _heads(given: Given, draft: Draft) -> int:
    """Return K: as given, as the engine counted, or the default, within what the draft can."""
    counted = given.counts.heads if given.counts else None
    wanted = given.heads or counted or HEADS
    if draft.max_heads is None or wanted <= draft.max_heads:
        return wanted
    if given.heads:
        raise ValueError(f"--heads {wanted}: this draft proposes {draft.max_heads} tokens at most")
    return draft.max_heads


def _responses(
    target: Target, target_name: str, given: Given
) -> tuple[list[dict[str, Any]], list[Tokens], str]:
    """Return rows, tokens and what to keep in mind of the held-out responses.

    Raises:
        ValueError: they are no samples of the rule, or none is usable.
    """
    assert given.held_out is not None
    recorded = Recorded.of(
        held_out_rows([given.held_out], target.chat, target.vocab_size, given.left_out),
        sampled_by=given.sampled_by,
        off_policy=given.off_policy,
        remedy=f"specforge-lk generate --target {target_name} {{options}} --prompts PROMPTS.jsonl "
        "--out FILE.jsonl",
    )
    chosen = recorded.along(given.rule, given.limit)
    rows, found, longest = [], [], 0
    for row in chosen.rows:
        samples = conversations_of(Chosen([row]), target)
        fitting = [
            tokens
            for tokens in samples
            if len(tokens.input_ids) <= given.max_length and sum(tokens.loss_mask) > 1
        ]
        longest = max(longest, *(sum(tokens.loss_mask) for tokens in samples))
        if fitting:
            rows.append(row)
            found += fitting
    if not found:
        raise ValueError(
            f"{given.held_out}: no response of two tokens or more within --max-length "
            f"{given.max_length}, prompt included, and the longest has {longest} without it; "
            "raise --max-length, or give longer responses"
        )
    caveats = list(recorded.notes)
    if chosen.off_policy:
        caveats.append(f"the responses are samples of another rule: {chosen.off_policy}")
    return rows, found, "; ".join(caveats)


def _expected(case: Case, caveat: str) -> Expected | None:
    if case.bench is None:
        return None
    measured = case.bench.measure(case.served)
    count, tokens = len(measured.tokens), int(measured.tokens.sum())
    return Expected(measured.tau, measured.interval, count, tokens, caveat)


def _engine(
    counts: Counts | None, expected: Expected | None, within: bool | None, heads: int
) -> Outcome:
    """Compare the engine's τ with the expected one."""
    if counts is None:
        return Outcome(_ENGINE, State.NOT_CHECKED, "give --accepted or --metrics")
    if expected is None:
        return Outcome(_ENGINE, State.NOT_CHECKED, "give --held-out")
    if counts.heads is not None and counts.heads != heads:
        note = f"the engine drafts {counts.heads} tokens, --heads is {heads}"
        return Outcome(_ENGINE, State.NOT_CHECKED, note)
    if within:
        return Outcome(_ENGINE, State.OK, "within the interval")
    lower = counts.tau < expected.tau
    gap = expected.tau - counts.tau
    error = counts.standard_error or 0.0
    low, high = (expected.interval[0] - expected.tau), (expected.interval[1] - expected.tau)
    finding = Finding(
        f"the engine accepts {'less' if lower else 'more'} than this draft should",
        f"τ {expected.tau:.3f} expected",
        f"τ {counts.tau:.3f} counted",
        "compare the engine's prompts with the held-out ones; on the same prompts something "
        "differs that no check above names: its rule, its version, another export",
        Weight.COSTS if lower else Weight.HARMLESS,
        Cost(gap, (gap + low - 2 * error, gap + high + 2 * error), expected.tau, counts.tau),
        "the engine's requests may be of another kind than the held-out responses",
    )
    return Outcome(_ENGINE, State.FOUND, findings=(finding,))


__all__ = ["HEADS", "Given", "diagnose"]
