"""The one place that knows how a conversation becomes tokens and a mask.

`capture`, `data`, `generate`, `eval`, `doctor` and streamed runs all go by these rules:

| of a row | is read, or what becomes of it |
|---|---|
| messages | from `conversations` or `messages`, a list or its JSON, with `role` and `content`, or with `from` and `value`, after the system turn of a field `system`; roles in any order that the chat template takes; fields that mean the same and differ are refused |
| content | text; parts of type `text` are joined, others refused; null only beside `tool_calls` or thoughts; rows and messages with images, audio or video are refused |
| `tools`, `tool_calls` | given to the chat template as engines do, arguments as objects, and so are `functions` and `function_call`; calls of an answer that the template does not show are refused, and those that stand in the content, too, or whose arguments are no JSON that can be written again |
| prompt of an answer | the chat template's tokens of all messages before it, with the generation prompt and `--chat-template-args`: those that a server is sent |
| answer, supervised | `response_ids`, the sampled tokens of the last message; otherwise what the target said: the content as it stands, after what the template writes before it (gpt-oss: a channel), its tokens apart from the prompt's where the two would merge |
| thoughts | of `reasoning_content`, `reasoning` or `thinking` as the template shows them, or in the content; an empty thought that the template inserts is not supervised, and a thought that the prompt opens must be closed by the answer; one that the answer opens, too, unless it was cut there; what the prompt has is not said again; thoughts that a finished answer ends with, and those beside the messages, are refused; where the template shows them nowhere they are refused, since how the target said them is not known: they belong into the content, or are another model's and go |
| end of an answer | the first of the generation config's `eos_token_id`, the tokenizer's, or the template's end of a turn; it is supervised, and nothing after it |
| `finished: false`, `truncated: true`, or a `finish_reason` (`done_reason`, `stop_reason`) such as "length", "abort" or a stop string | no end is supervised; reasons that are not known are refused |
| several answers | one sample as long as every prompt continues it; a new sample where the template changes earlier turns |
| `weight: 0`, `train: false` (also `training`, `trainable`, `loss`) | of a message or of the row: the answer is read, and not supervised; other weights, `train_detail` and `mask` are refused |
| not supervised | all other roles, and what an assistant says before anyone asked |
| `chat_template_args`, `chat_template_kwargs` | what a response was sampled with, or a prompt is to be: another `--chat-template-args` is refused |
| left out, counted | with `--skip-malformed` rows that break a rule or that the template refuses; more than `--max-left-out` of the rows end the command |

Rows written by ``specforge-lk generate`` have ``response_ids`` because text does not give tokens
back: at temperature 1 a model often samples another token sequence than its tokenizer makes of
the same text, and training on the latter would not be on-policy.
"""  # noqa: E501

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from specforge_lk.data import thoughts
from specforge_lk.data.chat_template import ChatTemplate, as_option
from specforge_lk.data.messages import (
    THOUGHTS,
    Message,
    answer_ended,
    messages_in,
    sampled_ids,
)
from specforge_lk.data.rows import MalformedRow, agreed
from specforge_lk.data.tool_calls import marked, tools_in

#: Stands for an answer, to see what the chat template writes around one.
_MARK = "xqzAnswerzqx"
_CONTROL_TOKEN = re.compile(r"<\|[^|<>]+\|>")
#: What a text may have more or less of than its tokens: spaces, and halves of characters.
_VAGUE = re.compile(r"[\s\ufffd]")
#: Fields of a row with the arguments that the chat template had; engines call them kwargs.
_RECORDED = ("chat_template_args", "chat_template_kwargs")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sample, as the target reads it.

    Attributes:
        input_ids: [L] token ids.
        loss_mask: [L] 1 on assistant tokens, the end-of-turn token included, else 0.
    """

    input_ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class _Frame:
    """What a chat template writes around an answer.

    Attributes:
        before: after the prompt, before the content: the target says it, too.
        thought: whether an empty thought was taken out of that.
        after: after the content.
        end: the token of ``after`` that ends the turn; None where there is none.
    """

    before: str
    thought: bool
    after: str
    end: int | None


@dataclass(frozen=True)
class Chat:
    """A target's chat template and tokenizer: conversations to tokens, by the rules above.

    Attributes:
        tokenizer: The target's tokenizer.
        eos_ids: The tokens at which generation stops, see `specforge_lk.target.eos_ids`.
        arguments: Further arguments of the chat template, such as ``enable_thinking``.
        notes: What a user should hear of, with the number of answers that it was found in.

    Raises:
        ValueError: an argument is none that the chat template reads.
    """

    tokenizer: Any
    eos_ids: Collection[int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter, compare=False)

    def __post_init__(self) -> None:
        _ = self._template

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.arguments)

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of messages, up to where the assistant's answer begins.

        Raises:
            MalformedRow: the chat template refuses them.
        """
        return self._template.prompt_ids(messages, tools)

    def changed_by_arguments(self, messages: Sequence[Message], tools: Any = None) -> bool:
        """Return whether the prompt has other tokens without the arguments."""
        plain = Chat(self.tokenizer, self.eos_ids)
        return bool(self.arguments) and (
            plain.prompt_ids(messages, tools) != self.prompt_ids(messages, tools)
        )

    def tokenize(self, row: Mapping[str, Any], *, sampled_only: bool = False) -> list[Tokens]:
        """Return the samples of a row, at least one, and mark what the assistant said.

        Args:
            row: A conversation.
            sampled_only: Of a row with ``response_ids``, supervise them and nothing else: what
                its earlier messages were sampled by it does not say.

        Raises:
            MalformedRow: the row breaks a rule of the module, or the chat template refuses it.
            ValueError: it was sampled with other arguments of the chat template.
        """
        check_recorded(row, self.arguments)
        messages, tools = messages_in(row), tools_in(row)
        sampled = sampled_ids(row)
        answers = _answers(messages, sampled is not None)
        if not answers:
            roles = ", ".join(message["role"] for message in messages)
            raise MalformedRow(
                "no message of it is an assistant's answer: nothing to train on; its roles are "
                f"{roles}; the role of answers must be assistant"
            )
        if sampled is not None and answers[-1] != len(messages) - 1:
            raise MalformedRow("it has response_ids, but its last message is not the assistant's")
        if answers[0] != next(i for i, m in enumerate(messages) if m["role"] == "assistant"):
            self.notes["greetings before anyone asked, not supervised"] += 1
        last = answers[-1]
        if sampled is not None and sampled_only:
            answers = [last]
        answers = [i for i in answers if messages[i].get("weight") != 0]
        if not answers:
            raise MalformedRow(
                "nothing of it is trained on: its answers have weight 0, or train false; remove "
                "the row, or that field of an answer"
            )
        if sampled is not None:
            self._compare(sampled, messages[-1])
        samples: list[Tokens] = []
        ids: list[int] = []
        mask: list[int] = []
        for index in answers:
            prompt = self.prompt_ids(messages[:index], tools)
            if index < len(messages) - 1 or sampled is None:
                finished = answer_ended(row if index == last else {}, messages[index])
                response = self._said(messages[: index + 1], tools, prompt, finished)
            else:
                response = self._until_end(sampled)
            if prompt[: len(ids)] != ids:
                samples.append(Tokens(ids, mask))
                ids, mask = [], []
            mask = mask + [0] * (len(prompt) - len(ids)) + [1] * len(response)
            ids = prompt + response
        return [*samples, Tokens(ids, mask)]

    def _compare(self, sampled: list[int], message: Message) -> None:
        """Note tokens that are not those of the text: of another target, perhaps.

        A server leaves out control tokens and spaces, and what it parsed into other fields.
        """
        told = _VAGUE.sub("", message["content"])
        with suppress(IndexError, OverflowError, TypeError):  # ids outside are refused by name
            decoded = (self.tokenizer.decode(sampled, skip_special_tokens=s) for s in (True, False))
            if not any(told in _VAGUE.sub("", text) for text in decoded):
                self.notes[
                    "answers with response_ids that are not the text beside them: were they "
                    "sampled with this tokenizer? The tokens are supervised"
                ] += 1

    @cached_property
    def _ends(self) -> set[int]:
        return {i for i in (*self.eos_ids, self.tokenizer.eos_token_id) if i is not None}

    def _until_end(self, ids: list[int], more: int | None = None) -> list[int]:
        """Return ids up to the first that ends an answer, that one included."""
        ends = self._ends | ({more} if more is not None else set())
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return ids[: end + 1]

    def _said(
        self, messages: list[Message], tools: Any, prompt_ids: list[int], finished: bool
    ) -> list[int]:
        """Return the tokens of the last message as the target said it, its end included."""
        *earlier, message = messages
        prompt = self._template.text(earlier, tools, prompt=True)
        frame = self._frame(earlier, tools, prompt)
        plain = not message.get("tool_calls") and not any(message.get(key) for key in THOUGHTS)
        if plain:
            said, turn_ended = self._content(message["content"], prompt, frame, finished), True
        else:
            said, turn_ended = self._shown(messages, tools, prompt, frame, finished)
        response = self._template.continued(prompt, prompt_ids, said)
        stopped = self._until_end(response, frame.end)
        ends = {*self._ends, frame.end}
        if stopped and stopped[-1] in ends:
            return stopped if finished else stopped[:-1]
        if finished and turn_ended and frame.end is not None:
            return [*response, frame.end]
        if finished:
            self.notes["answers to which the chat template writes no end-of-turn token"] += 1
        return response

    def _frame(self, earlier: list[Message], tools: Any, prompt: str) -> _Frame:
        """Find what the template writes around an answer, by rendering one that is known."""
        shown = self._template.text([*earlier, {"role": "assistant", "content": _MARK}], tools)
        before, found, after = shown.partition(_MARK)
        if not found:
            raise MalformedRow(
                "the chat template shows no answer of the assistant; save the target's own with "
                "its tokenizer"
            )
        if not before.startswith(prompt) and not prompt.startswith(before):
            raise MalformedRow(
                "the chat template renders the assistant's turn differently from the prompt that "
                "asks for it; give the rows response_ids, as specforge-lk generate does"
            )
        opening = before[len(prompt) :]
        if opened := thoughts.OPENED.search(prompt):
            closing = re.compile(rf"\A\s*{thoughts.closing(opened)}\s*", re.IGNORECASE)
            thoughtless = closing.sub("", opening)
        else:
            thoughtless = thoughts.EMPTY.sub("", opening)
        tokens = self._template.encode(after)
        controls = {*self._ends, *self._controls}
        first = next((t for t in tokens if t in self._ends), None)
        if first is None:
            first = next((t for t in tokens[:1] if t in controls), None)
        return _Frame(thoughtless, thoughtless != opening, after, first)

    @cached_property
    def _controls(self) -> set[int]:
        """Special tokens: what a template may end a turn with."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {token for token, content in added.items() if getattr(content, "special", False)}
        return {*self.tokenizer.all_special_ids, *special}

    def _content(self, content: str, prompt: str, frame: _Frame, finished: bool) -> str:
        """Return the text of a plain answer: what the template writes before it, and itself."""
        opened = thoughts.OPENED.search(prompt)
        if opened:
            # Some rows repeat what the prompt has said.
            again = re.compile(rf"\A\s*{re.escape(opened[0].strip())}", re.IGNORECASE)
            if content.startswith(opened[0]):
                content = content[len(opened[0]) :]
            else:
                content = again.sub("", content)
            if finished and not re.search(thoughts.closing(opened), content, re.IGNORECASE):
                raise MalformedRow(
                    f"the prompt opens a thought, {opened[0].strip()}, that the answer does not "
                    "close, so the target said more than this; keep the thoughts in the content, "
                    "or give the --chat-template-args that it was asked with"
                )
        else:
            content = thoughts.checked(content, prompt, finished, self._template.mentions)
        cut = not finished and thoughts.begun(content) is not None
        if frame.thought and not opened and not cut and not thoughts.WHOLE.search(content):
            self.notes[
                "answers without the empty thought that the chat template inserts (where the "
                "target was asked not to think, give the --chat-template-args it was asked with)"
            ] += 1
        before = frame.before
        control = _CONTROL_TOKEN.match(before)
        if control and content.startswith(control[0]):
            before = ""  # the content is all that was sampled
        return before + content

    def _shown(
        self, messages: list[Message], tools: Any, prompt: str, frame: _Frame, finished: bool
    ) -> tuple[str, bool]:
        """Return thoughts, content and tool calls as the template shows them.

        Returns:
            The text, and whether the turn ends as that of a plain answer.
        """
        *earlier, message = messages
        thought = next((message[key] for key in THOUGHTS if message.get(key)), "")
        # Templates differ in which of these fields they read.
        named = {**message, **(dict.fromkeys(THOUGHTS, thought) if thought else {})}
        shown = self._template.text([*earlier, named], tools)
        remedy = "put what the target said into its content, or give response_ids"
        if thought:
            remedy += ", or remove the thoughts if they are another model's"
        if not shown.startswith(prompt):
            raise MalformedRow(
                "the chat template does not show the answer after the prompt that asks for it; "
                + remedy
            )
        said = shown[len(prompt) :]
        if not thought:
            said = thoughts.EMPTY.sub("", said, count=1)
        calls = message.get("tool_calls", ())
        probe, parts = marked(named, _MARK, THOUGHTS)
        probed = self._template.text([*earlier, probe], tools)
        for what, text, mark in parts:
            # Some rows have the thoughts in the content as well.
            within = what == "thoughts" and thoughts.WHOLE.search(message["content"])
            if text.strip() not in said or not (within or mark in probed):
                raise MalformedRow(
                    f"the chat template shows no {what} of an answer ({text.strip()[:40]!r}); "
                    + remedy
                )
        if calls and message["content"].strip():
            bare = {k: v for k, v in message.items() if k not in THOUGHTS} | {"content": ""}
            alone = self._template.text([*earlier, bare], tools)[len(prompt) :]
            alone = thoughts.EMPTY.sub("", alone.removesuffix(frame.after), count=1)
            if (once := _VAGUE.sub("", alone)) and once in _VAGUE.sub("", message["content"]):
                raise MalformedRow(
                    "an answer has its tool calls twice, in its content and in tool_calls; "
                    "remove those of the one or the other"
                )
        if finished and thought and not message["content"] and not calls:
            raise MalformedRow(
                "an answer has thoughts and nothing else, so it is not known whether the target "
                "ended them; put what it said into its content, or give the row finished false"
            )
        if not finished and thought and not message["content"] and not calls:
            # The target was cut while it thought: it said no end of that.
            return said[: said.rindex(thought.strip()) + len(thought.strip())], False
        ended = bool(frame.after) and said.endswith(frame.after)
        return said[: -len(frame.after)] if ended else said.rstrip(), ended


def check_recorded(row: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse a row or prompt that names other arguments of the chat template.

    Raises:
        MalformedRow: what it names is no object.
        ValueError: it names others.
    """
    found = {name: row.get(name) for name in _RECORDED}
    for name, value in found.items():
        if not isinstance(value, dict | None):
            raise MalformedRow(
                f'its field {name!r} must be an object such as {{"enable_thinking": false}}, '
                f"got {str(value)[:40]!r}"
            )
    recorded = agreed(found)
    if recorded is not None and recorded != dict(arguments):
        raise ValueError(
            f"row {row.get('id')!r} says that the chat template has the arguments "
            f"{as_option(recorded)}, and these are {as_option(arguments)}; give "
            f"--chat-template-args '{as_option(recorded)}', or sample without them"
        )


def _answers(messages: Sequence[Message], sampled: bool) -> list[int]:
    """Return the indices of the assistant's messages that answer someone.

    The last does where its tokens were sampled, even if a system turn alone comes before it.
    """
    asked = next(
        (
            index
            for index, message in enumerate(messages)
            if message["role"] not in ("assistant", "system", "developer")
        ),
        len(messages),
    )
    found = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [i for i in found if i > asked or (sampled and 0 < i == len(messages) - 1)]


def response_text(tokenizer: Any, ids: list[int], finished: bool) -> str:
    """Return the text of sampled tokens, without the one that ends a finished response."""
    text = tokenizer.decode(ids[:-1] if finished else ids, clean_up_tokenization_spaces=False)
    return str(text)


__all__ = [
    "Chat",
    "MalformedRow",
    "Message",
    "Tokens",
    "check_recorded",
    "response_text",
]
