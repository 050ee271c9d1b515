"""What a conversation says reaches the template, or is refused by name."""

import pytest

from maxtrain.config.errors import Refused
from maxtrain.data.conversation import read_by

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m.content }}{% endfor %}"
TOOLS = PLAIN + "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.name }}"
PARTS = PLAIN + "{% for part in m.content %}{{ part.text }}{% endfor %}"
USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}


def test_what_the_template_reads_is_kept():
    assert read_by(PLAIN, [USER]) == [USER]
    assert read_by(TOOLS, [USER, CALL, {**USER, "name": "bob"}]) == [USER, CALL, {**USER, "name": "bob"}]
    assert read_by(PLAIN, [{**USER, "name": None}]) == [{**USER, "name": None}]


def test_parts_of_text_are_put_together_where_the_template_knows_none():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert read_by(PLAIN, [parts])[0]["content"] == "a\nb"
    assert read_by(PARTS, [parts])[0]["content"] == parts["content"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**USER, "weight": 0}, "message 2: the model's chat template does not read 'weight'"),
        ({**USER, "name": "bob"}, "does not read 'name'"),
        (CALL, "does not read 'tool_calls'"),
        ({"role": "user"}, "message 2: content is missing"),
        ({"role": "user", "content": None}, "content is missing"),
        ({"role": "user", "content": 5}, "content is a text or a list of parts, not 5"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            "part 2: .* not 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "part 1"),
        ({"role": "user", "content": ["a"]}, "part 1: .* not 'a'"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}, "part 1: 'cache_control' is not read"),
    ],
)
def test_what_it_does_not_read_is_refused_by_name(message, said):
    with pytest.raises(Refused, match=said):
        read_by(PLAIN, [USER, message])
