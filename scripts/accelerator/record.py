"""What a part of the check finds out, a line of JSON each, written at once: what is known survives a part that is cut off."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Record:
    """The lines of one process.

    Args:
        path: the file they are added to.
        smoke: whether sizes are toys'.
        seconds: after which the process will be stopped.
    """

    def __init__(self, path: str, smoke: bool, seconds: float) -> None:
        self.path, self.smoke, self._end = path, smoke, time.monotonic() + seconds

    def _write(self, kind: str, name: str, values: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "name": name, **values}) + "\n")

    def check(self, name: str, difference: float, most: float, **values: Any) -> None:
        """A comparison; it is right when `difference` is at most `most`."""
        right = bool(difference <= most)  # not if it is not a number
        self._write("check", name, {"right": right, "difference": _number(difference), "most": most, **values})

    def measure(self, name: str, **values: Any) -> None:
        """Numbers that are what they are."""
        self._write("measure", name, {key: _number(value) for key, value in values.items()})

    def fact(self, name: str, text: str) -> None:
        """Something to know that is neither right nor wrong, such as what is not to be had here."""
        self._write("fact", name, {"text": text})

    @property
    def left(self) -> float:
        """Seconds until the process will be stopped."""
        return self._end - time.monotonic()

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Write an error down, whole, and go on behind the block."""
        try:
            yield
        except Exception:
            self._write("error", name, {"text": traceback.format_exc()})


def _number(value: Any) -> Any:
    """A float as JSON can hold it."""
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else str(value)


def main(cases: Mapping[str, Callable[[Record], None]]) -> None:
    """The process of a part: run the cases that the command line names, each whatever became of those before."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+", choices=list(cases))
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    record = Record(options.out, options.smoke, options.seconds)
    for name in options.cases:
        start = time.monotonic()
        with record.trying(name):
            cases[name](record)
        record.measure(f"{name}: the case", seconds=time.monotonic() - start)


def describe_jax(record: Record) -> None:
    """Say what jax runs on."""
    start = time.monotonic()
    import jax
    import jax.extend.backend
    import jaxlib

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    record.measure(
        "jax",
        platform=device.platform,
        device=device.device_kind,
        devices=jax.device_count(),
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        backend=jax.extend.backend.get_backend().platform_version.splitlines()[0],
        memory_gib=None if limit is None else limit / 2**30,
        cores=os.cpu_count(),
        start_seconds=time.monotonic() - start,
    )
