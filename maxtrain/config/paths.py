"""Paths that users write, expanded in one way."""

from __future__ import annotations

import os

from maxtrain.config.errors import Refused


def expand(path: str | os.PathLike[str], key: str) -> str:
    """The path with `~` and `~user` replaced by the home folder.

    Args:
        path: What the user wrote.
        key: Where it was written (`run.dir`, `--out`), for the message.

    Raises:
        Refused: whose home it is, or where that lies, cannot be found out; it has the character NUL.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise Refused(f"{key}: a path has no character NUL: {text!r:.200}")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        user = text.split("/")[0][1:]
        reason = f"there is no user {user!r}" if user else "HOME is not set"
        raise Refused(f"{key}: {text}: the home folder is unknown ({reason}): write the path without ~")
    return expanded
