"""Every kind of damage to a file of a checkpoint is found and named."""

from pathlib import Path

import pytest

from maxtrain.data.integrity import MANIFEST, damage, strangers, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "arrays" / "d").mkdir(parents=True)
    (tmp_path / "arrays" / "d" / "data").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "record.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_undamaged(folder: Path) -> None:
    assert damage(folder) == []
    assert not list(folder.glob("*.draft"))


def test_flipped_bit(folder: Path) -> None:
    flip(folder / "arrays/d/data", 9000, bit=5)
    (line,) = damage(folder)
    assert line.startswith("arrays/d/data has changed: expected 16384 bytes, sha256 ")
    assert "; found 16384 bytes, " in line


@pytest.mark.parametrize("size", [0, 16383])
def test_truncated(folder: Path, size: int) -> None:
    path = folder / "arrays/d/data"
    path.write_bytes(path.read_bytes()[:size])
    (line,) = damage(folder)
    assert "expected 16384 bytes" in line
    assert f"; found {size} bytes, " in line


def test_missing_and_unreadable_files_and_strangers_are_all_named(folder: Path) -> None:
    (folder / "arrays/d/data").unlink()
    (folder / "record.json").unlink()
    (folder / "record.json").mkdir()
    (folder / "arrays/stray").write_text("")
    missing, unreadable = damage(folder)
    assert missing == "arrays/d/data is missing"
    assert unreadable.startswith("record.json cannot be read: ")
    assert strangers(folder) == ["arrays/stray"]


def test_deleted_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (line,) = damage(folder)
    assert "incomplete" in line


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"{}", b'{"sha256": "", "files": {}}', b'{"sha256": 1, "files": 2}'])
def test_corrupted_manifest(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    (line,) = damage(folder)
    assert "manifest.json itself is damaged" in line


def test_no_flipped_bit_in_a_manifest_changes_what_is_accepted(folder: Path) -> None:
    """A flip either shows or is in white space, which means nothing; a changed file shows with every one of them."""
    original = (folder / MANIFEST).read_bytes()
    harmless = [position for position in range(0, len(original), 3) if not _noticed(folder, original, position)]
    assert {original[position] for position in harmless} <= set(b" \n")
    flip(folder / "record.json", 0)
    assert all(_noticed(folder, original, position) for position in range(0, len(original), 17))


def _noticed(folder: Path, original: bytes, position: int) -> bool:
    (folder / MANIFEST).write_bytes(original)
    flip(folder / MANIFEST, position)
    return bool(damage(folder))


def test_a_failed_write_leaves_no_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / MANIFEST).unlink()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        write_manifest(folder)
    assert not (folder / MANIFEST).exists()
