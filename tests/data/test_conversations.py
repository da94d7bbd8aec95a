"""What is supervised is what the target generated, and prompts are those of serving."""

from functools import cache

import pytest
from chat_families import FAMILIES, Family, family_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specforge_lk.data.conversations import Chat, Tokens

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
#: Whatever a user or a target may write, but control tokens and tags.
_TEXT = st.text(st.sampled_from("ab é.\n '"), max_size=8)
_WORDS = _TEXT.map(str.strip).filter(bool)


@cache
def chat_of(name: str, **arguments: object) -> Chat:
    """The end of a turn is the generation config's, and the tokenizer's eos another token."""
    family = FAMILIES[name]
    tokenizer = family_tokenizer(family.template)
    return Chat(tokenizer, {tokenizer.convert_tokens_to_ids(family.end)}, arguments)


def spans(tokens: Tokens) -> list[tuple[int, int]]:
    """The supervised spans."""
    mask = [0, *tokens.loss_mask, 0]
    begins = [i for i in range(len(mask) - 1) if not mask[i] and mask[i + 1]]
    return [(i, mask.index(0, i + 1) - 1) for i in begins]


def answers(chat: Chat, row: dict) -> list[tuple[list[int], str]]:
    """The tokens before each supervised answer, and its text."""
    return [
        (tokens.input_ids[:begin], chat.tokenizer.decode(tokens.input_ids[begin:end]))
        for tokens in chat.tokenize(row)
        for begin, end in spans(tokens)
    ]


def message(family: Family, thought: str, content: str, apart: bool) -> dict:
    """An assistant's message: its thoughts in the family's field, or all as it was generated."""
    if not thought:
        return {"role": "assistant", "content": content}
    if apart and family.field:
        return {"role": "assistant", "content": content, family.field: thought}
    said = family.said(thought, content)
    return {"role": "assistant", "content": said}


#: With thoughts, which are the hardest; the others take seconds each.
FAST = "qwen3"


@pytest.mark.parametrize(
    "name",
    [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_the_target_generated_is_supervised_after_the_prompts_of_serving(name, data):
    family, chat = FAMILIES[name], chat_of(name)
    messages, said = [], []
    if family.system and data.draw(st.booleans()):
        messages.append({"role": "system", "content": data.draw(_TEXT)})
    count = data.draw(st.integers(1, 3))
    for _ in range(count):
        messages.append({"role": "user", "content": data.draw(_TEXT)})
        thought = data.draw(_WORDS) if data.draw(st.sampled_from(family.thinks)) else ""
        # What a server has taken apart is trimmed; what it sent whole is as it was generated.
        content = data.draw(_WORDS if thought else _TEXT)
        # The harmony template refuses channels in the content of an earlier turn.
        apart = data.draw(st.booleans()) or name == "harmony"
        messages.append(message(family, thought, content, apart))
        said.append(family.said(thought, content))
    finished = data.draw(st.booleans())
    found = answers(chat, {"conversations": messages, "finished": finished})
    ends = [family.end] * (count - 1) + [family.end if finished else ""]
    wanted = [text + end for text, end in zip(said, ends, strict=True)]
    assert [text for _, text in found] == [text for text in wanted if text]
    indices = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for (prompt, _), index in zip(
        found, (i for i, text in zip(indices, wanted, strict=True) if text), strict=True
    ):
        assert prompt == chat.tokenizer.apply_chat_template(
            messages[:index], add_generation_prompt=True, return_dict=False
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 250), max_size=12), st.booleans())
@example([29, 6, 30, 31], True)
def test_sampled_tokens_are_supervised_as_they_are_up_to_their_end(ids, several):
    chat = chat_of("llama3")
    row = {"conversations": [USER, ANSWER] * (2 if several else 1), "response_ids": ids}
    end = chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    stops = [i for i, token in enumerate(ids) if token in (0, end)]
    wanted = ids[: stops[0] + 1] if stops else ids
    tokens = chat.tokenize(row)[-1]
    assert tokens.input_ids[len(tokens.input_ids) - len(wanted) :] == wanted
    assert sum(chat.tokenize(row, sampled_only=True)[-1].loss_mask) == len(wanted)
