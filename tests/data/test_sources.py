"""Documents are deterministic and complete; bad data is refused with file, line and remedy."""

import bz2
import gzip
import json
import lzma
import os
import re
import sysconfig

import pytest

from maxtrain.config.errors import Refused
from maxtrain.config.schema import Source
from maxtrain.data import documents as texts
from maxtrain.data import sources
from maxtrain.data.sources import documents, fingerprint


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


GOOD = line({"text": "good"})
BAD = {  # file name, content, keys of the source, what the message must say
    "corrupt line": ("a.jsonl", GOOD + b'{"text": "cut o\n' + GOOD, {}, ["a.jsonl:2", "JSON", "correct or remove"]),
    "deeply nested line": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", {}, ["a.jsonl:2", "JSON"]),
    "blank line": ("a.jsonl", GOOD + b"\n" + GOOD, {}, ["a.jsonl:2", "JSON"]),
    "not an object": ("a.jsonl", GOOD + b"[1]\n", {}, ["a.jsonl:2", "list", "object"]),
    "missing field": ("a.jsonl", GOOD + line({"body": "x", "id": 1}), {}, ["a.jsonl:2", "'text'", "'body', 'id'", "field"]),
    "field of another type": ("a.jsonl", GOOD + line({"text": 7}), {}, ["a.jsonl:2", "'text' is a JSON int"]),
    "empty text": ("a.jsonl", GOOD + line({"text": ""}), {}, ["a.jsonl:2", "empty", "remove"]),
    "lone surrogate": ("a.jsonl", GOOD + b'{"text": "ab\\ud800"}\n', {}, ["a.jsonl:2", "surrogate", "character 2"]),
    "jsonl not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', {}, ["a.jsonl:2", f"byte {len(GOOD) + 10} (0xff)", "UTF-8"]),
    "empty jsonl": ("a.jsonl", b"", {}, ["a.jsonl", "empty", "remove"]),
    "empty text file": ("a.txt", b"", {}, ["a.txt", "empty", "pattern"]),
    "blanks only": ("a.txt", b" \n\t\n", {}, ["a.txt", "empty", "pattern"]),
    "text not UTF-8": ("a.txt", b"one\ntwo \xe4\n", {}, ["a.txt:2", "byte 8 (0xe4)", "convert"]),
    "truncated gzip": ("a.txt.gz", gzip.compress(os.urandom(999).hex().encode())[:-20], {}, ["a.txt.gz", "gzip", "again"]),
    "truncated gzip of jsonl": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], {}, ["a.jsonl.gz", "gzip", "again"]),
    "no gzip at all": ("a.txt.gz", b"plain", {}, ["a.txt.gz", "gzip"]),
    "missing path": ("a.txt", b"good", {"path": "absent"}, ["absent", "no such file or folder", "path"]),
    "no match": ("a.txt", b"good", {"pattern": "*.md"}, ["no file matches '*.md'", "pattern"]),
    "pattern of another root": ("a.txt", b"good", {"pattern": "/*"}, ["pattern '/*'"]),
    "nothing held out": (
        "a.txt",
        b"good",
        {"split": "heldout", "heldout_fraction": 1e-9},
        ["split heldout has no document", "heldout_fraction"],
    ),
    "key twice": ("a.jsonl", GOOD + b'{"text": "a", "text": "b"}\n', {}, ["a.jsonl:2", "the key 'text' is there twice"]),
    "one array over lines": ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]', {}, ["a.jsonl:1", "one JSON array", "object in one line"]),
    "one object over lines": ("a.jsonl", b'{\n"text": "a"\n}', {}, ["a.jsonl:1", "one JSON object", "in one line"]),
    "array in one line": ("a.jsonl", b'[{"text": "a"}]', {}, ["a.jsonl:1", "array", "a line of its own"]),
    "parquet": ("a.txt", b"PAR1\x15\x04\x15\x80\x80\xffPAR1", {}, ["a.txt: a Parquet file", "jsonl"]),
    "zstd": ("a.jsonl.zst", bytes.fromhex("28b52ffd0458") + b"\x80junk", {}, ["a.jsonl.zst: compressed with zstd", "gzip"]),
    "xz": ("a.txt", lzma.compress(b"text"), {}, ["a.txt: compressed with xz"]),
    "bzip2": ("a.txt", bz2.compress(b"text"), {}, ["a.txt: compressed with bzip2"]),
    "UTF-16": ("a.txt", "text".encode("utf-16"), {}, ["a.txt: UTF-16 text: convert it to UTF-8"]),
    "pattern with a name that is half **": ("a.txt", b"good", {"pattern": "**.txt"}, ["pattern '**.txt'"]),
    "pattern that leaves the folder": ("a.txt", b"good", {"pattern": "../*"}, ["pattern '../*'"]),
    "limit below the first": ("a.txt", b"good", {"max_bytes": 3}, ["max_bytes=3", "raise max_bytes"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(tmp_path, case):
    name, content, keys, says = BAD[case]
    (tmp_path / name).write_bytes(content)
    keys = {"path": str(tmp_path), **keys}
    with pytest.raises(Refused) as refusal:
        list(documents(Source(kind="jsonl" if ".jsonl" in name else "text", **keys)))
    for part in says:
        assert part in str(refusal.value)


def test_unreadable_data_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").symlink_to("absent")
    source = Source(kind="text", path=str(tmp_path))
    with pytest.raises(Refused, match=r"b\.txt: cannot be read: No such file"):
        list(documents(source))
    (tmp_path / "b.txt").unlink()

    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # chmod would not stop a test that runs as root
        patch.setattr(os, "open", denied)
        with pytest.raises(Refused, match=r"a\.txt: cannot be read: Permission denied"):
            list(documents(source))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(Refused, match="cannot be read: Permission denied"):
            list(documents(source))


def test_text_is_taken_byte_for_byte_sorted_and_decompressed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_bytes("\ufeffä\r\n\x00".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "skip.md").write_bytes(b"")
    found = list(documents(Source(kind="text", path=str(tmp_path), pattern="**/*.txt*")))
    assert found == [("zipped", "b.txt.gz"), ("\ufeffä\r\n\x00", "sub/z.txt")]
    assert list(documents(Source(kind="text", path=str(tmp_path / "b.txt.gz")))) == [("zipped", "b.txt.gz")]


def test_files_below_a_folder(tmp_path):
    """Links are followed, in circles once; what begins with a dot is named and left out unless the pattern says it."""
    root = tmp_path / "corpus"
    for name in ("corpus/a.txt", "corpus/sub/b.txt", "corpus/.git/HEAD", "corpus/.DS_Store", "corpus/sub/.x/c.txt", "store/d.txt", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (root / "web").symlink_to(tmp_path / "store")
    (root / "web" / "back").symlink_to(root)
    (root / "e.txt").symlink_to(tmp_path / "e.txt")

    def taken(pattern="**/*"):
        return [document.name for document in documents(Source(kind="text", path=str(root), pattern=pattern))]

    assert taken() == taken("**") == ["a.txt", "e.txt", "sub/b.txt", "web/d.txt"]
    assert taken("*") == ["a.txt", "e.txt"]
    assert taken("*/*.txt") == ["sub/b.txt", "web/d.txt"]
    assert taken("s*/**/?.txt") == ["sub/b.txt"]
    assert taken("**/[ab].txt") == ["a.txt", "sub/b.txt"]
    assert taken(".git/*") == [".git/HEAD"]
    assert taken("**/.x/*") == ["sub/.x/c.txt"]
    (note,) = sources.notes(Source(kind="text", path=str(root)))
    assert note.endswith("3 left out for a dot in front (.DS_Store, .git, sub/.x); a pattern with one takes them")
    assert sources.notes(Source(kind="text", path=str(root / "a.txt"), pattern="*.txt")) == [
        f"pattern=*.txt has no effect: {root / 'a.txt'} is a file"
    ]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / ".hidden").write_text("x")
    with pytest.raises(Refused, match=r"no file matches '\*\*/\*' but what begins with a dot \(\.hidden\)"):
        list(documents(Source(kind="text", path=str(tmp_path / "only"))))
    os.mkfifo(root / "fifo")
    with pytest.raises(Refused, match="fifo: it is a fifo"):
        fingerprint(Source(kind="text", path=str(root)), str(tmp_path / "cache"))


def test_large_files_are_read_in_chunks(tmp_path, monkeypatch):
    """With the same text, size, part and bytes to blame as a file that is read whole."""
    text = "".join(f"{i}: äöü 😀 line\n" for i in range(2000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    whole = list(documents(Source(kind="text", path=str(tmp_path))))
    monkeypatch.setattr(sources, "LARGE", 1000)
    monkeypatch.setattr(texts, "CHUNK", 37)
    large = list(documents(Source(kind="text", path=str(tmp_path))))
    assert all(isinstance(document, texts.LargeDocument) for document in large)
    for one, other in zip(whole, large, strict=True):
        assert (one.text, one.name, one.num_bytes, one.hash) == (other.text, other.name, other.num_bytes, other.hash)
    bad = text.encode()
    at = bad.index("😀".encode(), 20_000)
    path.write_bytes(bad[:at] + b"\xff" + bad[at + 1 :])
    says = f"a.txt:{bad.count(10, 0, at) + 1}: byte {at} (0xff) is not valid UTF-8"
    for limit in (1000, 10**6):
        monkeypatch.setattr(sources, "LARGE", limit)
        with pytest.raises(Refused, match=re.escape(says)):
            list(map(str, (document.text for document in documents(Source(kind="text", path=str(path))))))
    (tmp_path / "c.jsonl").write_bytes(GOOD + line({"text": "x" * 2000}))
    monkeypatch.setattr(sources, "LARGE", 1000)
    with pytest.raises(Refused, match=r"c.jsonl:2: longer than 1,000 bytes"):
        list(documents(Source(kind="jsonl", path=str(tmp_path / "c.jsonl"))))


def test_jsonl_reads_its_field_and_names_the_line(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line({"body": "one"}) + b'{"body": "\\ud83d\\ude00"}'))
    found = list(documents(Source(kind="jsonl", path=str(tmp_path), field="body")))
    assert found == [("one", "a.jsonl.gz:1"), ("😀", "a.jsonl.gz:2")]


def test_stdlib_has_sources_without_tests_and_copies(tmp_path, monkeypatch):
    names = [document.name for document in documents(Source(kind="stdlib"))]
    assert "os.py" in names
    assert "unittest/case.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    for name, text in {"b.py": "x", "a.py": "x", "test/c.py": "y", "site-packages/d.py": "z", "e/__init__.py": "", "f.txt": "w"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(documents(Source(kind="stdlib"))) == [("x", "a.py")]


def test_split_is_a_partition_by_content(tmp_path):
    every = list(documents(Source(kind="synthetic", num_documents=200)))
    parts = {
        split: list(documents(Source(kind="synthetic", num_documents=200, split=split, heldout_fraction=0.25)))
        for split in ("train", "heldout")
    }
    assert sorted(parts["train"] + parts["heldout"]) == sorted(every)
    assert 30 <= len(parts["heldout"]) <= 70
    for number, document in enumerate(reversed(every)):  # under other names and in another order, the same texts are held out
        (tmp_path / f"{number:03}.txt").write_text(document.text)
    moved = documents(Source(kind="text", path=str(tmp_path), split="heldout", heldout_fraction=0.25))
    assert sorted(document.text for document in moved) == sorted(document.text for document in parts["heldout"])


def test_max_bytes_takes_whole_documents_from_the_front():
    every = list(documents(Source(kind="synthetic", num_documents=50)))
    some = list(documents(Source(kind="synthetic", num_documents=50, max_bytes=3000)))
    assert some == every[: len(some)]
    assert sum(len(d.text) for d in some) <= 3000 < sum(len(d.text) for d in every[: len(some) + 1])


def test_synthetic_documents_have_bounded_length_and_are_true():
    found = list(documents(Source(kind="synthetic", num_documents=100, document_length=300)))
    assert len({document.text for document in found}) == 100
    assert 200 < max(len(document.text) for document in found) <= 300
    sums = [row for document in found for row in document.text.splitlines()[:-1] if "=" in row]
    assert sums
    assert all(eval(row.replace("=", "==")) for row in sums)


def test_fingerprint_follows_content_and_nothing_else(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    os.utime(tmp_path / "two" / "a.txt", (0, 0))
    cache = str(tmp_path / "cache")
    one, two = (Source(kind="text", path=str(tmp_path / folder)) for folder in ("one", "two"))
    first = fingerprint(one, cache)
    assert fingerprint(two, cache) == first
    assert fingerprint(one.model_copy(update={"weight": 3.0}), cache) == first
    assert fingerprint(one.model_copy(update={"max_bytes": 3}), cache) != first
    (tmp_path / "two" / "a.txt").write_text("diff")  # same size and time of change
    os.utime(tmp_path / "two" / "a.txt", (0, 0))
    assert fingerprint(two, cache) != first

    later = sources.time.time_ns() + 10**10
    monkeypatch.setattr(sources.time, "time_ns", lambda: later)
    fingerprint(one, cache)
    monkeypatch.setattr(sources.hashlib, "file_digest", None)  # what has not been touched for a while is not read again
    assert fingerprint(one, cache) == first


@pytest.mark.parametrize(
    ("pattern", "cache", "refused"),
    [("**/*", "cache", True), ("**/*.json", "cache", True), ("*/*", ".", False), ("**/*.txt", "cache", False), ("**/*", ".cache", False)],
)
def test_prepared_data_is_never_taken_for_text(tmp_path, pattern, cache, refused):
    """A cache within the source's folder is refused before anything is written, unless the pattern leaves its files out."""
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "a.json"):
        (tmp_path / "sub" / name).write_text("text")
    source = Source(kind="text", path=str(tmp_path), pattern=pattern)
    if not refused:
        fingerprint(source, str(tmp_path / cache))
        return
    with pytest.raises(Refused, match=re.escape(f"data.cache_dir={tmp_path / cache} lies in")):
        fingerprint(source, str(tmp_path / cache))
    assert os.listdir(tmp_path) == ["sub"]


@pytest.mark.parametrize("content", [b"\xff" * 64, b"", b"0" * 31, b"0" * 64, b"g" * 32])
def test_a_damaged_note_of_a_fingerprint_is_not_believed(tmp_path, monkeypatch, content):
    (tmp_path / "a.txt").write_text("same")
    later = sources.time.time_ns() + 10**10
    monkeypatch.setattr(sources.time, "time_ns", lambda: later)
    source, cache = Source(kind="text", path=str(tmp_path / "a.txt")), str(tmp_path / "cache")
    first = fingerprint(source, cache)
    (memo,) = (tmp_path / "cache" / "content").iterdir()
    kept = memo.read_text()
    memo.write_bytes(content)
    assert fingerprint(source, cache) == first
    assert memo.read_text() == kept
    memo.write_text(kept[:32])  # as earlier versions wrote it
    monkeypatch.setattr(sources.hashlib, "file_digest", None)
    assert fingerprint(source, cache) == first
