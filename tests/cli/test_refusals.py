"""Options that have no effect, paths and configs that are of another kind: named, at once."""

import json
import os
from pathlib import Path

import pytest
import torch
from chat_rows import GOOD, invoke, write

CAPTURE = ("capture", "--responses", "{rows}", "--config")
GENERATE = ("generate", "--prompts", "{prompts}", "--out", "{new}")
HERE, THERE = ("--target", "no/such/target"), ("--server", "http://127.0.0.1:9", "--retries", "0")
EVAL = ("eval", "--target", "no/such/target", "--draft", "kl=absent", "--out", "{new}")
DOCTOR = ("doctor", "--target", "no/such/target", "--draft", "absent")
DATA = ("data", "--source", "{set}", "--out", "{new}")
BENCHMARK, HELD_OUT = ("--benchmark", "b={rows}"), ("--held-out", "{rows}")


@pytest.fixture
def fill(tmp_path: Path):
    """Return a function that puts paths into arguments."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("text")
    released = {"id": 1, "conversation": [{"content": "a"}], "generated_message": {"content": "b"}}
    paths = {
        "rows": write(tmp_path / "rows.jsonl", [GOOD]),
        "prompts": write(tmp_path / "prompts.jsonl", [{"prompt": "hi"}]),
        "set": write(tmp_path / "set.jsonl", [released]),
        "folder": tmp_path / "folder",
        "file": tmp_path / "file.txt",
        "new": tmp_path / "new.jsonl",
    }
    return lambda *words: [str(word).format(**paths) for word in words]


#: Command, and its options that have no effect there.
UNUSED = [
    (
        (*EVAL, *BENCHMARK),
        *("--sampled-by temperature=1", "--off-policy", "--held-out-limit 3", "--max-left-out 1"),
    ),
    ((*EVAL, *HELD_OUT), "--limit 3", "--turns 2", "--max-new-tokens 9", "--max-left-out 1"),
    (
        DOCTOR,
        *("--limit 3", "--sampled-by temperature=1", "--off-policy", "--max-length 9"),
        *("--heads 2", "--tolerance 1", "--skip-malformed", "--max-left-out 1"),
    ),
    (
        (*GENERATE, *THERE),
        *("--batch-size 2", "--dtype float16", "--device cpu", "--trust-remote-code"),
    ),
    (
        (*GENERATE, *HERE),
        *("--concurrency 2", "--timeout 9", "--retries 1", "--skip-refused", "--no-extensions"),
        *("--api-key x", "--max-left-out 1"),
    ),
    ((*GENERATE, *HERE, "--temperature", "0"), "--top-k 3", "--top-p 0.5", "--seed 1"),
    (DATA, "--max-left-out 1"),
    ((*DATA, "--prompts-only"), "--completion x"),
]


@pytest.mark.parametrize(("command", *"o"), [(c, o) for c, *o in UNUSED])
def test_an_option_without_effect_is_named(command: tuple[str, ...], o: list[str], fill):
    code, plain = invoke(*fill(*command))
    assert "has no effect" not in plain
    again, output = invoke(*fill(*command, *" ".join(o).split()))
    assert again == code or command[0] == "data"
    assert output.count("has no effect w") + output.count("has no effect at") == len(o), output
    for option in o:
        assert f"{option.split()[0].replace('--no-', '--')} has no effect " in output


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ((*EVAL, *HELD_OUT, "--serving", "vllm,draft_top_k=5"), "draft_top_k=5"),
        ((*DOCTOR, "--serving", "sglang,verification=block"), "verification=block"),
        ((*GENERATE, *HERE, "--serving", "temperature=0,top_p=0.5"), "top_p=0.5"),
    ],
)
def test_a_setting_without_effect_is_named(command: tuple[str, ...], setting: str, fill):
    _, output = invoke(*fill(*command))
    assert f": {setting} has no effect in this rule, temperature=" in output


def test_what_says_nothing_of_responses_is_refused(fill):
    for command in ((*EVAL, *HELD_OUT), (*DOCTOR, *HELD_OUT)):
        code, output = invoke(*fill(*command, "--sampled-by", "vllm,draft_top_k=5"))
        assert code == 2 and "draft_top_k=5 says nothing of how responses were sampled" in output


#: Command that writes to {}, and what is meant there.
OUT = [
    ((*GENERATE[:3], "--out", "{}", *HERE), "a file"),
    ((*DATA[:3], "--out", "{}"), "a file"),
    ((*EVAL[:5], "--out", "{}", *HELD_OUT), "a file"),
    ((*DOCTOR, "--out", "{}"), "a file"),
    (("import-draft", "absent", "--target", "no/such/target", "--out", "{}"), "a folder"),
]


@pytest.mark.parametrize(("command", "meant"), OUT, ids=lambda value: value[0])
def test_another_kind_of_output_is_named_before_anything_is_done(command, meant: str, fill):
    wrong = {"a file": "{folder}", "a folder": "{file}"}[meant]
    for out in (wrong, "{file}/new"):
        code, output = invoke(*fill(*(word if word != "{}" else out for word in command)))
        assert code, output
        (path,) = fill(out.removesuffix("/new"))
        if (meant, out) == ("a file", "{folder}"):
            assert output == f"{path} is a folder, where a file is meant; name a file"
        else:
            assert output == f"{path} is a file, where a folder is meant; name another path"
        if out.endswith("new"):
            assert Path(path).read_text() == "text"


#: Name -> what a run config holds, and what is said of it.
CONFIGS = {
    "rows.json": (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "is not JSON (Extra data: line 2"),
    "yaml.txt": ("model: {}", "is not JSON (Expecting value"),
    "torn.yaml": ("model: [a", "is not YAML (expected ',' or ']', but got '<stream end>' in line"),
    "tab.yaml": ("model:\n\ta: 1", "is not YAML (found character"),
    "empty.yaml": ("", "is no run config: it has 'None', and none of the sections"),
    "list.yaml": ("- model", "is no run config: it has \"['model']\""),
    "draft.json": ('{"architectures": [], "a": 1}', "it has keys architectures, a, and none"),
    "section.yaml": ("model: 7", ": model must be a section of settings, got '7'"),
    "binary.yaml": ("model: {}".encode("utf-16"), "is no text in UTF-8"),
    "field.yaml": (
        "model: {}\ndata: {max_length: long}",
        "data.max_length='long': Input should be a valid integer",
    ),
    "unknown.yaml": (
        "data: {max_len: 7}",
        "data.max_len is not a setting; remove it, or check its name",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_another_file_than_a_run_config_is_named(name: str, fill, tmp_path: Path):
    content, words = CONFIGS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ((*CAPTURE, path), ("cost", "--config", path), (*DOCTOR, "--config", path)):
        if command[0] == "doctor" and name in ("field.yaml", "unknown.yaml"):
            continue  # which reads what it needs
        code, output = invoke(*fill(*command))
        assert code and f"{path}" in output and words in output, output
    code, output = invoke(*fill("cost", "--config", tmp_path))
    assert (
        code == 1
        and output == f"--config {tmp_path} is a folder; give the run config that is " + ("in it")
    )


#: Files of the doctor that hold something else.
FOUND = [
    ("--accepted", "counts.json", b"[1", "counts.json is not JSON"),
    ("--accepted", "counts.json", b"[1]", "must be a JSON object, got '[1]'; give one JSON object"),
    ("--accepted", "counts.json", b'{"drafts": 5, "accepted_tokens": "3"}', "accepted_tokens '3'"),
    (
        *("--accepted", "counts.json"),
        b'{"drafts": 5, "accepted_tokens": 3, "draft_tokens": "x"}',
        "draft_tokens 'x'; it needs counts",
    ),
    (
        *("--accepted", "counts.json", b'{"drafts": 5, "accepted_per_position": 3}'),
        "accepted_per_position must be a list of counts, got 3",
    ),
    ("--features", "f/a.ckpt", b"x", "a.ckpt is cut or damaged, or no feature file; run the"),
    ("--features", "f/a.ckpt", [1], "a.ckpt is cut or damaged, or no feature file"),
    ("--features", "f/a.ckpt", {"input_ids": torch.ones(1)}, "a.ckpt is cut or damaged"),
    ("--features", "f/a.txt", b"x", "no *.ckpt file; give data.hidden_states_path"),
]


@pytest.mark.parametrize(("option", "name", "content", "words"), FOUND)
def test_files_of_the_doctor_are_named(option, name, content, words, fill, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    given = path if option == "--accepted" else path.parent
    code, output = invoke(*fill(*DOCTOR, option, given))
    assert code == 2 and words in output, output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_named(fill, tmp_path: Path):
    (tmp_path / "folder").chmod(0o500)
    code, output = invoke(*fill(*DATA[:3], "--out", "{folder}/new.jsonl"))
    assert code == 1 and "may not be read or written here; change its permissions" in output


def test_sources_that_are_no_files_are_named(fill, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path / "folder", "is a folder; give one of its JSONL files"),
        (tmp_path / "pipe", "can be read once only; write it to a file first"),
        (tmp_path / "none", "does not exist; give a JSONL file"),
    ]:
        command = ("generate", *HERE, "--prompts", path, "--out", "{new}")
        code, output = invoke(*fill(*command))
        assert code == 1 and output.startswith(f"{path} {words}"), output
    for name, content in (("empty", ""), ("blank", "\n \n")):
        (tmp_path / name).write_text(content)
        code, output = invoke(
            *fill("generate", *HERE, "--prompts", tmp_path / name, "--out", "{new}")
        )
        assert code == 1 and output == (
            f"{tmp_path / name} has no rows; give a file with one JSON object a line"
        )
