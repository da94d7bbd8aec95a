"""Rows as users have them, from the command line: read by the rules, or named and left out."""

import json
from pathlib import Path

import pytest
from chat_families import CHATML, DEEPSEEK, GEMMA, LLAMA3, MISTRAL, QWEN3
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
from chat_server import running
from tiny_target import draft_config, save_draft, save_target
from transformers import AutoTokenizer

from specforge_lk.data import conversations

NO_THOUGHT = '{"enable_thinking": false}'


@pytest.fixture
def streamed(tmp_path: Path):
    return lambda template, *ends: Streamed(tmp_path, template, ends)


IM, EOT = ("<|im_end|>",), ("<|eot_id|>", "<|eom_id|>")
#: Template, ends, row, what is supervised of every sample.
READ = {
    "text parts": (
        *(CHATML, IM, chat(asks([{"type": "text", "text": "hi"}]), says(["ye", "s"]))),
        [["yes<|im_end|>"]],
    ),
    "messages": (CHATML, IM, {"id": "x", "messages": [HI, YES]}, [["yes<|im_end|>"]]),
    "messages as JSON": (
        *(CHATML, IM, {"id": "x", "messages": json.dumps([HI, YES])}),
        [["yes<|im_end|>"]],
    ),
    "from and value": (
        *(CHATML, IM, chat({"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"})),
        [["yes<|im_end|>"]],
    ),
    "a greeting": (CHATML, IM, chat(says("welcome"), HI, YES), [["yes<|im_end|>"]]),
    "a user's last word": (CHATML, IM, chat(HI, YES, asks("bye")), [["yes<|im_end|>"]]),
    "two users' turns": (CHATML, IM, chat(HI, HI, YES), [["yes<|im_end|>"]]),
    "a newline that merges with the prompt's": (
        *(CHATML, IM, chat(HI, says("\nyes"), HI, YES)),
        [["\nyes<|im_end|>"], ["yes<|im_end|>"]],
    ),
    "not finished": (CHATML, IM, chat(HI, YES, finished=False), [["yes"]]),
    "a null of what is finished": (
        *(CHATML, IM, chat(HI, YES, finished=None)),
        [["yes<|im_end|>"]],
    ),
    "not finished, an end in the text": (
        *(CHATML, IM, chat(HI, says("ye<|im_end|>s"), finished=False)),
        [["ye"]],
    ),
    "no end known but the template's": (CHATML, (), chat(HI, YES), [["yes<|im_end|>"]]),
    "more after an end": (LLAMA3, EOT, chat(HI, says("ye<|eot_id|>s")), [["ye<|eot_id|>"]]),
    "an end of the generation config": (LLAMA3, EOT, chat(HI, YES), [["yes<|eot_id|>"]]),
    "ids after an end": (
        *(LLAMA3, EOT, chat(HI, says("?"), response_ids=[40, 41, 6, 42])),
        [["12<|eot_id|>"]],
    ),
    "a tool call and its answer": (
        *(LLAMA3, EOT),
        chat(HI, says(None, tool_calls=[AS_TEXT]), {"role": "tool", "content": "2"}, YES),
        [['{"name": "f", "parameters": {"x": 1}}<|eom_id|>', "yes<|eot_id|>"]],
    ),
    "nulls of parquet": (
        *(LLAMA3, EOT, chat({**HI, "tool_calls": None}, {**YES, "tool_calls": None}, tools=None)),
        [["yes<|eot_id|>"]],
    ),
    "thoughts in a field": (
        *(QWEN3, IM, chat(HI, says("yes", reasoning="hm"), HI, says("no", reasoning_content="h"))),
        [
            ["<think>\nhm\n</think>\n\nyes<|im_end|>"],
            ["<think>\nh\n</think>\n\nno<|im_end|>"],
        ],
    ),
    "cut in a thought": (
        *(QWEN3, IM, chat(HI, says(None, reasoning="hm\n"), finish_reason="length")),
        [["<think>\nhm"]],
    ),
    "cut in a thought, in the content": (
        *(QWEN3, IM, chat(HI, says("<think>\nhm"), finished=False)),
        [["<think>\nhm"]],
    ),
    "tags that are no thoughts": (
        QWEN3,
        IM,
        chat(HI, says("[Reason] so")),
        [["[Reason] so<|im_end|>"]],
    ),
    "no thought where the template inserts one": (QWEN3, IM, GOOD, [["yes<|im_end|>"]]),
    "a thought whose beginning is the prompt's": (
        *(DEEPSEEK, ("<|eos|>",), chat(HI, says("<think>\nhm</think>yes"))),
        [["hm</think>yes<|eos|>"]],
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_a_row_is_read_by_the_rules(kind: str, streamed):
    template, ends, row, wanted = READ[kind]
    run = streamed(template, *ends)
    code, output = run.capture([row])
    assert code == 0, output
    assert [spans for _, spans in run.samples()] == wanted
    assert f"{len(wanted)} samples" in output
    notes = {
        "greetings": {"a greeting"},
        "empty thought": {
            *("no thought where the template inserts one", "tags that are no thoughts"),
        },
        "not the text": {"ids after an end"},
    }
    assert {note: note in output for note in notes} == {n: kind in of for n, of in notes.items()}


def test_a_thought_that_the_prompt_has_is_not_said_again(streamed):
    run, empty = streamed(QWEN3, *IM), "<think>\n\n</think>\n\n"
    code, output = run.capture([chat(HI, says(f"{empty}yes"))], "--chat-template-args", NO_THOUGHT)
    assert code == 0 and [spans for _, spans in run.samples()] == [["yes<|im_end|>"]], output
    thinking = chat(HI, says("<think>\nhm\n</think>\n\nyes"))
    code, output = run.capture([thinking], "--chat-template-args", NO_THOUGHT)
    assert code == 1 and "its answer has a thought, <think>, and the prompt says" in output


def test_tools_reach_the_template(streamed):
    run = streamed(LLAMA3, *EOT)
    rows = [{**GOOD, "tools": TOOLS}, {**GOOD, "tools": json.dumps(TOOLS)}, GOOD]
    code, output = run.capture(rows)
    assert code == 0, output
    shown = [json.dumps(TOOLS) in text for text, _ in run.samples()]
    assert shown == [True, True, False]


ALTERNATE = "Conversation roles must alternate user/assistant/user/..."
#: Template, row, what is said of it.
REFUSED = {
    "a system turn": (GEMMA, chat({"role": "system", "content": "s"}, HI, YES), "System role not"),
    "the assistant first": (MISTRAL, chat(says("welcome"), HI, YES), ALTERNATE),
    "two users' turns": (MISTRAL, chat(HI, HI, YES), ALTERNATE),
    "an image": (
        *(CHATML, chat(asks([{"type": "image_url", "image_url": "u"}]), YES)),
        "conversations[0].content[0] is of type 'image_url'",
    ),
    "null": (CHATML, chat(HI, says(None)), "no text in conversations[1].content"),
    "a number": (CHATML, chat(asks(7), YES), "conversations[0].content must be text, got '7'"),
    "calls that are not shown": (
        *(CHATML, chat(HI, says(None, tool_calls=[CALL]))),
        "the chat template shows no tool calls",
    ),
    "thoughts that are not shown": (
        *(CHATML, chat(HI, says("yes", reasoning_content="hm"))),
        "the chat template shows no thoughts",
    ),
    "arguments that are no JSON": (
        *(LLAMA3, chat(HI, says("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]))),
        "conversations[1].tool_calls[0].function.arguments is no JSON object: '{'",
    ),
    "tools that are no list": (
        LLAMA3,
        {**GOOD, "id": "x", "tools": {"a": 1}},
        "field 'tools' must",
    ),
    "no role": (CHATML, chat({"content": "hi"}, YES), "whose conversations[0] is: no role"),
    "an unknown speaker": (CHATML, chat({"from": "bing", "value": "hi"}, YES), "from is 'bing'"),
    "no answer": (CHATML, chat(HI), "no message of it is an assistant's answer"),
    "an assistant of another name": (
        *(CHATML, chat(HI, {"role": "Assistant", "content": "yes"})),
        "its roles are user, Assistant; the role of answers must be assistant",
    ),
    "finished as text": (
        *(CHATML, chat(HI, YES, finished="false")),
        "its field finished must be true or false, got 'false'",
    ),
    "another field": (CHATML, {"id": "x", "chat": [HI, YES]}, "rename its field 'chat'"),
    "no messages": (CHATML, {"id": "x", "text": "hi"}, "its fields are ['id', 'text']"),
    "two fields": (CHATML, chat(HI, YES, messages=[HI, HI, YES]), "differ; remove one"),
    "a thought that the answer leaves open": (
        *(QWEN3, chat(HI, says("<think>\nhm"))),
        "opens a thought, <think>, that it does not close, so the target was cut",
    ),
    "a thought without its beginning": (
        *(QWEN3, chat(HI, says("hm\n</think>\n\nyes"))),
        "ends a thought, </think>, that neither it nor the prompt opens",
    ),
    "a thought left open": (DEEPSEEK, GOOD | {"id": "x"}, "the prompt opens a thought, <think>"),
    "ids that are none": (CHATML, chat(HI, YES, response_ids=["a"]), "must be token ids"),
    "ids outside": (CHATML, chat(HI, YES, response_ids=[5, 900]), "it has token id 900, outside"),
    "ids of a user's turn": (CHATML, chat(HI, YES, HI, response_ids=[5]), "last message is not"),
    "a sampling": (CHATML, chat(HI, YES, sampling={"top_p": 1}), "the field 'sampling' must be"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_row_is_named_or_left_out_and_counted(kind: str, streamed):
    template, row, words = REFUSED[kind]
    good = chat(HI, says("hm\n</think>\n\nyes")) if template is DEEPSEEK else GOOD
    run = streamed(template, *IM, *EOT)
    code, output = run.capture([good, row])
    assert code == 1 and "rows.jsonl:2 (id 'x'): " in output and words in output, output
    assert "--skip-malformed leaves such rows out" in output
    code, output = run.capture([good, row], "--skip-malformed")
    assert code == 1 and "1 of 2 rows would be left out, more than a share of 0.1" in output
    assert words in output and not (run.folder / "tokens.jsonl").exists()
    code, output = run.capture([good, row], "--skip-malformed", "--max-left-out", "0.5")
    assert code == 0 and "1 samples" in output and ", 1 malformed)" in output, output
    assert len(run.samples()) == 1


def test_arguments_of_the_chat_template_are_the_recorded_ones(streamed):
    run = streamed(QWEN3, *IM)
    code, output = run.capture([GOOD], "--chat-template-args", NO_THOUGHT)
    assert code == 0 and "empty thought" not in output, output
    ((text, spans),) = run.samples()
    assert spans == ["yes<|im_end|>"] and text.endswith("<think>\n\n</think>\n\nyes<|im_end|>")
    recorded = [{**GOOD, "chat_template_args": {"enable_thinking": False}}]
    assert run.capture(recorded, "--chat-template-args", NO_THOUGHT)[0] == 0
    for given in ((), ("--chat-template-args", '{"enable_thinking": true}')):
        code, output = run.capture(recorded, *given, "--skip-malformed", "--max-left-out", "1")
        assert code == 1 and "rows.jsonl:1 (id 'ok')" in output
        assert f"give --chat-template-args '{NO_THOUGHT}'" in output
    for value, code, words in [
        ('{"enable_thinkng": false}', 1, "reads no enable_thinkng; it reads enable_thinking"),
        ('{"tokenize": false}', 2, "cannot have tokenize"),
        ("enable_thinking=false", 2, "is no JSON object"),
    ]:
        found, output = run.capture([GOOD], "--chat-template-args", value)
        assert found == code and words in output, output


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose chat template has Qwen3's thoughts, and a draft beside it."""
    folder = tmp_path_factory.mktemp("thinking")
    target = save_target(folder / "target", layers=6)
    tokenizer = AutoTokenizer.from_pretrained(target)
    refusal = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
    tokenizer.chat_template = refusal + QWEN3
    tokenizer.save_pretrained(target)
    save_draft(folder / "draft")
    return folder


def offline(folder: Path, target: Path) -> Path:
    config = draft_config(96, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 4]})
    (folder / "draft.json").write_text(json.dumps(config))
    run = {
        "model": {
            "target_model_path": str(target),
            "draft_model_config": str(folder / "draft.json"),
            "torch_dtype": "float32",
        },
        "data": {"hidden_states_path": str(folder / "features"), "max_length": 256},
        "training": {"strategy": "eagle3", "attention_backend": "sdpa"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder / "run.json"


def test_features_say_what_is_missing_and_how_they_were_rendered(thinking: Path, tmp_path: Path):
    rows = [chat(HI, says("yes"), HI, says("no")), chat(asks("bad"), YES)]
    path = write(tmp_path / "rows.jsonl", [*rows, chat(HI, YES, response_ids=[2])])
    fixed = ("capture", "--config", offline(tmp_path, thinking / "target"), "--responses", path)
    some = ("--device", "cpu", "--skip-malformed", "--max-left-out", "0.7")
    code, output = invoke(*fixed, *some, "--chat-template-args", NO_THOUGHT)
    assert code == 0 and "(2 new, 0 cut to 256 tokens, 1 skipped, 1 malformed)" in output, output
    names = sorted(file.name for file in (tmp_path / "features").glob("*.ckpt"))
    assert names == ["sample_00000000.ckpt", "sample_00000000_1.ckpt"]
    manifest = json.loads((tmp_path / "features" / "capture.json").read_text())
    assert manifest["left_out"] == {"malformed": 1, "nothing supervised": 1}
    assert manifest["chat_template_args"] == {"enable_thinking": False}
    code, output = invoke(*fixed, *some)
    assert code == 1 and "chat_template_args={'enable_thinking': False}, not None" in output


def test_generate_gives_the_template_what_capture_gives_it(thinking: Path, tmp_path: Path):
    prompts = [
        {"id": "a", "prompt": "hi"},
        {"id": "b", "messages": [HI, says("", tool_calls=[AS_TEXT]), asks("and?")]},
        {"id": "c", "prompt": "bad"},
        {"id": "d", "messages": [HI, YES]},
        {"id": "e", "prompt": "long " * 100},
    ]
    path, out = write(tmp_path / "prompts.jsonl", prompts), tmp_path / "out.jsonl"
    target = thinking / "target"
    fixed = ("generate", "--target", target, "--prompts", path, "--out", out, "--device", "cpu")
    fixed = (*fixed, "--max-new-tokens", "4")
    code, output = invoke(*fixed)
    assert code == 1 and "prompts.jsonl:4 (id 'd'): its last message is the assistant's" in output
    some = ("--skip-malformed", "--max-left-out", "0.6", "--chat-template-args", NO_THOUGHT)
    code, output = invoke(*fixed, "--limit", "3")
    assert code == 1 and "prompts.jsonl:3 (id 'c')" in output and "not this" in output, output
    code, output = invoke(*fixed, *some)
    assert code == 0 and "2 responses (2 new" in output, output
    assert "prompts.jsonl:5 (id 'e')" in output and "exceeds the target's context" in output
    assert "3 malformed prompts left out" in output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["chat_template_args"] for row in rows] == [{"enable_thinking": False}] * 2
    assert rows[1]["conversations"][1]["tool_calls"] == [CALL]
    code, output = invoke(*fixed, "--skip-malformed", "--max-left-out", "0.6")
    assert code == 1 and "chat_template_args={'enable_thinking': False}, not None" in output
    tokenizer = AutoTokenizer.from_pretrained(target)
    read = conversations.Chat(tokenizer, {2}, {"enable_thinking": False})
    for row in rows:
        tokens = read.tokenize(row, sampled_only=True)[-1]
        assert tokens.input_ids[: -len(row["response_ids"])] == tokenizer.apply_chat_template(
            row["conversations"][:-1],
            add_generation_prompt=True,
            return_dict=False,
            enable_thinking=False,
        )


def test_a_server_gets_tools_and_arguments_and_may_call(tmp_path: Path):
    prompts = [{"id": "a", "messages": [HI, says(None, tool_calls=[CALL]), HI], "tools": TOOLS}]
    path, out = write(tmp_path / "prompts.jsonl", prompts), tmp_path / "out.jsonl"
    with running() as server:
        server.choice = {
            "message": {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]},
            "finish_reason": "tool_calls",
        }
        code, output = invoke(
            *("generate", "--server", server.url, "--prompts", path, "--out", out),
            *("--chat-template-args", NO_THOUGHT),
        )
    assert code == 0, output
    (body,) = server.requests
    assert body["tools"] == TOOLS and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][1]["tool_calls"] == [AS_TEXT]
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["tools"] == TOOLS and row["chat_template_args"] == {"enable_thinking": False}
    assert row["conversations"][-1]["tool_calls"] == [AS_TEXT] and row["finished"]


@pytest.mark.slow
def test_eval_and_doctor_read_the_same_rows(thinking: Path, tmp_path: Path):
    sampled = {"sampling": {"temperature": 1.0}, "response_ids": [40, 41, 42, 2]}
    rows = [chat(HI, YES, **sampled), chat(asks("bad"), YES, **sampled)]
    path, out = write(tmp_path / "held.jsonl", rows), tmp_path / "report.json"
    target = ("--target", thinking / "target", "--held-out", path, "--device", "cpu")
    fixed = ("eval", *target, "--draft", f"kl={thinking / 'draft'}", "--out", out, "--heads", "2")
    code, output = invoke(*fixed)
    assert code == 1 and "held.jsonl:2 (id 'x')" in output and "not this" in output, output
    code, output = invoke(*fixed, "--skip-malformed")
    assert code == 1 and "1 of 2 rows would be left out" in output
    some = ("--skip-malformed", "--max-left-out", "0.5", "--chat-template-args", NO_THOUGHT)
    code, output = invoke(*fixed, *some)
    assert code == 0 and "1 malformed rows left out" in output, output
    report = json.loads(out.read_text())
    assert report["settings"]["malformed_rows_left_out"] == {"held_out": 1}
    assert report["settings"]["chat_template_args"] == NO_THOUGHT
    assert [result["conversations"] for result in report["results"]] == [1]
    doctor = ("doctor", *target, "--draft", thinking / "draft", "--serving", "temperature=1")
    code, output = invoke(*doctor, "--chat-template-args", NO_THOUGHT)
    assert code == 2 and "held.jsonl:2 (id 'x')" in output and "not this" in output, output
    code, output = invoke(*doctor, *some, "--heads", "2", "--out", out)
    assert code in (0, 1) and "left out: " in output and "held.jsonl:2 (id 'x')" in output, output
    assert "1 malformed rows were left out" in output
    assert json.loads(out.read_text())["malformed_rows_left_out"] == 1


def test_released_rows_keep_tools_and_calls(tmp_path: Path):
    asked = [HI, says(None, tool_calls=[AS_TEXT]), {"role": "tool", "content": "2"}]
    rows = [
        {"id": 1, "conversation": asked, "generated_message": YES, "tools": TOOLS},
        {"id": 2, "conversation": [HI], "generated_message": says(None, tool_calls=[AS_TEXT])},
    ]
    source, out = write(tmp_path / "set.jsonl", rows), tmp_path / "out.jsonl"
    assert invoke("data", "--source", source, "--out", out)[0] == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["tools"] == TOOLS and first["conversations"][1]["tool_calls"] == [CALL]
    assert second["conversations"][-1] == says("", tool_calls=[CALL])
    code, output = invoke(
        "data", "--source", source, "--out", tmp_path / "p.jsonl", "--prompts-only"
    )
    assert code == 0, output
    prompt = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert prompt["tools"] == TOOLS and len(prompt["messages"]) == 3


def test_the_docs_repeat_the_rules():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rules = [line for line in conversations.__doc__.splitlines() if line.startswith("|")]
    assert len(rules) > 10 and "\n".join(rules) in page
