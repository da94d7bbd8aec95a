"""Rows in the conventions of other trainers: honored or refused by name, never half read."""

import json
from pathlib import Path

import pytest
from chat_families import CHATML, DEEPSEEK, HARMONY, LLAMA3, QWEN3
from chat_rows import (
    AS_TEXT,
    CALL,
    GOOD,
    HI,
    TOOLS,
    YES,
    Streamed,
    asks,
    chat,
    invoke,
    says,
    write,
)

IM, EOT = ("<|im_end|>",), ("<|eot_id|>", "<|eom_id|>")
SAME = {"name": "f", "arguments": {"x": 1}}
LEGACY = {"name": "f", "arguments": '{"x": 1}'}
SHOWN = '{"name": "f", "parameters": {"x": 1}}<|eom_id|>'
BRIEF = {"role": "system", "content": "brief"}
BRIEF_SHOWN = "<|im_start|>system\nbrief<|im_end|>"


def batched(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def streamed(folder: Path, template: str) -> Streamed:
    return Streamed(folder, template, (*IM, *EOT))


#: Template -> rows, what is supervised of each, what its sample has besides.
READ = {
    CHATML: [
        *(
            (chat(HI, says("ye", **mark), HI, YES), "yes", "ye<")
            for mark in (
                *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}),
                *({"trainable": False}, {"loss": False}, {"weight": 0, "train": False}),
            )
        ),
        (chat(HI, YES, HI, says("no", weight=0)), "yes", ""),
        (chat({**HI, "weight": 0}, {**YES, "weight": 1}), "yes", ""),
        (chat(HI, YES, system="brief"), "yes", BRIEF_SHOWN),
        (chat(HI, YES, system_prompt="brief"), "yes", BRIEF_SHOWN),
        (chat(BRIEF, HI, YES, system="brief"), "yes", BRIEF_SHOWN),
        (chat(HI, {**YES, "weight": None, "function_call": None}, system=None), "yes", ""),
        (
            chat(HI, says("<think>hm</think>yes", reasoning="hm", reasoning_content="hm")),
            *("<think>hm</think>yes", ""),
        ),
        (chat(HI, {**YES, "thinking_tokens": 7}), "yes", ""),
        (chat(HI, YES, weight=1.0, loss=1.7, train="split"), "yes", ""),
        (chat(HI, YES, images=[], reasoning="on", thinking="yes"), "yes", ""),
    ],
    LLAMA3: [
        (chat(HI, says(None, function_call=LEGACY)), SHOWN, ""),
        (
            chat(
                *(HI, says("", function_call=LEGACY, weight=0)),
                *({"role": "function", "name": "f", "content": "2"}, YES),
            ),
            *("yes", SHOWN),
        ),
        (chat(HI, {"from": "function_call", "value": json.dumps(LEGACY)}), SHOWN, ""),
        (chat(HI, YES, functions=[{"name": "f"}]), "yes", '"name": "f"'),
    ],
}


@pytest.mark.parametrize("template", READ, ids=["chatml", "llama3"])
def test_rows_are_honored(template: str, tmp_path: Path):
    run = streamed(tmp_path, template)
    code, output = run.capture([row for row, _, _ in READ[template]])
    assert code == 0, output
    end = {LLAMA3: "<|eot_id|>", CHATML: "<|im_end|>"}[template]
    for (text, spans), (row, supervised, shown) in zip(run.samples(), READ[template], strict=True):
        assert spans == [supervised if supervised is SHOWN else supervised + end], row
        assert shown in text, row


#: Fields of an answer or its row -> whether the target ended the answer itself.
REASONS = [
    *(({"finish_reason": reason}, True) for reason in ("stop", "STOP", "tool_calls", "eos_token")),
    *(({"finish_reason": reason}, False) for reason in ("length", "abort", "content_filter")),
    ({"finish_reason": {"type": "stop", "matched": 2}}, True),
    ({"finish_reason": {"type": "stop", "matched": "###"}}, False),
    ({"finish_reason": {"type": "length", "length": 9}}, False),
    ({"finish_reason": "stop", "stop_reason": 2}, True),
    ({"finish_reason": "stop", "stop_reason": "###"}, False),
    ({"stop_reason": "end_turn"}, True),
    ({"stop_reason": "max_tokens"}, False),
    ({"truncated": True}, False),
    ({"truncated": False}, True),
    ({"is_finished": False}, False),
    ({"done_reason": "length"}, False),
]


def test_an_answer_that_the_target_did_not_end_has_no_end(tmp_path: Path):
    run = streamed(tmp_path, CHATML)
    rows = [row for said, _ in REASONS for row in (chat(HI, YES | said), chat(HI, YES, **said))]
    code, output = run.capture([*rows, chat(HI, YES, finished=True, finish_reason="length")])
    assert code == 0, output
    ended = [ended for _, ended in REASONS for _ in "ab"] + [True]
    wanted = [["yes<|im_end|>" if end else "yes"] for end in ended]
    assert [spans for _, spans in run.samples()] == wanted


#: Kind -> template, row, what is said of it.
REFUSED = {
    "a reason that is not known": (
        *(CHATML, chat(HI, YES, finish_reason="moon")),
        "its field finish_reason is 'moon', which is none of stop, eos,",
    ),
    "half a weight of a row": (CHATML, chat(HI, YES, weight=0.5), "its field weight must be 0 or"),
    "a row of weight 0": (CHATML, chat(HI, YES, weight=0), "nothing of it is trained on"),
    "a row that is not trained on": (CHATML, chat(HI, YES, train=False), "nothing of it is trai"),
    "a mask": (
        *(CHATML, chat(HI, says("a", mask=1))),
        "conversations[1].mask does not say whether the answer is trained on",
    ),
    "messages in two other fields": (
        *(CHATML, {"id": "x", "prompt": [HI], "completion": [YES]}),
        "its fields 'prompt' and 'completion' hold messages; put those of one conversation",
    ),
    "half a weight": (CHATML, chat(HI, says("a", weight=0.5)), "[1].weight must be 0 or 1, false"),
    "a weight as text": (CHATML, chat(HI, says("a", train="no")), "got 'no'"),
    "weights that differ": (
        *(CHATML, chat(HI, says("a", weight=0, train=True))),
        "its fields 'conversations[1].weight' and 'conversations[1].train' differ; remove one",
    ),
    "parts of an answer": (
        *(CHATML, chat(HI, says("a", train_detail=[{"begin_offset": 0}]))),
        "conversations[1].train_detail has parts of an answer trained on",
    ),
    "no answer that is trained on": (
        *(CHATML, chat(HI, says("a", weight=0), HI, says("b", weight=0))),
        "nothing of it is trained on: its answers have weight 0",
    ),
    "sampled tokens of weight 0": (
        *(CHATML, chat(HI, says("a", weight=0), response_ids=[40, 41])),
        "nothing of it is trained on",
    ),
    "a function_call that is not shown": (
        *(CHATML, chat(HI, says("x", function_call=LEGACY))),
        "the chat template shows no tool calls of an answer ('f')",
    ),
    "a function_call without a name": (
        *(LLAMA3, chat(HI, says("", function_call={"arguments": "{}"}))),
        "conversations[1].function_call[0] has no function.name",
    ),
    "a function_call and others": (
        *(LLAMA3, chat(HI, says("", function_call=LEGACY, tool_calls=[{**CALL, "id": "1"}]))),
        "'conversations[1].tool_calls' and 'conversations[1].function_call' differ",
    ),
    "a turn that is no call": (
        *(LLAMA3, chat(HI, {"from": "function_call", "value": "f(1)"})),
        "conversations[1].function_call is no JSON object: 'f(1)'",
    ),
    "calls of a user": (
        *(LLAMA3, chat({**HI, "tool_calls": [CALL]}, YES)),
        "conversations[0] is the user's and has tool calls",
    ),
    "tools and functions": (
        *(LLAMA3, chat(HI, YES, tools=TOOLS, functions=[{"name": "g"}])),
        "its fields 'tools' and 'functions' differ",
    ),
    "two system turns": (
        *(CHATML, chat(BRIEF, HI, YES, system="long")),
        "it has the system turn 'long', and another in its messages",
    ),
    "a system turn that is none": (CHATML, chat(HI, YES, system=["a"]), "'system' must be text"),
    "content and value": (
        *(CHATML, chat(HI, says("a", value="b"))),
        "'conversations[1].content' and 'conversations[1].value' differ",
    ),
    "role and from": (CHATML, chat(HI, {**YES, "from": "human"}), "[1].from' differ; remove one"),
    "a role that is none": (CHATML, chat({"from": ["a"], "value": "x"}, YES), "from must be text"),
    "thoughts under another name": (
        *(CHATML, chat(HI, says("yes", thought="hm"))),
        "conversations[1].thought is not read; rename it to reasoning_content",
    ),
    "thoughts in parts": (
        *(CHATML, chat(HI, says("yes", reasoning_content=[{"text": "hm"}]))),
        "conversations[1].reasoning_content must be text",
    ),
    "two thoughts": (
        *(CHATML, chat(HI, says("yes", reasoning="a", thinking="b"))),
        "'conversations[1].reasoning' and 'conversations[1].thinking' differ",
    ),
    "thoughts where the prompt opens one": (
        *(DEEPSEEK, chat(HI, says("yes", reasoning_content="hm"))),
        "put what the target said into its content, or give response_ids, or remove the thoughts",
    ),
    "arguments that are none": (
        *(CHATML, chat(HI, YES, chat_template_args=[1])),
        "its field 'chat_template_args' must be an object such as",
    ),
    "arguments of an engine": (
        *(CHATML, chat(HI, YES, chat_template_kwargs="x")),
        "its field 'chat_template_kwargs' must be an object such as",
    ),
    "a call whose name the template writes anyway": (
        *(HARMONY, chat(HI, says("", tool_calls=[CALL]))),
        "the chat template shows no tool calls of an answer ('f')",
    ),
    "a call in the content, too": (
        *(QWEN3, chat(HI, says(f"<tool_call>{json.dumps(SAME)}</tool_call>", tool_calls=[CALL]))),
        "an answer has its tool calls twice",
    ),
    "thoughts that an answer ends with": (
        *(QWEN3, chat(HI, says(None, reasoning="hm"))),
        "an answer has thoughts and nothing else",
    ),
    "arguments under another name": (
        *(LLAMA3, chat(HI, says("", tool_calls=[{"name": "f", "parameters": {"x": 1}}]))),
        "tool_calls[0].function.parameters is not read; rename it to arguments",
    ),
    "arguments of which one is twice": (
        *(LLAMA3, chat(HI, says("", function_call={**LEGACY, "arguments": '{"x":1,"x":2}'}))),
        "arguments is no JSON object: '{\"x\":1,\"x\":2}' (field 'x' occurs twice)",
    ),
    "arguments beyond any number": (
        *(LLAMA3, chat(HI, says("", function_call={**LEGACY, "arguments": '{"x":1e400}'}))),
        "(1e400 is no number of JSON)",
    ),
    "thoughts beside the messages": (
        *(CHATML, chat(HI, YES, reasoning_content="hm, so")),
        "its field reasoning_content is beside the messages, and not read",
    ),
    "an image of a row": (CHATML, chat(HI, YES, images=["a.png"]), "its field images is not read"),
    "an image of a message": (
        *(CHATML, chat({**HI, "image": "a.png"}, YES)),
        "conversations[0].image is not read",
    ),
    "an empty answer": (CHATML, chat(HI, says("")), "an answer of 1 tokens, end included, is too"),
}


@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA3, DEEPSEEK, QWEN3, HARMONY],
    ids=["chatml", "llama3", "r1", "qwen3", "harmony"],
)
def test_other_rows_are_named(template: str, tmp_path: Path):
    run = streamed(tmp_path, template)
    good = chat(HI, says("hm\n</think>\n\nyes")) if template is DEEPSEEK else GOOD
    rows = [(row, words) for of, row, words in REFUSED.values() if of is template]
    code, output = run.capture([good, rows[0][0]])
    assert code == 1 and "rows.jsonl:2 (id 'x'): " in output and rows[0][1] in output, output
    for some in batched(rows, 5):  # as many as are named
        given = [good, *(row for row, _ in some)]
        code, output = run.capture(given, "--skip-malformed", "--max-left-out", "1")
        assert code == 0 and len(run.samples()) == 1, output
        said = output.split(f"left out: {run.folder / 'rows.jsonl'}:")[1:]
        assert len(said) == len(some), output
        for number, (line, (_, words)) in enumerate(zip(said, some, strict=True), start=2):
            assert line.startswith(f"{number} (id 'x'): ") and words in line


def test_a_longest_length_without_room_is_named(tmp_path: Path):
    run = streamed(tmp_path, CHATML)
    code, output = run.capture([GOOD], "data.max_length=1")
    assert code == 1 and "1 of 1 rows would be left out" in output
    assert "(id 'ok'): nothing of it is supervised within data.max_length=1; raise that" in output


#: Prompts of `generate`, and what is said of them.
PROMPTS = [
    ({"prompt": "a", "messages": [asks("b")]}, "its fields 'prompt' and 'messages' differ"),
    ({"prompt": "a", "conversations": [HI, YES]}, "its fields 'prompt' and 'messages' differ"),
    ({"prompt": "a", "images": ["a.png"]}, "its field images is not read"),
    ({"prompt": [HI]}, "its field 'prompt' is a list; rename it to 'messages'"),
    ({"prompt": "a", "system": 7}, "its field 'system' must be text, got '7'"),
    ({"prompt": "a", "functions": "f"}, "its field 'functions' is no JSON: 'f'"),
    ({"id": "0", "prompt": "a"}, "id '0' occurs twice; give every row an id of its own"),
    (
        {"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}},
        "give --chat-template-args '{\"enable_thinking\": false}', or sample without them",
    ),
]


def test_a_prompt_that_says_two_things_is_named(tmp_path: Path):
    command = ("generate", "--target", "absent", "--out", tmp_path / "o.jsonl", "--prompts")
    for row, words in PROMPTS:
        code, output = invoke(*command, write(tmp_path / "p.jsonl", [{"prompt": "good"}, row]))
        assert code == 1 and "p.jsonl:2" in output and words in output, output


def test_prompts_that_say_one_thing_twice_are_read(tmp_path: Path):
    from specforge_lk.data.prompts import read_prompts

    rows = [
        *({"prompt": "hi", "messages": [HI]}, {"id": None, "prompt": "hi"}),
        {"prompt": "hi", "system": "brief", "functions": [{"name": "f"}]},
    ]
    once, null, system = read_prompts(write(tmp_path / "p.jsonl", rows)).values()
    assert once == {"id": "0", "prompt": "hi"} and null == {"id": "1", "prompt": "hi"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert system == {"id": "2", "messages": [BRIEF, HI], "tools": tools}


#: Changes of a row of a released set, and what is said of it.
RELEASED = [
    ({"generated_message": asks("b")}, "generated_message is the user's, and must be"),
    ({"generated_message": {"from": "human", "value": "b"}}, "generated_message is the user's"),
    ({"generated_message": says("b", weight=2)}, "generated_message.weight must be 0 or 1"),
    ({"id": 0}, "an earlier row has its id, too; give every row an id of its own"),
    ({"id": "0"}, "an earlier row has its id, too"),
    ({"finish_reason": "moon"}, "its field finish_reason is 'moon'"),
    ({"weight": 2}, "its field weight must be 0 or 1"),
    ({"image": "a.png"}, "its field image is not read"),
]


def released(number: int, **changes: object) -> dict:
    return {"id": number, "conversation": [HI], "generated_message": YES, **changes}


@pytest.mark.parametrize(("change", "words"), RELEASED)
def test_a_released_row_that_is_none_is_named(change: dict, words: str, tmp_path: Path):
    source = write(tmp_path / "set.jsonl", [released(0), released(1, **change), released(2)])
    command = ("data", "--source", source, "--out", tmp_path / "out.jsonl")
    code, output = invoke(*command)
    assert code == 1 and "set.jsonl:2 (id " in output and words in output, output
    code, output = invoke(*command, "--skip-malformed")
    assert code == 1 and "1 of 3 rows would be left out" in output and words in output
    # What an earlier run left out is not forgotten.
    code, output = invoke(*command, "--skip-malformed")
    assert code == 1 and "1 of 3 rows would be left out" in output
    code, output = invoke(*command, "--skip-malformed", "--max-left-out", "0.4")
    assert code == 0 and "3 rows read, 0 new conversations, 1 left out" in output


def test_an_id_of_an_earlier_run_is_known(tmp_path: Path):
    source = write(tmp_path / "set.jsonl", [released(n) for n in (0, 1, 2, 0)])
    command = ("data", "--source", source, "--out", tmp_path / "out.jsonl")
    assert invoke(*command, "--limit", "3")[0] == 0
    code, output = invoke(*command)
    assert code == 1 and "set.jsonl:4 (id 0): an earlier row has its id" in output


def test_released_rows_keep_what_is_said_of_training(tmp_path: Path):
    said = says("b", weight=0, function_call=LEGACY, usage=7)
    source = write(tmp_path / "set.jsonl", [released(0, generated_message=said, system="brief")])
    assert invoke("data", "--source", source, "--out", tmp_path / "out.jsonl")[0] == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["conversations"] == [BRIEF, HI, says("b", tool_calls=[CALL], weight=0)]
    packed = released(0, conversation=json.dumps([HI]), finish_reason="abort", weight=0)
    source = write(tmp_path / "set.jsonl", [packed])
    assert invoke("data", "--source", source, "--out", tmp_path / "two.jsonl")[0] == 0
    (row,) = map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines())
    assert row["conversations"] == [HI, {**YES, "weight": 0}] and row["finished"] is False


def test_a_server_is_not_told_what_is_trained_on(tmp_path: Path):
    from chat_server import running

    messages = [HI, says("a", weight=0, function_call=LEGACY), {"role": "function", "content": "1"}]
    path = write(tmp_path / "p.jsonl", [{"messages": messages}])
    with running() as server:
        code, output = invoke(
            *("generate", "--server", server.url, "--prompts", path, "--out", tmp_path / "o.jsonl")
        )
    assert code == 0, output
    (body,) = server.requests
    assert body["messages"][1] == says("a", tool_calls=[AS_TEXT])
    (row,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert row["conversations"][1] == says("a", tool_calls=[CALL], weight=0)
