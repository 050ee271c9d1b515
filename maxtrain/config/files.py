"""Paths that users write, and the files they name: expanded and read in one way, with refusals in words."""

from __future__ import annotations

import os
import stat

from maxtrain.config.errors import Refused


def expand(path: str | os.PathLike[str], key: str) -> str:
    """The path with `~` and `~user` replaced by the home folder.

    Args:
        path: What the user wrote.
        key: Where it was written (`run.dir`, `--out`), for the message.

    Raises:
        Refused: whose home it is, or where that lies, cannot be found out.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        user = text.split("/")[0][1:]
        reason = f"there is no user {user!r}" if user else "HOME is not set"
        raise Refused(f"{key}: {text}: the home folder is unknown ({reason}): write the path without ~")
    return expanded


def read_regular(path: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; a fifo or a device is refused, because it may never end.

    Raises:
        OSError: it cannot be opened or read.
        Refused: it is something else, or larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # opening a fifo would wait for a writer
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, "Is a directory", path)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path}: not a regular file (a pipe or device may never end): copy what it gives into a file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"{path}: larger than the {limit / 2**20:,.0f} MiB that such a file may have: is it the right file?")
    return data
