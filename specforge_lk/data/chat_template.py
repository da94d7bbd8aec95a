"""A target's chat template: messages to text and tokens, with further arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from specforge_lk.data.messages import Message
from specforge_lk.data.rows import MalformedRow

#: What chat templates and the calls of them raise at messages that they do not take.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
#: Arguments that are ours, or that change what is rendered otherwise than the template does.
_RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: The target's tokenizer.
        arguments: Further arguments of the template, such as ``enable_thinking``.

    Raises:
        ValueError: an argument is none that the template reads.
    """

    tokenizer: Any
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_arguments(self.arguments)
        if not self.arguments:
            return
        from jinja2 import TemplateSyntaxError

        try:
            read = _names_read(self._source())
        except TemplateSyntaxError as error:
            raise self._broken(error) from error
        if unknown := sorted(set(self.arguments) - read):
            known = sorted(read - _RESERVED - {"messages", "raise_exception", "strftime_now"})
            raise ValueError(
                f"--chat-template-args: the chat template of {self.tokenizer.name_or_path} reads "
                f"no {', '.join(unknown)}; it reads {', '.join(known) or 'none'}"
            )

    def text(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        """Return the text of messages; with ``prompt`` up to where an answer begins.

        Raises:
            MalformedRow: the template refuses them.
        """
        return str(self._apply(messages, tools, prompt=prompt, tokenize=False))

    def prompt_ids(self, messages: Sequence[Message], tools: Any) -> list[int]:
        """Return the tokens of messages, up to where an answer begins.

        Raises:
            MalformedRow: the template refuses them.
        """
        return list(self._apply(messages, tools, prompt=True, tokenize=True))

    def _apply(
        self, messages: Sequence[Message], tools: Any, *, prompt: bool, tokenize: bool
    ) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        self._source()
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                add_generation_prompt=prompt,
                tokenize=tokenize,
                return_dict=False,
                **self.arguments,
            )
        except TemplateSyntaxError as error:
            raise self._broken(error) from error
        except (TemplateError, *_REFUSALS) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise MalformedRow(
                f"the chat template refuses the messages ({roles}): {error or type(error).__name__}"
            ) from error

    def continued(self, prompt: str, prompt_ids: list[int], said: str) -> list[int]:
        """Return the tokens of what follows a prompt.

        They are those of the whole text if it begins with the prompt's. Where the text's tokens
        reach over the border, they are those of the answer by itself, because a server samples
        after the prompt's tokens.
        """
        whole = self.encode(prompt + said)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # After a special token, where a tokenizer adds no space as it does at a text's beginning.
        end, token = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        if end and not getattr(added, "rstrip", False):
            anchored = self.encode(end + said)
            if anchored[:1] == [token]:
                return anchored[1:]
        return self.encode(said)

    def mentions(self, text: str) -> bool:
        """Return whether a text stands in the template."""
        return text in self._source()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which control tokens are themselves."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _source(self) -> str:
        """Return the chat template.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                "save one with it, or use an instruction-tuned target"
            )
        return str(self.tokenizer.get_chat_template())

    def _broken(self, error: Exception) -> ValueError:
        name = self.tokenizer.name_or_path
        return ValueError(
            f"the chat template of {name} is no template: {error}; save the target's own"
        )


@lru_cache(maxsize=4)
def _names_read(template: str) -> frozenset[str]:
    """Return the names that a chat template reads."""
    from jinja2 import Environment, meta

    # {% generation %} is transformers' own.
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return frozenset(meta.find_undeclared_variables(environment.parse(source)))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the chat template that a command gives it by itself.

    Raises:
        ValueError: there is one.
    """
    if reserved := sorted(_RESERVED & set(arguments)):
        raise ValueError(f"--chat-template-args cannot have {', '.join(reserved)}; leave it out")


def as_option(arguments: Mapping[str, Any]) -> str:
    """Return arguments of the chat template as `--chat-template-args` takes them."""
    return json.dumps(arguments, ensure_ascii=False)


__all__ = ["ChatTemplate", "as_option", "check_arguments"]
