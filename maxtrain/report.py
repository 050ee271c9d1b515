"""One self-contained HTML page about a run, also while it goes on: `python -m maxtrain.report RUN [OUT.html]`.

It reads only what the run's folder holds; a part whose file or keys are missing is left out.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maxtrain.config import cli
from maxtrain.config.errors import Refused
from maxtrain.data import integrity
from maxtrain.training.plot import SCRIPT, STYLE, Floats, Scale, Series, figure, short, smooth

USAGE = "python -m maxtrain.report RUN [OUT.html]"
BARS = {"model": "bits_per_byte", "xz": "xz", "gzip": "gzip"}  # label -> key of evaluation.json
MOST_SAMPLES = MOST_EVENTS = 100  # the newest ones, so that a page stays small
CURVES: tuple[tuple[str, str, str, float, Scale], ...] = (  # title, key, unit, factor, where the axis begins
    ("Learning rate", "lr", "", 1, "zero"),
    ("Gradient norm", "grad_norm", "before clipping", 1, "log"),
    ("Throughput", "tokens_per_second", "tokens/s", 1, "zero"),
    ("Model FLOPs utilisation", "mfu", "%", 100, "zero"),
    ("Parameter norm", "param_norm", "", 1, "data"),
)


@dataclass
class Run:
    """What a run's folder holds. `columns`: key of metrics.jsonl -> its steps and values, finite numbers only."""

    path: Path
    columns: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    events: list[tuple[float, str]] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    last_step: int = 0

    def curve(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of one key, empty when it was never written."""
        steps, values = self.columns.get(key, (array("d"), array("d")))
        return np.asarray(steps), np.asarray(values)

    def kept(self, key: str) -> tuple[Floats, Floats]:
        """The curve without skipped steps, whose numbers would spoil a mean."""
        steps, values = self.curve(key)
        good = ~np.isin(steps, self.skipped)
        return steps[good], values[good]

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """What stands between prefix and suffix in the keys that have both."""
        return [key[len(prefix) : len(key) - len(suffix)] for key in self.columns if key.startswith(prefix) and key.endswith(suffix)]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, each with a `step`; a last line that a living run has not finished is left out.

    Raises:
        Refused: a line is not JSON, or not an object with a step.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise Refused(f"{path}:{number}: not JSON ({error}): mend or remove the line") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise Refused(f"{path}:{number}: not an object with a whole number as its `step`: mend or remove the line")
            yield row


def read_run(path: Path) -> Run:
    """Read the metrics of a run.

    Raises:
        Refused: no folder, no metrics in it, or a line that cannot be read.
    """
    metrics = path / "metrics.jsonl"
    if not path.is_dir():
        raise Refused(f"{path}: no such folder: give the folder of a run")
    if not metrics.is_file():
        raise Refused(f"{path}: not the folder of a run that has started: it has no metrics.jsonl (is `jsonl` among metrics.sinks?)")
    run = Run(path)
    for row in json_lines(metrics):
        step = row["step"]
        run.last_step = max(run.last_step, step)
        if "event" in row:
            run.events.append((step, str(row["event"])))
        if row.get("skipped"):
            run.skipped.append(step)
        for key, value in row.items():
            if key != "step" and is_number(value):
                steps, values = run.columns.setdefault(key, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
    if not run.columns:
        raise Refused(f"{metrics}: no row yet: wait for the first step")
    return run


def is_number(value: Any) -> bool:
    """Whether something read from a file is a finite number."""
    return isinstance(value, (int, float)) and isfinite(value)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping; empty when there is no such file.

    Raises:
        Refused: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes()) if path.suffix == ".json" else yaml.safe_load(path.read_bytes())
    except (ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path}: cannot be read ({error}): mend or remove it") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: holds no mapping: mend or remove it")
    return value


# ------------------------------------------------------------------------------------------------------ parts of the page


def headline(run: Run, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and remark, as HTML, of the numbers on top."""
    _, loss = run.kept("loss")
    if len(loss):
        yield "Training loss", f"{loss[-1]:.4f}", f"{loss[-50:].mean():.4f} over the last {len(loss[-50:])} steps" if len(loss) > 1 else ""
    for name in run.names("eval/", "/loss"):
        key = "bits_per_byte" if f"eval/{name}/bits_per_byte" in run.columns else "loss"
        steps, values = run.curve(f"eval/{name}/{key}")
        best = int(values.argmin())
        yield "Best eval", f"{values[best]:.4f}", f"{escape(name)}, {key.replace('_', ' ')}, step {steps[best]:,.0f}"
    if len(tokens := run.curve("tokens")[1]):
        yield "Tokens", short(tokens[-1], 3), f"{tokens[-1]:,.0f}" if tokens[-1] >= 1e4 else ""
    if isinstance(count := manifest.get("parameters"), int):
        yield "Parameters", short(count, 3), f"{count:,}"
    if len(rate := run.curve("tokens_per_second")[1]):
        tflops = run.curve("tflops_per_second")[1]
        remark = f"; {short(float(np.median(tflops)), 3)} TFLOP/s" if len(tflops) else ""
        yield "Tokens per second", short(float(np.median(rate))), "median" + remark
    if len(mfu := run.curve("mfu")[1]):
        yield "MFU", f"{np.median(mfu):.1%}", "median"
    if len(seconds := run.curve("step_seconds")[1]):
        compiling = run.curve("compile_seconds")[1].sum()
        total = seconds.sum() + run.curve("checkpoint_seconds")[1].sum()
        yield "Time", duration(total), "steps and checkpoints" + (f"; {duration(compiling)} compiling" if compiling else "")
    if len(goodput := run.curve("goodput")[1]):
        yield "Goodput", f"{goodput[-1]:.1%}", "time spent in steps that count"
    if len(memory := run.curve("memory_peak_bytes")[1]):
        yield "Peak memory", f"{memory.max() / 2**30:.2f} GiB", "one device; on CPU the process"
    if run.skipped:
        yield "Skipped steps", f"{len(run.skipped):,}", f"the last one {run.skipped[-1]:,}"


def duration(seconds: float) -> str:
    """`2 d 3 h`, `1 h 2 min`, `2 min 3 s` or `4.2 s`."""
    for unit, size, part, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // small:.0f} {part}"
    return f"{seconds:.1f} s"


def noisy(run: Run, label: str, key: str, factor: float = 1) -> list[Series]:
    """The values as they are and, for what jumps from step to step, their moving mean in front of them."""
    steps, values = run.curve(key)
    if len(steps) < 100 or key in ("lr", "param_norm"):
        return [Series(label, steps, values * factor)]
    kept, good = run.kept(key)
    return [Series(label, steps, values * factor, 0, "faint"), Series(f"{label}, smoothed", kept, smooth(good * factor))]


def step_time(run: Run, buckets: int = 200) -> list[Series]:
    """Mean seconds a step over up to 200 stretches of the run, its parts stacked; the whole comes first, to be painted over."""
    steps = run.curve("step_seconds")[0]
    if len(steps) < 2:
        return []
    edges = np.linspace(steps.min(), steps.max() + 1, min(buckets, len(steps)) + 1)
    count = np.histogram(steps, edges)[0]
    stack, series = np.zeros(len(count)), []
    for color, part in ((1, "data"), (0, "compute"), (2, "checkpoint")):
        at, seconds = run.curve(f"{part}_seconds")
        if len(at):
            stack = stack + np.histogram(at, edges, weights=seconds)[0] / np.maximum(count, 1)
            series.append(Series(part, edges[:-1][count > 0], stack[count > 0], color, "area"))
    return series[::-1]


def sources(run: Run) -> list[Series]:
    """Smoothed losses of the sources, each with its share of the tokens; none when there is one source."""
    names = run.names("loss/")
    tokens = {name: run.curve(f"tokens/{name}")[1].sum() for name in names}
    series = []
    for color, name in enumerate(names if len(names) > 1 else ()):
        steps, values = run.kept(f"loss/{name}")
        share = f" ({tokens[name] / sum(tokens.values()):.0%} of tokens)" if tokens[name] else ""
        series.append(Series(name + share, steps, smooth(values), color))
    return series


def figures(run: Run) -> str:
    """All curves; the loss, with everything that happened to the run, is the wide one."""
    sets = list(enumerate(run.names("eval/", "/loss"), 1))
    loss = noisy(run, "training", "loss") if "loss" in run.columns else []
    loss += [Series(name, *run.curve(f"eval/{name}/loss"), color, "dots") for color, name in sets]
    events, last = run.events[-MOST_EVENTS:], run.last_step
    drawn = []
    for title, key, unit, factor, scale in CURVES:
        drawn.append(figure(title, noisy(run, key.replace("_", " "), key, factor), last, unit=unit, scale=scale))
    bits = [Series(name, *run.curve(f"eval/{name}/bits_per_byte"), color, "dots") for color, name in sets]
    drawn.insert(0, figure("Evaluation", bits, last, unit="bits per byte"))
    drawn.append(figure("Time of a step", step_time(run), last, unit="seconds", scale="zero"))
    drawn.append(figure("Loss by source", sources(run), last, unit="nats per token, smoothed"))
    wide = figure("Loss", loss, last, unit="nats per token", skipped=run.skipped, events=events)
    listed = "".join(f"<li><b>{step:,}</b> {escape(text)}</li>" for step, text in reversed(events))
    told = fold(f"Events ({len(run.events):,})", f"<ul>{listed}</ul>", opened=True) if listed else ""
    return f'<div class="wide">{wide}</div>{told}{grid(drawn)}'


def bars(evaluation: Mapping[str, Any]) -> str:
    """Bits per byte of the model beside the compressors', a card for each set, all on one scale."""
    sets = {name: results for name, results in evaluation.items() if isinstance(results, dict)}
    values = {name: {label: results[key] for label, key in BARS.items() if is_number(results.get(key))} for name, results in sets.items()}
    most = max((value for row in values.values() for value in row.values()), default=0) or 1
    cards = []
    for name, row in values.items():
        told = [f"{sets[name][key]:,} {key[4:]}" for key in ("num_documents", "num_bytes") if is_number(sets[name].get(key))]
        lines = [f'<div class="bar"><span>{key}</span><i style="--w:{row[key] / most:.4f}"></i><b>{row[key]:.3f}</b></div>' for key in row]
        cards.append(card(f"{escape(name)} <small>{', '.join(told)}</small>", "".join(lines)))
    return section("Against compressors <small>bits per byte, less is better</small>", grid(cards))


def samples(path: Path) -> str:
    """The newest generated texts, by step."""
    newest = list(json_lines(path))[-MOST_SAMPLES:] if path.is_file() else []
    steps: dict[int, str] = {}
    for row in newest:
        prompt, text = (escape(str(row.get(key, ""))) for key in ("prompt", "text"))
        steps[row["step"]] = steps.get(row["step"], "") + f'<p class="sample"><span>{prompt}</span>{text}</p>'
    last = max(steps, default=0)
    return section("Samples", "".join(fold(f"Step {step:,}", steps[step], opened=step == last) for step in sorted(steps, reverse=True)))


def environment(manifest: Mapping[str, Any]) -> str:
    """The manifest: a card for each of its mappings, and one for all the rest."""

    def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            yield path, " ".join(map(str, value))
        else:
            yield path, f"{value:,}" if type(value) is int else str(value)

    groups = {"run": {key: value for key, value in manifest.items() if not isinstance(value, dict)}}
    groups |= {key: value for key, value in manifest.items() if isinstance(value, dict)}
    cards = []
    for title, content in groups.items():
        rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in leaves(content))
        cards.append(card(escape(title), rows and f"<table>{rows}</table>"))
    return section("Environment", grid(cards))


# --------------------------------------------------------------------------------------------------------------- the page


def section(title: str, content: str) -> str:
    """A part of the page, nothing when it has no content. Titles and content here and below are HTML, already escaped."""
    return content and f"<h2>{title}</h2>{content}"


def grid(parts: Sequence[str]) -> str:
    """Figures or cards side by side where there is room."""
    content = "".join(parts)
    return content and f'<div class="grid">{content}</div>'


def card(title: str, content: str) -> str:
    """A titled box."""
    return content and f"<section class=card><h3>{title}</h3>{content}</section>"


def fold(title: str, content: str, opened: bool = False) -> str:
    """A box that opens and closes."""
    return content and f"<details class=card{' open' if opened else ''}><summary>{title}</summary>{content}</details>"


PAGE_STYLE = files("maxtrain").joinpath("report.css").read_text()


def check_files(folder: Path) -> None:
    """Return if what describes the run is as it was written, or missing; `Refused` otherwise."""
    if not (folder / integrity.RUN_MANIFEST).is_file():
        return  # of an earlier version
    present = [name for name in ("config.yml", "manifest.json") if (folder / name).is_file()]
    if wrong := integrity.damage(folder, integrity.RUN_MANIFEST, only=present):
        raise Refused(f"{folder}: {'; '.join(wrong)}: bring back what was there, or move it away")


def page(run: Run) -> str:
    """The whole page; it loads nothing, and its policy says so to the browser."""
    file = run.path / "config.yml"
    check_files(run.path)
    config, manifest = read_mapping(file), read_mapping(run.path / "manifest.json")
    own, train = (part if isinstance(part := config.get(key), dict) else {} for key in ("run", "train"))
    name = escape(str(own.get("name") or run.path.resolve().name))
    of = f" of {train['steps']:,}" if isinstance(train.get("steps"), int) else ""
    written = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime, UTC)
    tiles = [f"<div><dt>{key}</dt><dd>{value}<small>{remark}</small></dd></div>" for key, value, remark in headline(run, manifest)]
    resolved = section("Config", fold("config.yml", f"<pre>{escape(file.read_text(encoding='utf-8'))}</pre>")) if config else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{name}</title><style>{PAGE_STYLE}{STYLE}</style></head><body><main>
<h1>{name}</h1>
<p class="lede">Step {run.last_step:,}{of}, last written {written:%Y-%m-%d %H:%M} UTC</p>
<dl class="tiles">{"".join(tiles)}</dl>
{figures(run)}
{bars(read_mapping(run.path / "evaluation.json"))}
{samples(run.path / "samples.jsonl")}
{resolved}
{environment(manifest)}
</main><script>{SCRIPT}</script></body></html>
"""


def main(argv: Sequence[str]) -> int:
    """Write the page about the run in the folder `argv[0]`, there or to `argv[1]`.

    Raises:
        Refused: the folder is not that of a run, a file in it cannot be read, or the page cannot be written.
    """
    folder = Path(cli.parse(argv[:1], usage=USAGE, positional="RUN", overrides=False).config)
    if len(argv) > 2 or argv[-1].startswith("-"):
        raise Refused(f"{argv[-1]!r} is not understood\nusage: {USAGE}")
    out = Path(argv[1]) if len(argv) == 2 else folder / "report.html"
    is_new = not out.exists()
    try:
        target = os.open(out, os.O_WRONLY | os.O_CREAT, 0o666)  # before the work, and without harm to what is there
    except OSError as error:
        if len(argv) == 2:
            raise Refused(f"{out}: cannot be written ({error.strerror}): choose another place") from None
        print(f"{out}: cannot be written ({error.strerror}): the page is printed", file=sys.stderr)
        print(page(read_run(folder)).encode(errors="replace").decode(), end="")
        return 0
    try:
        with open(target, "wb") as file:
            content = page(read_run(folder)).encode(errors="replace")  # JSON may hold half a surrogate pair
            if out.is_file():
                file.truncate(0)
            file.write(content)
    except (Refused, OSError) as error:
        if is_new:
            out.unlink(missing_ok=True)
        raise error if isinstance(error, Refused) else Refused(f"{out}: cannot be written ({error}): choose another place") from None
    print(out)
    return 0


if __name__ == "__main__":
    cli.run(main)
