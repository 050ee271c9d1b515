"""Files that others wrote, opened without waiting: a fifo, a device or a folder in a file's place is refused, never read."""

import os
import stat
from io import BufferedReader

from maxtrain.config.errors import Refused

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """The file, open for reading; links are followed.

    Raises:
        Refused: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a fifo without a writer would wait for one
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"{os.fspath(path)}: cannot be read: {reason}") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise Refused(f"{os.fspath(path)}: it is {KINDS.get(kind, 'something else')}, a regular file is expected")
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file of at most `limit` bytes.

    Raises:
        Refused: it is larger, cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise Refused(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise Refused(f"{os.fspath(path)}: it has more than {limit:,} bytes, the most that such a file may have")
    return data
