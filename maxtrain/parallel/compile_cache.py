"""JAX's cache of compiled programs, mended: JAX leaves an entry that it cannot load where it is, and compiles again at every start."""

import contextlib
import functools
import glob
import re
import sys
import warnings
from pathlib import Path
from typing import Any

# How JAX warns, before it compiles: with the name of the program, which its entries' names begin with, or that of the entry
UNREADABLE = "Error reading persistent compilation cache entry for"


@functools.cache
def mend(folder: str) -> None:
    """From now on remove entries of the cache in `folder` that fail to load, which is said once; JAX then writes them anew."""
    show = warnings.showwarning
    told: list[str] = []

    def remove(message: Any, *place: Any, **more: Any) -> None:
        found = re.match(f"{UNREADABLE} '([^']+)'", str(message))
        if found is None:
            show(message, *place, **more)
            return
        for path in Path(folder).glob(f"{glob.escape(found[1])}-*"):
            with contextlib.suppress(OSError):  # a cache that can only be read
                path.unlink()
        if not told:
            print(f"{folder}: compiled programs that cannot be loaded are removed and made anew ({found[1]})", file=sys.stderr)
        told.append(found[1])

    warnings.filterwarnings("always", message=UNREADABLE)
    warnings.showwarning = remove
