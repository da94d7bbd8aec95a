"""How thoughts are marked in a text, whatever a target calls them: `<think>`, `[THINK]` and others.

What becomes of them is said by the rules in `specforge_lk.data.conversations`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from specforge_lk.data.rows import MalformedRow

_NAME = r"[\w:|]*(?:think|thought|reason)[\w:|]*"
_TAG = rf"(?P<open>[<\[])(?P<tag>{_NAME})[>\]]"
_CLOSE = r"[<\[]/(?P=tag)[>\]]"
#: A thought without a word, such as Qwen3's template inserts.
EMPTY = re.compile(rf"\s*{_TAG}\s*{_CLOSE}\s*", re.IGNORECASE)
#: The end of a prompt after which the target thinks, as in DeepSeek-R1.
OPENED = re.compile(rf"{_TAG}\s*\Z", re.IGNORECASE)
#: The end of a prompt that has thought already, so that the target is not to.
SKIPPED = re.compile(rf"{_TAG}\s*{_CLOSE}\s*\Z", re.IGNORECASE)
#: A whole thought.
WHOLE = re.compile(rf"{_TAG}.*{_CLOSE}", re.DOTALL)
_FIRST = re.compile(rf"\s*{_TAG}", re.IGNORECASE)
_END = re.compile(rf"(?P<open>[<\[])/(?P<tag>{_NAME})[>\]]", re.IGNORECASE)


def closing(opened: re.Match[str]) -> str:
    """Return a pattern of the tag that closes a thought."""
    close = ">" if opened["open"] == "<" else "]"
    return re.escape(f"{opened['open']}/{opened['tag']}{close}")


def begun(content: str) -> str | None:
    """Return the tag of the thought that an answer begins with, if any."""
    found = _FIRST.match(content)
    return found[0].strip() if found else None


def checked(content: str, prompt: str, finished: bool, mentions: Callable[[str], bool]) -> str:
    """Return an answer, without an empty thought that the prompt before it has, too.

    Args:
        content: the answer, after a prompt that opens no thought.
        prompt: the prompt.
        finished: whether the target ended the answer.
        mentions: whether the chat template knows a tag; others are text.

    Raises:
        MalformedRow: it has a thought that the target cannot have said after that prompt.
    """
    first, end = begun(content), _END.search(content)
    if SKIPPED.search(prompt):
        content = EMPTY.sub("", content, count=1) if first else content
        if (again := begun(content)) and mentions(again):
            raise MalformedRow(
                f"its answer has a thought, {again}, and the prompt says that the target is not to "
                "think; give the --chat-template-args that it was asked with"
            )
    elif first and not end and finished and mentions(first):
        raise MalformedRow(
            f"its answer opens a thought, {first}, that it does not close, so the target was cut "
            "there; give the row finished false"
        )
    elif end and f"{end['open']}{end['tag']}" not in content[: end.start()] and mentions(end[0]):
        raise MalformedRow(
            f"its answer ends a thought, {end[0]}, that neither it nor the prompt opens; put all "
            "that the target said into its content"
        )
    return content


__all__ = ["EMPTY", "OPENED", "WHOLE", "begun", "checked", "closing"]
