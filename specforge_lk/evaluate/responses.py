"""Which recorded responses a serving rule is measured along: samples of the target under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specforge_lk.data.conversations import Chat, Tokens
from specforge_lk.data.prompts import DataError, placed_rows
from specforge_lk.data.responses import sampling_of
from specforge_lk.data.rows import LeftOut, usable_rows
from specforge_lk.data.vocabulary import require_known
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.settings import fingerprint
from specforge_lk.serving import Sampling, Serving

Row = dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """Responses to measure along.

    Attributes:
        rows: their rows.
        off_policy: what they were sampled by where that is not the rule's; None where it is.
    """

    rows: list[Row]
    off_policy: str | None = None

    @property
    def identity(self) -> str:
        """What tells these responses from others."""
        return fingerprint(self.rows, self.off_policy)


@dataclass(frozen=True)
class Recorded:
    """Responses by what they were sampled by.

    Attributes:
        by_sampling: the rows; those that do not say are at None.
        off_policy: measure any rule along all of them.
        remedy: the command that makes others, with ``{options}`` for how they are sampled.
        notes: what a user should hear.
    """

    by_sampling: Mapping[Sampling | None, list[Row]]
    off_policy: bool
    remedy: str
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        *,
        sampled_by: Sampling | None,
        off_policy: bool,
        remedy: str,
    ) -> Recorded:
        """Sort rows.

        Args:
            rows: rows of conversations.
            sampled_by: what those were sampled by that do not say it.
            off_policy: see the class.
            remedy: see the class.

        Raises:
            ValueError: what a row says cannot be read.
        """
        found: dict[Sampling | None, list[Row]] = {}
        said = [sampling_of(row) for row in rows]
        for row, sampling in zip(rows, said, strict=True):
            found.setdefault(sampling or sampled_by, []).append(row)
        notes: tuple[str, ...] = ()
        if sampled_by is not None and rows and None not in said:
            notes = ("--sampled-by has no effect: every held-out response says what it is of",)
        return cls(found, off_policy, remedy, notes)

    @property
    def samplings(self) -> list[Sampling]:
        """What responses were sampled by, as far as is known."""
        return [sampling for sampling in self.by_sampling if sampling is not None]

    def along(self, rule: Serving, limit: int | None) -> Chosen:
        """Return the first responses to measure a rule along.

        Raises:
            DataError: no response is known to be a sample of the rule.
        """
        fitting = self.by_sampling.get(rule.target)
        if fitting:
            return Chosen(fitting[:limit])
        known = [str(sampling or "unknown") for sampling in self.by_sampling]
        if self.off_policy:
            every = [row for rows in self.by_sampling.values() for row in rows]
            return Chosen(every[:limit], "; ".join(known))
        options = " ".join(
            f"--{name.replace('_', '-')} {value}"
            for name, _, value in (part.partition("=") for part in str(rule.target).split(","))
        )
        unknown = ""
        if None in self.by_sampling:
            unknown = (
                f" Row {self.by_sampling[None][0].get('id')!r} does not say how it was sampled; if "
                f"you know, say it with --sampled-by {rule.target}."
            )
        raise DataError(
            f"no held-out response is a sample of {rule.target}: what is known of their sampling "
            f"is {', '.join(known)}.{unknown} Make some with `"
            + self.remedy.format(options=options)
            + "` and give that file as another --held-out; or measure along these with "
            "--off-policy, which the report will say"
        )


def held_out_rows(
    paths: Sequence[str], chat: Chat, vocab_size: int, malformed: LeftOut
) -> list[Row]:
    """Read held-out responses, all of which `conversations_of` can tokenize.

    Args:
        paths: JSONL of conversations.
        chat: the target's chat template.
        vocab_size: size of the target vocabulary.
        malformed: what becomes of other rows.

    Raises:
        DataError: there is no such file, or no row.
        ValueError: a row cannot be used, or too many of them.
    """

    def read(row: Row) -> None:
        sampling_of(row)
        for tokens in chat.tokenize(row, sampled_only=True):
            require_known(tokens.input_ids, vocab_size)

    found = []
    for path in paths:
        rows = iter(placed_rows(path, malformed))
        found += [row for _, row, _ in usable_rows(rows, read, malformed)]
    malformed.check(", ".join(paths))
    return found


def conversations_of(chosen: Chosen, target: Target) -> list[Tokens]:
    """Tokenize conversations; the samples of a row follow one another.

    Where a row has the tokens that were sampled, these are its response: what its earlier messages
    were sampled by it does not say. In other rows every message of the assistant is a response.
    """
    chat = target.chat
    return [tokens for row in chosen.rows for tokens in chat.tokenize(row, sampled_only=True)]


__all__ = ["Chosen", "Recorded", "conversations_of", "held_out_rows"]
