"""The forms in which callers give prompts: texts, lists or arrays of token ids, conversations; one, or several."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config.errors import Refused

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


def is_list(value: Any) -> bool:
    """Whether a value is a list or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _listed(value: Any) -> Any:
    """A list in place of an array of any library."""
    return value.tolist() if hasattr(value, "tolist") else value


def each(prompts: Any) -> list[Any]:
    """The prompts of a call, which names one or several: it is a batch if there is a text or a list in it.

    Raises:
        Refused: they are neither a text nor a list.
    """
    if isinstance(prompts, str):
        return [prompts]
    prompts = _listed(prompts)
    if not is_list(prompts):
        raise Refused(f"prompts are texts or lists of token ids, not {prompts!r:.80}")
    return list(prompts) if not prompts or any(isinstance(item, str) or is_list(_listed(item)) for item in prompts) else [prompts]


def each_conversation(messages: Any) -> list[Any]:
    """The conversations of a call, which names one (a list of messages) or several.

    Raises:
        Refused: they are no list.
    """
    if not is_list(messages):
        raise Refused(f"a conversation is a list of messages with role and content, not {messages!r:.80}")
    return [messages] if is_conversation(messages) else list(messages)


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return is_list(prompt) and any(isinstance(item, Mapping) for item in prompt)


def token_ids(prompt: Any) -> list[int]:
    """The ids of a prompt that is given as such.

    Raises:
        Refused: it is no list or array of integers; with the place of what is none.
    """
    values = _listed(prompt)
    if not is_list(values):
        raise Refused(f"a prompt is a text or a list of token ids, not {prompt!r:.80}")
    return [_integer(value, place) for place, value in enumerate(values)]


def _integer(value: Any, place: int) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise Refused(f"a prompt of token ids has {value!r:.80} at index {place}: write integers")


def text(value: str) -> str:
    """`value`, which can be written as UTF-8.

    Raises:
        Refused: it holds half of a surrogate pair, as broken JSON and file names do.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = value[error.start]
        raise Refused(f"character {error.start} is {found!r}, half of a surrogate pair, which is no text: remove it") from None
    return value
