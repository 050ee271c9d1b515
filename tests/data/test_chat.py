"""Chat templates render as transformers' do, and whatever a hostile one does ends in words, in bounded time and memory."""

import os
import time

import pytest

from maxtrain.config.errors import Refused
from maxtrain.data import chat

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
FAILS = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ messages[0].nothing.more }}": "no attribute",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% include 'x' %}": "loader",
    "{% for i in %}": "Expected an expression",
    "{{ " + "(" * 20_000: "recursion",
    "{% for i in range(3) %}" * 30 + "x" + "{% endfor %}" * 30: "nested",
    "{{ raise_exception('only two roles') }}": "only two roles",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ '%10000000000d' % 1 }}": "memory",
    "{{ 'a' | center(10 ** 10) }}": "memory",
    "{{ 'a'.ljust(10 ** 10) }}": "memory",
    "{{ 'a\nb' | indent(10 ** 10) }}": "memory",
    "{{ 'a' * 10 ** 10 }}": "memory",
    "{{ [1] * 10 ** 10 }}": "memory",
    "{{ '{:>10000000000}'.format(1) }}": "memory",
    "{{ (1).to_bytes(10 ** 10, 'big') }}": "memory",
    "{{ range(9) | batch(10 ** 10, 'x') | list }}": "memory",
}
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ range(9) | slice(10 ** 10) | list }}",
)


@pytest.mark.parametrize("template", FAILS)
def test_every_failure_of_a_template_is_refused_in_words(template):
    with pytest.raises(Refused, match=f"template does not accept these messages: .*(?i:{FAILS[template]})"):
        chat.render(template, TALK, generate=True)


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_template_ends(template, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    before = time.process_time()
    with pytest.raises(Refused, match=r"more than 0\.1 seconds"):
        chat.render(template, TALK, generate=True)
    assert time.process_time() - before < 1  # what computes is not this process
    assert chat.render("{{ messages[0].content }}", TALK, generate=True) == "a"  # and the next one is rendered


def test_doubling_ends(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.6)
    double = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    with pytest.raises(Refused, match=r"memory|seconds"):
        chat.render(double, TALK, generate=True)
    with pytest.raises(Refused, match="characters of them"):
        chat.render("{{ 'x' * 17000000 }}", TALK, generate=True)


def test_what_templates_of_hugging_face_use():
    body = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    assert chat.render(body, TALK, generate=False) == "abc"
    assert (
        chat.render("{{ tools is none }}{{ add_generation_prompt }}{{ bos_token }}", TALK, generate=True, bos_token="<s>") == "TrueTrue<s>"
    )
    assert chat.render("{{ {'b': 'é<', 'a': 1} | tojson }}", TALK, generate=False) == '{"b": "é<", "a": 1}'
    assert chat.render("{{ strftime_now('%Y') | length }}", TALK, generate=False) == "4"


def test_keys_that_are_null_are_left_out():
    """A message with a tool call has content null; a template that asks for the key sees none."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert chat.render("{{ messages[0].content is defined }}{{ 'x' in messages[0].content }}", [message], generate=False) == "FalseFalse"


@pytest.mark.parametrize(
    "messages", [[], "text", None, 5, [5], ["x"], [{}], [{"content": "x"}], [{"role": 5}], [{"role": "user", "content": {1, 2}}]]
)
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(Refused, match=r"conversation|message"):
        chat.render("x", messages, generate=True)


def test_a_process_that_was_killed_is_started_anew():
    chat.render("x", TALK, generate=True)
    process = chat.PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    assert chat.render("y", TALK, generate=True) == "y"


def test_another_process_of_a_fork_has_its_own():
    chat.render("x", TALK, generate=True)
    child = os.fork()
    if child == 0:
        os._exit(chat.render("y", TALK, generate=True) != "y")
    assert os.waitpid(child, 0)[1] == 0
    assert chat.render("z", TALK, generate=True) == "z"
