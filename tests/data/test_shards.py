"""Prepared shards hold every document once, are found again, and survive kill -9, damage and company."""

import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from maxtrain.config.errors import Refused
from maxtrain.config.schema import Source
from maxtrain.data import integrity, shards
from maxtrain.data.shards import Shard, prepare
from maxtrain.data.sources import documents
from maxtrain.data.tokenizer import ByteTokenizer

SOURCE = Source(kind="synthetic", num_documents=60, document_length=80)


def texts(shard: Shard) -> list[str]:
    """The documents of a shard, decoded."""
    found = []
    for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
        tokens = shard.tokens[begin:end]
        assert (tokens[0], tokens[-1]) == (256, 257)
        found.append(ByteTokenizer().decode(tokens.tolist()))
    return found


def test_shard_holds_every_document_once_in_a_fixed_random_order(tmp_path, monkeypatch):
    expected = [document.text for document in documents(SOURCE)]
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path / "one"))
    assert sorted(texts(shard)) == sorted(expected)
    assert texts(shard) != expected
    assert (shard.num_documents, shard.num_bytes) == (60, sum(map(len, expected)))
    assert shard.num_tokens == shard.num_bytes + 2 * 60 == len(shard.tokens) == shard.offsets[-1]
    assert shard.tokens.dtype == np.uint16
    monkeypatch.setattr(shards, "CHUNK", 100)  # how much is tokenised together does not show
    again = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path / "two"))
    assert texts(again) == texts(shard)
    assert again.fingerprint == shard.fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path, jsonl, characters):
    shard = prepare("s", jsonl(["a\uffff"]), characters, str(tmp_path / "cache"))
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens[:].tolist() == [0, 97, 0xFFFF, 1]


def test_window_reads_the_shard_as_a_ring(tmp_path):
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    twice = np.concatenate([shard.tokens, shard.tokens])
    for start in (0, 7, shard.num_tokens - 5):
        tokens, begins = shard.window(start, 40)
        assert np.array_equal(tokens, twice[start : start + 40])
        assert np.array_equal(begins, twice[start : start + 40] == 256)


def test_prepared_once_and_again_when_anything_changes(tmp_path, monkeypatch, characters):
    written = []
    monkeypatch.setattr(shards, "_write", lambda *args, write=shards._write: (written.append(args[0]), write(*args)))
    for name, source, tokenizer in [
        ("a", SOURCE, ByteTokenizer()),
        ("hit", SOURCE, ByteTokenizer()),
        ("b", SOURCE.model_copy(update={"max_bytes": 900}), ByteTokenizer()),
        ("c", SOURCE, characters),
    ]:
        prepare(name, source, tokenizer, str(tmp_path))
    assert written == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["tokens", "offsets", "meta.json"])
def test_damaged_shards_are_made_again(tmp_path, name):
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    expected = texts(shard)
    with open(shard.folder / name, "r+b") as file:
        file.truncate(11)
    assert texts(prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))) == expected


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 64 bytes, so that a small shard has many."""
    monkeypatch.setattr(integrity, "BLOCK", 64)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens", "offsets"])
def test_a_damaged_block_is_made_anew_before_it_is_used(tmp_path, name, blocks, capsys):
    folder = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path)).folder
    for position in range(0, (folder / name).stat().st_size, 487):
        want = [array.tolist() for array in Shard(folder).window(0, Shard(folder).num_tokens)]
        flip(folder / name, position)
        shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
        assert [array.tolist() for array in shard.window(0, shard.num_tokens)] == want
        assert f"{name} has changed" in capsys.readouterr().err
        assert not integrity.damage(folder)


def test_only_what_is_read_is_compared(tmp_path, blocks):
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    want = shard.tokens[:64]
    flip(shard.folder / "tokens", 1000)
    again = pickle.loads(pickle.dumps(prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))))
    assert (again.tokens[:64] == want).all()
    assert integrity.damage(shard.folder)
    assert again.tokens[500] == shard.tokens[500]
    assert not integrity.damage(shard.folder)


def test_a_damaged_block_whose_source_has_changed_is_refused(tmp_path, jsonl, blocks):
    source = jsonl(["a" * 200, "b" * 300])
    shard = prepare("s", source, ByteTokenizer(), str(tmp_path / "cache"))
    jsonl(["a" * 200, "c" * 300])
    flip(shard.folder / "tokens", 1)
    with pytest.raises(Refused, match="what it was made of has changed"):
        shard.window(0, 100)


@pytest.mark.parametrize("name", ["tokens", "offsets", "meta.json"])
def test_a_shard_without_hashes_is_checked_by_its_content(tmp_path, name, capsys):
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    want = texts(shard)
    (shard.folder / integrity.MANIFEST).unlink()
    match name:
        case "tokens":
            content = bytearray((shard.folder / "tokens").read_bytes())
            content[200:202] = np.uint16(258).tobytes()
            (shard.folder / "tokens").write_bytes(content)
        case "offsets":
            offsets = np.fromfile(shard.folder / "offsets", np.int64)
            offsets[7] = 2**40
            offsets.tofile(shard.folder / "offsets")
        case _:
            text = (shard.folder / "meta.json").read_text()
            (shard.folder / "meta.json").write_text(text.replace("uint16", "float16"))
    assert texts(prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))) == want
    assert "made anew" in capsys.readouterr().err


def test_bad_data_leaves_nothing(tmp_path, jsonl):
    source = jsonl(["good"])
    with open(source.path, "a") as file:
        file.write("{")
    with pytest.raises(Refused, match=r"documents\.jsonl:2"):
        prepare("s", source, ByteTokenizer(), str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache" / "shards").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"cache_dir"):
        prepare("s", SOURCE, ByteTokenizer(), str(tmp_path / "file"))


def test_of_two_at_once_one_writes_and_the_other_waits(tmp_path, monkeypatch):
    written = []

    def slow(*args, write=shards._write):
        time.sleep(0.2)
        written.append(write(*args))

    monkeypatch.setattr(shards, "_write", slow)
    threads = [threading.Thread(target=prepare, args=("s", SOURCE, ByteTokenizer(), str(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


KILLED = """
import sys, time
from maxtrain.config.schema import Source
from maxtrain.data import integrity, shards
from maxtrain.data.tokenizer import ByteTokenizer

class Stuck(ByteTokenizer):
    def encode_batch(self, texts):
        if self.__dict__.setdefault("calls", []):
            time.sleep(600)
        self.calls.append(1)
        return super().encode_batch(texts)

shards.CHUNK = 500
shards.prepare("s", Source(kind="synthetic", num_documents=60, document_length=80), Stuck(), sys.argv[1])
"""


def test_kill_9_leaves_nothing_that_is_taken_for_good(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    folder = tmp_path / "shards"
    try:
        while not list(folder.glob("*.draft/unshuffled")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = [path for path in folder.iterdir() if not path.suffix]
    assert not finished
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    assert sorted(texts(shard)) == sorted(document.text for document in documents(SOURCE))
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]  # the dead process's draft is cleared away


def test_progress_is_shown_on_a_terminal_when_it_takes_long(tmp_path, monkeypatch, capfd):
    prepare("quiet", SOURCE, ByteTokenizer(), str(tmp_path / "one"))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(shards, "SHOW_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare("visible", SOURCE, ByteTokenizer(), str(tmp_path / "two"))
    assert "preparing visible" in capfd.readouterr().err


def test_fingerprint_is_the_folders_name(tmp_path):
    shard = prepare("s", SOURCE, ByteTokenizer(), str(tmp_path))
    assert Path(shard.folder).name == shard.fingerprint


def test_standard_error_may_be_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert prepare("s", SOURCE, ByteTokenizer(), str(tmp_path)).num_documents == 60


def resident_files():
    """Bytes of mapped files that this process has in memory."""
    return 1000 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """That of the texts and tokens, which tracemalloc sees; the 192 MB of ids of one document, or of many, are never held together."""
    if kind == "text":
        (tmp_path / "text").write_text("0123456789 abcd\n" * 3_000_000)
    else:
        (tmp_path / "text").write_text(('{"text": "' + "0123456789abcde " * 2000 + '"}\n') * 1500)
    mapped = resident_files()
    tracemalloc.start()
    try:
        shard = prepare("s", Source(kind=kind, path=str(tmp_path / "text")), ByteTokenizer(), str(tmp_path / "cache"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shard.num_bytes == 48_000_000
    assert resident_files() - mapped < 40_000_000  # nor does what was checked stay in memory
    assert peak < 40_000_000  # two blocks of 16 MiB, of which hashes are made
