"""JSON files and what else may lie in their place."""

import json
import os

import pytest

from maxtrain.config import Refused
from maxtrain.config.json_file import MAX_DEPTH, parse_object, read_object

WRONG = {
    "a list": (b"[]", "an object"),
    "a number": (b"3", "an object"),
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"a": ', "not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not JSON"),
    "half a character": (b'{"a": "\\ud800"}', "not JSON"),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "200,000 brackets": (b"[" * 200_000, "not JSON"),
    "too many objects within each other": (b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2), "deep"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_object_is_refused_by_file(name, tmp_path):
    content, words = WRONG[name]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Refused, match=words) as refusal:
        read_object(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(refusal.value)


def test_an_object_is_read():
    value = {"a": [1, {"b": None}], "\U0001f600": "\U0001f600"}
    assert parse_object(json.dumps(value).encode(), "here") == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), "here") == value


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, words in {tmp_path: "a folder", tmp_path / "fifo": "a fifo", "/dev/zero": "a device", "a\0b": "NUL|null"}.items():
        with pytest.raises(Refused, match=words):
            read_object(path)
    with pytest.raises(Refused, match="No such file"):
        read_object(tmp_path / "absent")


def test_a_file_above_the_limit(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "x.json", limit=8) == {"a": 1}
    with pytest.raises(Refused, match="more than 7 bytes"):
        read_object(tmp_path / "x.json", limit=7)
