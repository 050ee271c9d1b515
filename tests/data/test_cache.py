"""A folder of the cache is used as it was written, or made anew, and what was wrong with it is said."""

from pathlib import Path

import pytest

from maxtrain.config.errors import Refused
from maxtrain.data import integrity
from maxtrain.data.cache import build_once
from maxtrain.data.integrity import MANIFEST

CONTENT = bytes(range(200))


def load(folder: Path) -> bytes:
    content = (folder / "content").read_bytes()
    if len(content) != len(CONTENT):
        raise ValueError(f"content has {len(content)} bytes")
    return content


class Writer:
    def __init__(self, content: bytes = CONTENT):
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "content").write_bytes(self.content)


@pytest.fixture
def folder(tmp_path):
    build_once(tmp_path / "made", load, Writer())
    return tmp_path / "made"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["content", MANIFEST])
def test_any_flipped_byte_is_found_and_the_folder_made_anew(folder, capsys, name):
    for position in range(0, (folder / name).stat().st_size, 37):
        flip(folder / name, position)
        harmless = name == MANIFEST and not integrity.damage(folder)  # white space
        writer = Writer()
        assert build_once(folder, load, writer) == CONTENT
        assert (writer.calls, "damaged, so it is made anew" in capsys.readouterr().err) == ((0, False) if harmless else (1, True))


def test_missing_and_cut_files_are_found(folder, capsys):
    for harm in (lambda path: path.unlink(), lambda path: path.write_bytes(CONTENT[:-1])):
        harm(folder / "content")
        writer = Writer()
        assert build_once(folder, load, writer) == CONTENT
        assert writer.calls == 1
        assert "content" in capsys.readouterr().err


def test_a_stranger_does_not_matter(folder):
    (folder / ".DS_Store").write_text("")
    writer = Writer()
    assert build_once(folder, load, writer) == CONTENT
    assert writer.calls == 0


def test_what_has_no_hashes_yet_is_used_and_hashed_and_said_once(folder, capsys):
    (folder / MANIFEST).unlink()
    for times in (1, 0):
        writer = Writer()
        assert build_once(folder, load, writer, lambda _: []) == CONTENT
        assert writer.calls == 0
        assert capsys.readouterr().err.count("without hashes") == times
    assert not integrity.damage(folder)


@pytest.mark.parametrize("harm", ["cut", "content"])
def test_what_has_no_hashes_and_cannot_be_right_is_made_anew(folder, capsys, harm):
    (folder / MANIFEST).unlink()
    if harm == "cut":
        (folder / "content").write_bytes(b"1")
    else:
        flip(folder / "content", 3)
    assert build_once(folder, load, Writer(), lambda found: [] if found == CONTENT else ["another content"]) == CONTENT
    assert ("content has 1 bytes" if harm == "cut" else "another content") in capsys.readouterr().err


def test_what_is_made_wrong_is_not_kept(tmp_path):
    with pytest.raises(Refused, match="made is wrong: not that"):
        build_once(tmp_path / "made", load, Writer(), lambda _: ["not that"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_sizes_of_large_files_are_compared_at_the_start_and_all_when_asked(folder, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK", 64)
    build_once(folder, load, Writer(), whole=True)  # its hashes are of other blocks
    flip(folder / "content", 100)
    assert build_once(folder, load, Writer()) != CONTENT
    assert build_once(folder, load, Writer(), whole=True) == CONTENT
    (folder / "content").write_bytes(CONTENT[:-1])
    assert build_once(folder, load, Writer()) == CONTENT


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("12 requested and 3 written"), "12 requested and 3 written; set data.cache_dir to a folder, one with room"),
        (OSError(28, "No space left on device"), "No space left on device; .*one with room"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: cannot be written: Permission denied; .*one that can be written"),
    ],
)
def test_an_error_says_what_it_is(tmp_path, error, words):
    def write(folder: Path) -> None:
        raise error

    with pytest.raises(Refused, match=words):
        build_once(tmp_path / "made", load, write)
