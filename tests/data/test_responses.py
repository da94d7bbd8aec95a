"""Responses say what they are samples of, whatever becomes of their file."""

import gzip
import json
from pathlib import Path

import pytest

from experiments.assets import HELD_OUT, HELD_OUT_GREEDY, RESPONSES
from specforge_lk.data.jsonl import open_lines, read_jsonl
from specforge_lk.data.responses import (
    Request,
    ResponseFile,
    conversation_row,
    pending,
    sampling_of,
    settings_of,
)
from specforge_lk.serving import Sampling

ROOT = Path(__file__).parents[2]
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(), {"temperature": 1.0}),
        (Sampling(0.7, top_p=0.9), {"temperature": 0.7, "top_p": 0.9}),
        (Sampling(0.6, 20, 0.95), {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        (Sampling(0, 20, 0.95), {"temperature": 0}),
    ],
    ids=str,
)
def test_a_row_says_what_it_is_a_sample_of(sampling: Sampling, field: dict):
    row = conversation_row({"id": "1", "prompt": "a"}, "b", True, [7, 2], sampling)
    assert row["sampling"] == field
    assert sampling_of(json.loads(json.dumps(row))) == sampling


def test_rows_without_the_field_say_nothing():
    row = conversation_row({"id": "1", "prompt": "a"}, "b", True, [7, 2], None)
    assert "sampling" not in row and sampling_of(row) is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("temperature=1", "must be such as"),
        ({"top_p": 0.9}, "must be such as"),
        ({"temperature": 1, "min_p": 0.1}, "has 'min_p', which is none of temperature, top_k"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": 1, "top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_read_names_its_row(field: object, message: str):
    with pytest.raises(ValueError, match=f"row 'x': the field 'sampling'.*{message}"):
        sampling_of({"id": "x", "sampling": field})


def test_a_chat_is_known_by_all_its_messages_and_continued(tmp_path: Path):
    path, request = tmp_path / "out.jsonl", Request(Sampling(0))
    prompt, other = {"id": "1", "messages": CHAT}, {"id": "2", "messages": CHAT[:1]}
    for expected in ([prompt, other], [other]):
        with open_lines(path, settings_of("target", "float32", request)) as lines:
            stored = ResponseFile(lines)
            assert pending([prompt, other], stored) == expected
            if expected[0] is prompt:
                stored.append([conversation_row(prompt, "d", True, [7, 2], request.sampling)])
            else:
                changed = {"id": "1", "messages": [{**CHAT[0], "content": "A"}, *CHAT[1:]]}
                with pytest.raises(ValueError, match="'1' belongs to another prompt"):
                    pending([changed], stored)


@pytest.mark.parametrize(
    ("before", "sampling"),
    [
        ({"temperature": 1.0}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(0.7, top_p=0.9)),
    ],
    ids=["without top_p", "with top_p"],
)
def test_files_of_earlier_versions_are_continued(before: dict, sampling: Sampling, tmp_path: Path):
    path = tmp_path / "out.jsonl"
    old = {"target": "t", "dtype": "float32", "max_new_tokens": 160, "seed": 0, **before}
    with open_lines(path, old) as lines:
        row = conversation_row({"id": "1", "prompt": "a"}, "b", True, [7, 2], None)
        lines.append([row])
    with open_lines(path, settings_of("t", "float32", Request(sampling))) as lines:
        ResponseFile(lines).append([{**row, "id": "2", "sampling": before}])
    assert [sampling_of(row) for row in read_jsonl(path)] == [None, sampling]


@pytest.mark.parametrize(
    ("path", "temperature"), [(RESPONSES, 1), (HELD_OUT, 1), (HELD_OUT_GREEDY, 0)]
)
def test_the_demo_s_responses_say_it_and_have_no_date(path: Path, temperature: float):
    content = (ROOT / path).read_bytes()
    assert content[3] == 0 and content[4:8] == bytes(4)  # neither a file name nor a time
    rows = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    assert {sampling_of(row) for row in rows} == {Sampling(temperature)}


def test_the_demo_s_greedy_responses_answer_its_held_out_prompts():
    sampled, greedy = (list(read_jsonl(ROOT / path)) for path in (HELD_OUT, HELD_OUT_GREEDY))
    for one, other in zip(sampled, greedy, strict=True):
        assert one["id"] == other["id"]
        assert one["conversations"][0] == other["conversations"][0]
