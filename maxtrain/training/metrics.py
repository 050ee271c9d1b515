"""Where the numbers of a run go: one row a step, handed to each sink."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from rich.console import Console
from rich.text import Text

from maxtrain.config import schema
from maxtrain.data.integrity import Measure, set_aside

Row = Mapping[str, Any]


class Sink(Protocol):
    """Takes rows of one run, and writes them out at once."""

    name: str
    path: str

    def write(self, row: Row) -> None:
        """Take one row."""

    def rewind(self, step: int, known: Measure | None = None) -> list[str]:
        """Forget the rows after `step`: the run goes on from there. Gives what is wrong with the rows before it.

        `known` is what `Jsonl.measure` gave when `step` was saved.
        """

    def close(self) -> None:
        """Write out what is pending."""


class Jsonl:
    """metrics.jsonl: one JSON object a line, written out at once, so that a killed process loses none."""

    name = "jsonl"

    def __init__(self, folder: str, cfg: schema.Metrics, total_steps: int):
        self.path = Path(folder, "metrics.jsonl")
        self.hash, self.size = hashlib.sha256(), 0
        self.file = open(self.path, "ab")  # noqa: SIM115 - open for the life of the run

    def write(self, row: Row) -> None:
        # JSON has no NaN: a skipped step's loss is null
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._append(self.file, (json.dumps(clean) + "\n").encode())
        self.file.flush()

    def _append(self, file: BinaryIO, line: bytes) -> None:
        file.write(line)
        self.hash.update(line)
        self.size += len(line)

    def measure(self) -> Measure:
        """Size and hash of what was written since the last `rewind` and kept by it; a checkpoint holds it."""
        return {"size": self.size, "sha256": self.hash.hexdigest()}

    def rewind(self, step: int, known: Measure | None = None) -> list[str]:
        """What is damaged is left out, and the file as it was stays beside the new one."""
        self.file.close()
        self.hash, self.size = hashlib.sha256(), 0
        before, size, same, bad, events = hashlib.sha256(), 0, not (known and known["size"]), [], set()
        gaps, last = [], 0  # steps whose rows are missing; the last step that has one
        draft = self.path.with_suffix(".new")
        with open(self.path, "rb") as lines, open(draft, "wb") as file:
            for number, line in enumerate(lines, 1):
                before.update(line)
                size += len(line)
                same = same or ((known or {})["size"] == size and (known or {})["sha256"] == before.hexdigest())
                row = _row(line)
                if row is None and line.endswith(b"\n"):  # else it was cut short by a kill
                    bad.append(str(number))
                elif row is not None and row["step"] <= step:
                    self._append(file, line)
                    events.add(row.get("event"))
                    if "loss" in row:
                        gaps += [f"{last + 1} to {row['step'] - 1}"] if row["step"] > last + 1 else []
                        last = max(last, row["step"])
        gaps += [f"{last + 1} to {step}"] if last < step else []
        wrong = [f"metrics.jsonl: damaged lines are left out: {_listed(bad)}"] if bad else []
        wrong += [] if same or bad else [f"metrics.jsonl has changed since step {step} was saved: its numbers are not to be trusted"]
        if wrong:
            wrong[0] += f"; the file as it was: {set_aside(self.path).name}"
        os.replace(draft, self.path)
        self.file = open(self.path, "ab")  # noqa: SIM115
        missing = f"metrics.jsonl: the rows of these steps are missing: {_listed(gaps)}"
        return wrong + ([missing] if gaps and missing not in events else [])

    def close(self) -> None:
        self.file.close()


def _row(line: bytes) -> Row | None:
    """The row in a line; None if it is damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _listed(items: list[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


class TensorBoard:
    """Event files under tensorboard/, written here and now: the thread of tensorboardX's own writer dies of a full disk, and all wait."""

    name = "tensorboard"

    def __init__(self, folder: str, cfg: schema.Metrics, total_steps: int):
        self.path, self.opened = os.path.join(folder, "tensorboard"), 0
        self.writer: Any = None

    def write(self, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event  # slow to import
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        values = [Summary.Value(tag=key if "/" in key else f"train/{key}", simple_value=value) for key, value in numbers.items()]
        if values:
            self._add(Event(step=row["step"], summary=Summary(value=values)))

    def _add(self, event: Any) -> None:
        if self.writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            os.makedirs(self.path, exist_ok=True)
            self.opened += 1  # a name alone has the second in which it was opened
            self.writer = EventsWriter(os.path.join(self.path, "events"), f".{os.getpid()}.{self.opened}")
        event.wall_time = time.time()
        self.writer.write_event(event)
        self.writer.flush()

    def rewind(self, step: int, known: Measure | None = None) -> list[str]:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.close()
        if os.path.isdir(self.path):
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        return []

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()


class ConsoleLines:
    """A line for people every `console_every` steps: step, loss, tokens/s, MFU, time left."""

    name, path = "console", "the standard output"

    def __init__(self, folder: str, cfg: schema.Metrics, total_steps: int):
        self.console, self.every, self.total = Console(highlight=False), cfg.console_every, total_steps

    def write(self, row: Row) -> None:
        step = row["step"]
        if "event" in row:
            self.say(f"step {step}: {row['event']}", "yellow")
        sets = sorted({key.split("/")[1] for key in row if key.startswith("eval/")})
        for name in sets:
            loss, bits = row[f"eval/{name}/loss"], row.get(f"eval/{name}/bits_per_byte")
            self.say(f"step {step:>6}  eval {name}: loss {loss:.4f}" + (f"  bits/byte {bits:.4f}" if bits else ""), "cyan")
        if "loss" not in row:
            return
        if row["skipped"]:
            self.say(f"step {step}: skipped, loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}", "yellow")
        elif step % self.every == 0 or step in (1, self.total) or "compile_seconds" in row:
            mfu = f"  MFU {row['mfu']:5.1%}" if row.get("mfu") is not None else ""
            left = duration((self.total - step) * row["step_seconds"])
            self.say(
                f"step {step:>6}/{self.total}  loss {row['loss']:7.4f}  norm {row['grad_norm']:6.3f}  lr {row['lr']:.2e}  "
                f"{row['tokens_per_second']:>9,.0f} tok/s{mfu}  left {left}"
            )

    def say(self, line: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(Text(line, style=style), soft_wrap=True)

    def rewind(self, step: int, known: Measure | None = None) -> list[str]:
        """Nothing: what was printed stays."""
        return []

    def close(self) -> None:
        """Nothing is pending."""


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


SINKS: dict[str, Any] = {"console": ConsoleLines, "jsonl": Jsonl, "tensorboard": TensorBoard}


class Recorder:
    """The sinks of one run; only process 0 has any."""

    def __init__(self, folder: str, cfg: schema.Metrics, total_steps: int, active: bool):
        self.sinks: list[Sink] = [SINKS[name](folder, cfg, total_steps) for name in cfg.sinks] if active else []

    def write(self, row: Row) -> None:
        """Give a row to every sink.

        Raises:
            OSError: a sink cannot write, as all methods say it: which one, which file and why. It is asked no more.
        """
        self._each(lambda sink: sink.write(row))

    def rewind(self, step: int, known: Measure | None = None) -> list[str]:
        """Forget the rows after `step` everywhere; what is wrong with those before it, see `Sink`."""
        found: list[str] = []
        self._each(lambda sink: found.extend(sink.rewind(step, known)))
        return found

    def measure(self) -> Measure | None:
        """Size and hash of metrics.jsonl, if it is written."""
        return next((cast(Jsonl, sink).measure() for sink in self.sinks if sink.name == Jsonl.name), None)

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        failed: dict[str, OSError] = {}
        for sink in tuple(self.sinks):
            try:
                act(sink)
            except OSError as error:
                self.sinks.remove(sink)
                failed[f"{sink.name} cannot write {sink.path}: {error.strerror or error}"] = error
                with contextlib.suppress(OSError):
                    sink.close()
        if failed:
            raise OSError(f"metrics.sinks: {'; '.join(failed)}") from next(iter(failed.values()))
