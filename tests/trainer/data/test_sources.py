"""What a source is, by its content; what is left out of a corpus, and what ends a build."""

import gzip
import json
from pathlib import Path

import pytest
from longspan.trainer.data import text_files
from longspan.trainer.data.build import build_corpus
from longspan.trainer.data.corpus import Corpus
from longspan.trainer.data.tokenizer import ByteTokenizer
from longspan.trainer.errors import UserError

TEXTS = ["first, about attention", 'second: a "quoted" \\ [bracket} ü', "third 🙂\r\nline"]
RECORDS = [{"id": number, "text": text, "deep": {"a": [1]}} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS).encode()


def build(*sources, out, **options):
    """Build a corpus; return its texts."""
    build_corpus(list(sources), ByteTokenizer(), str(out), **options)
    corpus = Corpus(str(out), 257)
    return [
        ByteTokenizer().decode(corpus.read(number, 0, int(corpus.lengths[number])).tolist())
        for number in range(len(corpus))
    ]


@pytest.fixture
def file(tmp_path):
    """``file(name, content)`` writes a file of the folder ``in``."""

    def write(name, content):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.JSON", "a.ndjson", "A.JSONL", "a.jsonlines", "a", "a.txt", "a.data"],
)
@pytest.mark.parametrize("folder", [False, True])
def test_json_lines_under_any_name(file, tmp_path, name, folder):
    path = file(name, LINES)
    assert build(path.parent if folder else path, out=tmp_path / "out") == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        ARRAY,
        json.dumps(RECORDS, indent=2).encode(),
        json.dumps(RECORDS, ensure_ascii=False).encode(),
        "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
        b"\xef\xbb\xbf" + ARRAY,
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\r\n"),
        b"\n \n" + LINES.replace(b"\n", b"\n\n") + b"\n\n",
        LINES.rstrip(),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_arrays_objects_over_lines_marks_and_ends_of_lines(
    file, tmp_path, name, content, block, monkeypatch
):
    from longspan.trainer.data import json_values

    monkeypatch.setattr(json_values, "_BLOCK_BYTES", block)
    assert build(file(name, content), out=tmp_path / "out") == TEXTS


def zstd(content):
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(map(zstandard.compress, (content[:half], content[half:])))


def gz(content):
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


def parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "table", row_group_size=2)
    return (tmp_path / "table").read_bytes()


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gz), ("zst", zstd), ("", gz), ("", zstd)])
@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "parquet"])
def test_compressed_sources(file, tmp_path, suffix, compress, kind):
    """By their first bytes, whatever the name says; frame after frame."""
    content = {"jsonl": LINES, "json": ARRAY, "txt": "a text ü\n".encode()}.get(kind)
    path = file(f"a.{kind}.{suffix}", compress(content or parquet(tmp_path)))
    expected = ["a text ü\n"] if kind == "txt" else TEXTS
    assert build(path, out=tmp_path / "one") == expected
    assert build(path.parent, out=tmp_path / "two") == expected


@pytest.mark.parametrize("compress", [gz, zstd])
def test_compressed_data_that_is_cut_short_is_no_shorter_corpus(
    file, tmp_path, compress, monkeypatch
):
    cut = compress(LINES * 500)[:-20]
    with pytest.raises(UserError, match=r"a.jsonl.x(:\d+)?: its \w+ data is (cut short|damaged)"):
        build(file("a.jsonl.x", cut), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"a.txt.x: its \w+ data is (cut short|damaged)"):
        build(file("a.txt.x", compress(b"some text " * 9000)[:-9]), out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_zstandard_is_asked_for_where_it_is_missing(file, tmp_path, monkeypatch):
    import sys

    path = file("a.txt.zst", zstd(b"a text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        UserError, match=r"a.txt.zst: needs zstandard: pip install longspan\[zstd\]"
    ):
        build(path, out=tmp_path / "out")


def test_text_without_mark_and_with_plain_ends_of_lines(file, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 3)  # characters and ends of lines are cut
    path = file("a.txt", "\ufeffüber\r\nlines\rand\r\r\nmore 🙂\r".encode())
    assert build(path, out=tmp_path / "out") == ["über\nlines\rand\r\nmore 🙂\r"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"id,text\n1,x\n",
            r"table \(CSV or TSV\), which is not read; convert it to JSON",
        ),
        ("a.TSV.gz", gzip.compress(b"id\ttext\n", mtime=0), r"delimiter='\\t'"),
        ("a.zip", b"PK\x03\x04....", "is a ZIP archive; unpack it"),
        ("a.txt.bz2", b"BZh91AY&SY...", "compressed with bzip2"),
        ("a.txt.xz", b"\xfd7zXZ\x00...", "compressed with xz"),
        ("a.txt", "text".encode("utf-16"), "UTF-16 or UTF-32, not UTF-8 text; convert it: iconv"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\); leave it out or convert it"),
        ("a.dat", b"ab\0cd", r"a binary file \(byte 2 is NUL\)"),
        ("a.json", b'{"data": [1, 2]}', "a.json:1: has no key text; its keys are data"),
        ("a.json", b"", "no document found"),
        ("a.txt", b"\xef\xbb\xbf", "no document found in .*; left out 1 empty documents"),
        ("a.parquet", b"no", "not a Parquet file"),
    ],
)
def test_what_is_no_source_is_refused_with_the_fix(file, tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        build(file(name, content), out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_table_becomes_what_the_message_says(file, tmp_path):
    import subprocess
    import sys

    path = file("a.csv", b'id,text\n1,"one, two"\n2,"a ""b""\nc"\n')
    with pytest.raises(UserError) as caught:
        build(path, out=tmp_path / "out")
    command = str(caught.value).partition("JSON lines: ")[2]
    command = command.replace("python", sys.executable).replace("TABLE", str(path.with_suffix("")))
    subprocess.run(command, shell=True, check=True)
    lines = path.with_suffix(".jsonl")
    assert build(lines, out=tmp_path / "out") == ["one, two", 'a "b"\nc']


def test_a_folder_leaves_out_and_counts_what_is_no_text(file, tmp_path, corpus, capsys):
    file("a.txt", b"kept")
    file("b.txt", b"")
    file("c.jsonl", b'{"text": ""}\n{"text": "kept too"}\n')
    file("image.png", b"\x89PNG\r\n\x1a\n\0\0")
    file("model.dat", b"ab\0")
    file("table.csv", b"id,text\n")
    file("package.json", b'{\n "name": "x"\n}\n')
    file("old.tar.gz", gzip.compress(b"name\0\0\0", mtime=0))
    for suffix in ("bin", "idx", "json"):
        file(f"deep/small.{suffix}", Path(f"{corpus}.{suffix}").read_bytes())
    assert build(tmp_path / "in", out=tmp_path / "out") == ["kept", "kept too"]
    error = capsys.readouterr().err
    for left_out in (
        f"2 empty documents, such as {tmp_path}/in/b.txt",
        f"3 files of tokenized corpora, such as {tmp_path}/in/deep/small.bin",
        f"2 binary files, such as {tmp_path}/in/model.dat",
        "1 files that are not UTF-8 text",
        "1 tables (CSV or TSV)",
        "1 JSON files without the key text",
    ):
        assert left_out in error
    with pytest.raises(UserError, match=r"small.bin: is part of a tokenized corpus"):
        build(tmp_path / "in" / "deep" / "small.bin", out=tmp_path / "again")


def test_a_folder_of_what_is_left_out_says_so(file, tmp_path):
    file("a.json", b'{"content": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"left out 1 JSON files without the key text"):
        build(tmp_path / "in", out=tmp_path / "out")
    assert build(tmp_path / "in", out=tmp_path / "out", key="content") == ["x"] * 3


def test_text_found_in_a_folder_is_left_out_where_it_stops_being_utf8(
    file, tmp_path, monkeypatch, capsys
):
    """Far into the file: what was written of it until then is taken back."""
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 100)
    path = file("a.txt", b"text " * 20_000 + b"\xff")
    file("b.txt", b"kept")
    assert build(tmp_path / "in", out=tmp_path / "out") == ["kept"]
    assert "left out 1 files that are not UTF-8 text" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 text \(byte 100000\)"):
        build(path, out=tmp_path / "out2")


BAD = {
    b'{"text": "caf\xe9"}': "byte 14 of it, 0xe9, is not UTF-8",
    b'{"text": "a \\ud83d b"}': "has a lone surrogate, \\ud83d, at character 3 of the text",
    b'{"text": "cut': "not JSON: unterminated string at character 10",
    b"\0\0\0": "not JSON: expecting value at character 1",
    b'{"content": "x", "id": 1}': "has no key text; its keys are content, id (--key names another)",
    b'{"text": null}': "has null under the key text, not a string",
    b'{"text": 12}': "has a number under the key text, not a string",
    b'["x"]': "an array, not an object with a string under the key text",
    b'"x"': "a string, not an object",
    b"[" * 100_000: "JSON that cannot be read",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("chunk", [10, 16 << 20])
def test_a_bad_line_is_named_with_its_cause_or_skipped(
    file, tmp_path, line, chunk, monkeypatch, capsys
):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    good = [json.dumps(record).encode() for record in RECORDS]
    path = file("a.jsonl", b"\n".join([good[0], b"", line, good[1], good[2], b""]))
    with pytest.raises(UserError) as caught:
        build(path, out=tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:3: {BAD[line]}")
    assert "--skip-bad" in str(caught.value)
    assert not list(tmp_path.glob("out*"))

    assert build(path, out=tmp_path / "out", skip_bad=True) == TEXTS
    listed = (tmp_path / "out.skipped.txt").read_text()
    assert listed.startswith(f"{path}:3: {BAD[line]}")
    assert listed.count("\n") == 1
    error = capsys.readouterr().err
    assert f"skipped 1 that cannot be read, listed in {tmp_path}/out.skipped.txt" in error
    assert f"{path}:3: " in error


def test_bad_items_of_an_array_are_skipped_alone(file, tmp_path):
    items = [json.dumps(record).encode() for record in RECORDS]
    array = b"[" + b",\n".join(
        [items[0], b'{"text": "caf\xe9"}', items[1], b"{nonsense}", items[2]]
    )
    path = file("a.json", array)
    with pytest.raises(UserError, match=r"a.json:2: byte 14 of it, 0xe9"):
        build(path, out=tmp_path / "out")
    assert build(path, out=tmp_path / "out", skip_bad=True) == TEXTS
    assert (tmp_path / "out.skipped.txt").read_text().splitlines() == [
        f"{path}:2: byte 14 of it, 0xe9, is not UTF-8",
        f"{path}:4: not JSON: expecting property name enclosed in double quotes at character 2",
        f"{path}:5: the file ends inside its array",
    ]


def test_bad_rows_and_files_are_skipped(file, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", None, "two"]}), path, row_group_size=2)
    bad = file("b.txt.gz", gzip.compress(b"some text " * 99)[:-9])
    texts = build(path, bad, out=tmp_path / "out", skip_bad=True)
    assert texts == ["one", "two"]
    assert (tmp_path / "out.skipped.txt").read_text().splitlines() == [
        f"{path}: row 1 of row group 0: has null in column text, not a string",
        f"{bad}: its gzip data is cut short",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer": "bytes"}, "it has no vocab_size"),
        ({"tokenizer": 3}, "its tokenizer is 3"),
        ([1], "it is no object"),
        ({"id": 1, "text": "a record of something else"}, "it has no tokenizer"),
    ],
)
def test_a_bad_record_of_a_corpus_is_described(tmp_path, content, message):
    from longspan.trainer.data.corpus_files import read_record

    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"x.json: not the record of a corpus: {message}; build"):
        read_record(str(tmp_path / "x"))


def test_a_record_of_another_version_is_read(corpus, tmp_path):
    from longspan.trainer.data.corpus_files import read_record

    record = json.loads(Path(f"{corpus}.json").read_text())
    del record["reads_special_tokens"]
    (tmp_path / "x.json").write_text(json.dumps({**record, "later": 1}))
    assert read_record(str(tmp_path / "x")) == read_record(corpus)


def test_where_the_corpus_cannot_be_written_is_named(file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        build(file("a.txt", b"x"), out=tmp_path / "file" / "out")
