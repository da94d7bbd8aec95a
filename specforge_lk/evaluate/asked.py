"""What an evaluation is asked to measure, and the reading of it before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specforge_lk.data.jsonl import MOST_LEFT_OUT, RowError
from specforge_lk.data.prompts import HUB_PREFIX, DataError, placed_rows, user_turns
from specforge_lk.data.rows import LeftOut
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.report import HELD_OUT
from specforge_lk.evaluate.responses import Recorded, held_out_rows
from specforge_lk.evaluate.settings import Settings, digest
from specforge_lk.serving import Sampling, Serving


@dataclass(frozen=True)
class Benchmark:
    """Prompts to answer.

    Attributes:
        name: the benchmark's name.
        prompts: user turns of every prompt.
        identity: what tells its content from another.
    """

    name: str
    prompts: list[list[str]]
    identity: str

    @classmethod
    def read(
        cls, name: str, path: str, limit: int | None, malformed: LeftOut | None = None
    ) -> Benchmark:
        """Read the first rows of a JSONL file or of a dataset of the hub."""
        malformed = malformed or LeftOut()
        prompts = []
        for place, row in placed_rows(path, malformed)[:limit]:
            try:
                prompts.append(user_turns(row, str(place)))
            except DataError as error:
                malformed.refuse(RowError(str(error)))
            else:
                malformed.rows += 1
        malformed.check(path)
        return cls(name, prompts, path if path.startswith(HUB_PREFIX) else digest(path))


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked to measure.

    Attributes:
        benchmarks: name -> JSONL file or ``hub:…``.
        held_out: JSONL files of conversations.
        rules: serving rules; None for those that the held-out responses are samples of, or
            without such responses for temperature 0 and 1.
        sampled: decode the benchmarks with every draft, too.
        sampled_by: what held-out responses were sampled by that do not say it.
        off_policy: measure along held-out responses that are no samples of a rule.
        skip_malformed: leave out rows that cannot be used.
        max_left_out: largest share of a source's rows that may be left out.
        left_out: gets what was wrong with the rows of every source that were left out.
        notes: gets what else a user should hear.
    """

    benchmarks: Mapping[str, str]
    held_out: Sequence[str] = ()
    rules: Sequence[Serving] | None = None
    sampled: bool = False
    sampled_by: Sampling | None = None
    off_policy: bool = False
    skip_malformed: bool = False
    max_left_out: float = MOST_LEFT_OUT
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """All that is measured along.

    Attributes:
        benchmarks: prompts to answer.
        recorded: held-out responses.
        rules: the serving rules to measure.
    """

    benchmarks: list[Benchmark]
    recorded: Recorded
    rules: list[Serving]


def read(asked: Asked, target: Target, target_path: str, settings: Settings) -> Material:
    """Read everything asked for, and put what was left out of it into ``asked.left_out``.

    Raises:
        ValueError: a row or a file cannot be used, or responses do not say what they are samples
            of.
    """
    left_out = {
        name: LeftOut(asked.skip_malformed, asked.max_left_out)
        for name in (*asked.benchmarks, HELD_OUT)
    }
    benchmarks = [
        Benchmark.read(name, path, settings.limit, left_out[name])
        for name, path in asked.benchmarks.items()
    ]
    rows = []
    if asked.held_out:
        rows = held_out_rows(asked.held_out, target.chat, target.vocab_size, left_out[HELD_OUT])
    recorded = Recorded.of(
        rows,
        sampled_by=asked.sampled_by,
        off_policy=asked.off_policy,
        remedy=f"specforge-lk generate --target {target_path} {{options}} --prompts PROMPTS.jsonl "
        "--out FILE.jsonl",
    )
    asked.notes.extend(recorded.notes)
    asked.left_out.update({name: of.left_out for name, of in left_out.items() if of.left_out})
    rules = list(dict.fromkeys(asked.rules or _default_rules(asked, recorded)))
    return Material(benchmarks, recorded, rules)


def _default_rules(asked: Asked, recorded: Recorded) -> list[Serving]:
    """Return the rules to measure where none is given."""
    if not asked.held_out:
        return [Serving(0.0), Serving(1.0)]
    if None in recorded.by_sampling:
        raise DataError(
            f"{len(recorded.by_sampling[None])} held-out responses do not say how they were "
            "sampled, as those of older files; say it with --sampled-by temperature=1, or name the "
            "rules with --serving and give --off-policy"
        )
    return [Serving(s.temperature, s.top_k, s.top_p) for s in recorded.samplings]


__all__ = ["Asked", "Benchmark", "Material", "read"]
