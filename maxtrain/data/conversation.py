"""What a conversation may say to a model that reads text: nothing that its chat template would leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config.errors import Refused


def read_by(template: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a chat template reads them; parts of text are put together where it knows of no parts.

    Args:
        template: Jinja source; a key that it does not name anywhere is one that it does not read.
        messages: each with `role`, and `content`: a text, a list of parts `{"type": "text", "text": ...}`, or null beside other keys.

    Raises:
        Refused: a message has a key that the template does not read, a part that is no text, or nothing to say.
    """
    names = set(re.findall(r"\w+", template))
    return [_message(f"message {number}", message, names) for number, message in enumerate(messages, 1)]


def _message(place: str, message: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    unread = [key for key, value in message.items() if value is not None and key not in names and key not in ("role", "content")]
    if unread:
        raise Refused(f"{place}: the model's chat template does not read {unread[0]!r}: remove it")
    content = message.get("content")
    if content is None:
        if not any(value for key, value in message.items() if key not in ("role", "content")):
            raise Refused(f"{place}: content is missing")
    elif isinstance(content, Sequence) and not isinstance(content, str):
        texts = [_part(f"{place}, part {number}", part) for number, part in enumerate(content, 1)]
        content = list(content) if "text" in names else "\n".join(texts)
    elif not isinstance(content, str):
        raise Refused(f"{place}: content is a text or a list of parts, not {content!r:.80}")
    return {**message, "content": content} if "content" in message else dict(message)


def _part(place: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise Refused(f"{place}: the model reads text, write {{'type': 'text', 'text': ...}}, not {kind!r:.80}")
    unread = [key for key in part if key not in ("type", "text")]
    if unread:
        raise Refused(f"{place}: {unread[0]!r} is not read: remove it")
    return part["text"]
