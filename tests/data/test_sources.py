"""Sources as users have them: cut, in another encoding, compressed otherwise, broken in one row."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.jsonl import Malformed, RowError, numbered_rows, read_jsonl

ROWS = [{"id": f"r{i}", "prompt": "é€𝄞" * i} for i in range(30)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
GOOD = '{"prompt": "hi"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", TEXT.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + TEXT.encode()),
        ("windows.jsonl", TEXT.replace("\n", "\r\n").encode()),
        ("spaced.jsonl", b"\n \n" + TEXT.replace("\n", "\n\n").encode().rstrip()),
        ("packed.jsonl.gz", gzip.compress(TEXT.encode())),
        ("members.gz", b"".join(gzip.compress(line.encode() + b"\n") for line in TEXT.split("\n"))),
        ("packed-under-another-name.jsonl", gzip.compress(b"\xef\xbb\xbf" + TEXT.encode())),
        ("plain-called.gz", TEXT.encode()),
    ],
)
def test_read(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert list(read_jsonl(path)) == ROWS


#: Name -> what the file holds, and what the error has to say of the file.
PACKED = gzip.compress(TEXT.encode(), mtime=0)
FILES = {
    "half.jsonl.gz": (PACKED[: len(PACKED) // 2], "cut or damaged after line"),
    "short.jsonl.gz": (PACKED[:-1], "cut or damaged after line 30"),
    "flipped.jsonl.gz": (PACKED[:-6] + bytes([PACKED[-6] ^ 1]) + PACKED[-5:], "cut or damaged"),
    "utf16.jsonl": (TEXT.encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
    "utf16le.jsonl": (TEXT.encode("utf-16-le"), "UTF-16LE.*iconv -f UTF-16LE"),
    "utf16be.jsonl": (TEXT.encode("utf-16-be"), "UTF-16BE.*iconv -f UTF-16BE"),
    "a.jsonl.lfs": (b"version https://git-lfs.github.com/spec/v1\noid 1\n", "LFS.*git lfs pull"),
    "a.html": (b"<!doctype html>\n<html>\n", "a web page.*download"),
    "a.jsonl.bz2": (bz2.compress(TEXT.encode()), "bzip2.*bunzip2"),
    "a.jsonl.xz": (lzma.compress(TEXT.encode()), "xz.*xz -dk"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd rest", "zstd.*zstd -d"),
    "a.parquet": (b"PAR1 rest", "Parquet.*specforge-lk data"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_otherwise_encoded_is_named_from_the_cli(
    name: str, tmp_path: Path
) -> None:
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert_named(refused_by_generate(tmp_path / name), f"{tmp_path / name} .*{said}")
    # Rows are left out, not files.
    with pytest.raises(ValueError, match=said):
        list(read_jsonl(tmp_path / name, Malformed(skip=True)))


#: What a line holds -> what the error has to say after file and line.
LINES = {
    "twice": (b'{"id": 1, "prompt": "a", "prompt": "b"}', "field 'prompt' occurs twice"),
    "latin": (b'{"id": "x", "prompt": "caf\xe9"}', "not UTF-8 .byte 0xe9 after .*LATIN1"),
    "surrogate": (
        b'{"id": "x", "prompt": "lone \\uD83D here"}',
        r"\(id 'x'\) has half a character.*\\ud83d.*field 'prompt'",
    ),
    "surrogate deep": (
        b'{"id": "x", "conversations": [{"content": ["\\udc00"]}]}',
        r"field 'conversations\[0\].content\[0\]'",
    ),
    "surrogate in a name": (b'{"a": {"\\udc00": 1}}', "half a character.*field 'a'"),
    "zeros of a crash": (b"\0" * 40, "not JSON"),
    "NUL in a text": (b'{"id": "x", "prompt": "a\0b"}', "not JSON .Invalid control"),
    "torn": (b'{"id": "x", "prom', "not JSON.*mend or remove the line"),
    "long": (b'{"id": "x", ' + b"y" * 2_000_000, "not JSON"),
    "deep": (b'{"a": ' + b"[" * 100_000, "not JSON"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    "a list": (b"[1, 2]", "must be a JSON object, got"),
    "a number": (b"7", "must be a JSON object, got"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_row_is_named_from_the_cli_or_left_out_and_counted(name: str, tmp_path: Path) -> None:
    line, said = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() * 10 + line + b"\n" + GOOD.encode() * 9)
    message = refused_by_generate(path)
    assert_named(message, rf"{path}:11\b.*{said}")
    assert len(message) < 400
    malformed = Malformed(skip=True)
    assert [place.line for place, _ in numbered_rows(path, malformed)] == [
        *range(1, 11),
        *range(12, 21),
    ]
    assert len(malformed.left_out) == 1


def test_whole_characters_are_no_surrogates(tmp_path: Path) -> None:
    """A pair of escapes is one character, and a backslash before u may be text."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}\n{"c": "\\ud83d"}\n')
    assert next(read_jsonl(path)) == {"a": "😀", "b": "\\ud83d"}
    rows = [row for _, row in numbered_rows(path, whole_characters=False)]
    assert rows[1] == {"c": "\ud83d"}
    with pytest.raises(RowError, match=":2 has half"):
        list(read_jsonl(path))


@pytest.mark.parametrize("content", ['[{"id": 1}]', '[\n{"id": 1}\n]', '{\n  "id": 1\n}'])
def test_json_that_is_not_a_line_each(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert_named(refused_by_generate(tmp_path / "rows.json"), "rows.json:1 .*jq -c")


def refused_by_generate(path: Path) -> str:
    """What `generate` says of a file of prompts, as one line."""
    arguments = ["--target", "absent", "--prompts", str(path), "--out", str(path) + ".out"]
    finished = CliRunner().invoke(app, ["generate", *arguments])
    assert finished.exit_code == 1 and isinstance(finished.exception, SystemExit)
    assert not Path(f"{path}.out").exists()
    return finished.output


def assert_named(message: str, pattern: str) -> None:
    assert message.count("\n") == 1, message
    assert re.search(pattern, message), message
