"""Conversations as text, by the Jinja template that a model's tokenizer carries."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxtrain.config.errors import Refused


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


@functools.lru_cache
def _compiled(template: str) -> Template:
    """A template, with the functions that those of Hugging Face may use; it can reach nothing else."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def check(messages: Any) -> Sequence[Mapping[str, Any]]:
    """The messages of a conversation; `Refused` if it is no list of messages with a role."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Refused(f"a conversation is a list of messages with role and content, not {messages!r:.100}")
    bad = [message for message in messages if not isinstance(message, Mapping) or not isinstance(message.get("role"), str)]
    if bad:
        raise Refused(f"a conversation is a list of messages with role and content, not {bad[0]!r:.100}")
    return messages


def render(template: str, messages: Sequence[Mapping[str, str]], *, generate: bool, **variables: Any) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: each with `role` and `content`.
        generate: whether the text ends with the beginning of an answer.
        variables: what else the template may read, such as `bos_token`.

    Raises:
        Refused: the template does not accept the messages.
    """
    try:
        return _compiled(template).render(messages=check(messages), add_generation_prompt=generate, **variables)
    except TemplateError as error:
        raise Refused(f"the model's chat template does not accept these messages: {error}") from error
