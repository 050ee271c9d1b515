"""The forms of prompts: what is one and what is several, and which integers, texts and lines are taken."""

import os

import numpy as np
import pytest

from maxtrain.config.errors import Refused
from maxtrain.serving import lines
from maxtrain.serving.prompts import each, each_conversation, is_conversation, text, token_ids

MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("ab", 1),
        ([1, 2], 1),
        ((1, 2), 1),
        (range(3), 1),
        (np.array([1, 2]), 1),
        ([1, None], 1),
        ([True, 2], 1),
        (["ab"], 1),
        (["ab", [1], 5, None], 4),
        ([5, "ab"], 2),
        (np.array([[1, 2], [3, 4]]), 2),
        ([np.array([1, 2]), [3]], 2),
        ([[]], 1),
        ([], 0),
    ],
)
def test_one_or_several(prompts, count):
    assert len(each(prompts)) == count


@pytest.mark.parametrize("prompts", [5, None, 1.5, {"prompt": "x"}, b"ab", {1, 2}])
def test_what_is_no_prompt_at_all(prompts):
    with pytest.raises(Refused, match="prompts are texts or lists of token ids"):
        each(prompts)


def test_one_conversation_or_several():
    assert each_conversation([MESSAGE]) == [[MESSAGE]]
    assert len(each_conversation([[MESSAGE], None, "x", []])) == 4
    assert is_conversation([MESSAGE])
    assert not any(map(is_conversation, ("x", [1], [], None, MESSAGE)))
    for wrong in (MESSAGE, "x", None):
        with pytest.raises(Refused, match="a conversation is a list of messages"):
            each_conversation(wrong)


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8), [np.int64(1), np.array(2)], range(1, 3)])
def test_integers_are_taken(ids):
    found = token_ids(ids)
    assert found == [1, 2]
    assert {type(value) for value in found} == {int}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5], "1.5 at index 0"),
        ([True, 2], "True at index 0"),
        ([1, None], "None at index 1"),
        ([[1]], r"\[1\] at index 0"),
        ([1, "2"], "'2' at index 1"),
        (np.array([1.0]), "1.0 at index 0"),
        (np.array([[1]]), r"\[1\] at index 0"),
        (np.array([True]), "True at index 0"),
        (5, "not 5"),
        (None, "not None"),
        (b"ab", "not b'ab'"),
        (np.array(5), "a text or a list of token ids"),
        ({"a": 1}, "not {'a': 1}"),
    ],
)
def test_what_is_no_token_is_refused_by_index(ids, message):
    with pytest.raises(Refused, match=message):
        token_ids(ids)


def test_half_a_character_is_no_text():
    assert text("aé€🙂") == "aé€🙂"
    with pytest.raises(Refused, match=r"character 1 is '\\ud83d', half of a surrogate pair"):
        text("a\ud83d")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: not JSON"),
        ("[" * 10**5, r"a\.jsonl:2: not JSON"),
        ("[1]", "write an object"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"prompt": {"x": 1, "x": 2}}', "the key 'x' is there twice"),
        ('{"prompt": NaN}', "NaN is no number"),
        ('{"prompt": "a", "best_of": 2}', "unknown key best_of; allowed are prompt, stop"),
    ],
)
def test_mistakes_in_json_lines_are_named_by_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(Refused, match=message):
        list(lines.objects(str(tmp_path / "a.jsonl"), ("prompt", "stop")))


def test_a_line_ends_where_a_line_break_is(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "a\u2028b\x0cc"}\r\n\n{"prompt": "d"}'.encode().replace(b"\x0c", b"\\f"))
    assert [(number, item["prompt"]) for number, item in lines.objects(str(tmp_path / "a.jsonl"), ("prompt",))] == [
        (1, "a\u2028b\x0cc"),
        (3, "d"),
    ]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("nowhere", "a\0b", str(tmp_path / "latin.txt")):
        with pytest.raises(Refused, match=r"cannot be read|a path has no character NUL"):
            lines.read(name)
    for name in (".", str(tmp_path / "fifo"), "/dev/zero"):  # which would never end
        with pytest.raises(Refused, match="a regular file is expected"):
            lines.read(name)
