"""Options that have no effect, paths and configs that are of another kind: named, at once."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from chat_rows import GOOD, invoke, write
from chat_server import running
from tiny_target import save_draft, save_target
from typer.testing import CliRunner

from specforge_lk.cli import app

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


IDS, MASK = torch.tensor([1, 2]), torch.tensor([0, 1])
FEATURES = {"input_ids": IDS, "loss_mask": MASK}
#: Option of the doctor, file, what it holds, what is said of it.
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
    ("--features", "f/a.ckpt", b"x", "a.ckpt is cut or damaged, or has no input_ids and loss_mask"),
    ("--features", "f/a.ckpt", [1], "a.ckpt is cut or damaged"),
    ("--features", "f/a.ckpt", {"input_ids": IDS}, "a.ckpt is cut or damaged"),
    ("--features", "f/a.ckpt", {**FEATURES, "input_ids": IDS / 2}, "must be whole numbers"),
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


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"layers": "x"}, "capture.json: layers must be a list of layers, got 'x'"),
        ({"layers": ["x"]}, "capture.json: layers must be a list of layers"),
        ({"stored_dtype": 7}, "capture.json: stored_dtype must be text, got '7'"),
        ({"max_length": "x"}, "capture.json: max_length must be a whole number, got 'x'"),
        ([], "capture.json must be a JSON object, got '[]'; capture again"),
    ],
)
def test_what_a_capture_says_of_itself_is_checked(manifest, words: str, fill, tmp_path: Path):
    torch.save(FEATURES, tmp_path / "a.ckpt")
    (tmp_path / "capture.json").write_text(json.dumps(manifest))
    code, output = invoke(*fill(*DOCTOR, "--features", tmp_path))
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    root = tmp_path_factory.mktemp("models")
    save_target(root / "target")
    save_draft(root / "draft")
    return "--target", root / "target", "--draft", root / "draft", "--device", "cpu"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"draft_model_config": [1]}, "model.draft_model_config must be text, got '[1]'"),
        ({"aux_hidden_state_layer_ids": 7}, "layer_ids must be a list of layers, got '7'"),
        ({"vocab_mapping_path": "{file}"}, "file.txt is cut or damaged, or has no d2t"),
    ],
)
def test_settings_that_the_doctor_reads_are_checked(model, words, models, fill, tmp_path: Path):
    model = {k: fill(v)[0] if isinstance(v, str) else v for k, v in model.items()}
    (tmp_path / "run.json").write_text(json.dumps({"model": model}))
    out = tmp_path / "report.json"
    _, output = invoke("doctor", *models, "--config", tmp_path / "run.json", "--out", out)
    outcomes = json.loads(out.read_text())["outcomes"]
    assert {o["state"] for o in outcomes if words in (o["note"] or "")} == {"not checked"}, output


def test_features_of_another_target_are_named(models, tmp_path: Path):
    torch.save({**FEATURES, "input_ids": IDS - 9}, tmp_path / "a.ckpt")
    code, output = invoke("doctor", *models, "--features", tmp_path)
    assert code == 2 and "--features: sample 0: it has token id -8, outside the target's" in output


#: Kind -> file name, what it holds, what `data` says of it.
SOURCES = {
    "no file": ("none.jsonl", None, "none.jsonl does not exist; give a file, a folder or a hub id"),
    "another kind": ("a.csv", b"id", "is none of .jsonl, .parquet, .json; rename or convert it"),
    "nothing": ("a.parquet", b"", "a.parquet is empty; download or write it again"),
    "cut parquet": ("a.parquet", b"PAR1 cut", "a.parquet cannot be read ("),
    "cut JSON": ("a.json", b'[{"id": 1', "a.json cannot be read ("),
    "a number": ("a.json", b"7", "a.json cannot be read ("),
    "cut gzip": ("a.json.gz", gzip.compress(b'[{"id": 1}]' * 99)[:-9], "a.json.gz cannot be read"),
    "another object": (
        "a.json",
        b'{"data": []}',
        "a.json:1: it has no id; its fields are ['data']",
    ),
    "an id that is none": ("a.jsonl", b'{"id": [1]}', "a.jsonl:1 (id [1]): its field id must be"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_data_are_named_in_one_line(kind: str, fill, tmp_path: Path):
    name, content, words = SOURCES[kind]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = CliRunner().invoke(app, fill("data", "--source", tmp_path / name, "--out", "{new}"))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.output.count("\n") == 1 and words in result.output, result.output


def test_prompts_and_samplings_that_are_none_are_named(fill, tmp_path: Path):
    path = write(tmp_path / "p.jsonl", [{"id": {"a": 1}, "prompt": "hi"}])
    code, output = invoke(*fill("generate", *HERE, "--prompts", path, "--out", "{new}"))
    assert code == 1 and "p.jsonl:1 (id {'a': 1}): its field id must be text or a number" in output
    for options in (("--temperature", "1e-320"), ("--serving", "temperature=1e-320")):
        code, output = invoke(*fill(*GENERATE, *HERE, *options))
        assert code and "temperature must be 0, or at least 1e-37" in output


@pytest.mark.parametrize("row", [{}, {"id": "a"}, {"id": "a", "conversations": 7}])
def test_a_file_of_responses_with_another_row_is_not_continued(row: dict, fill, tmp_path: Path):
    with running() as server:
        command = fill("generate", "--server", server.url, *GENERATE[1:])
        assert invoke(*command)[0] == 0
        path = write(tmp_path / "new.jsonl", [row])
        code, output = invoke(*command)
    assert code == 1 and f"{path}:1" in output and "is no response (" in output
    assert "remove the line, or write to a new file" in output


def test_a_file_of_data_with_another_row_is_not_continued(fill, tmp_path: Path):
    assert invoke(*fill(*DATA))[0] == 0
    write(tmp_path / "new.jsonl", [{"id": "1"}])
    code, output = invoke(*fill(*DATA))
    assert code == 1 and "new.jsonl:1 (id '1') is no row of this command" in output


def test_a_report_is_not_lost_under_its_own_tables(fill):
    for out in ("report.md", "report.png"):
        code, output = invoke(*fill(*EVAL[:5], "--out", out, *HELD_OUT))
        assert code == 2 and f"--out {out}: markdown and chart are put beside it" in output


def test_binary_files_are_no_text_in_another_encoding(fill, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x03\0\0\0\0\0\0{}\n")
    code, output = invoke(*fill("generate", *HERE, "--prompts", path, "--out", "{new}"))
    assert code == 1 and output == f"{path} is a binary file, not UTF-8 lines; give a JSONL file"
