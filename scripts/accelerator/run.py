"""Run the parts of the check, each case a process with a time limit, and gather what they wrote into a JSON file and a table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import table

HERE = os.path.dirname(os.path.abspath(__file__))
TAIL = 20_000  # characters of a process's standard error that are kept when it fails


class Part(NamedTuple):
    """A file of cases with the seconds each may take, and what all of them together may."""

    name: str
    seconds: int
    cases: dict[str, int]
    toys: tuple[str, ...]
    """The cases of a smoke run, in one process."""


RIGHT = {"steps against the CPU": 60, "attention by each": 35, "engine against the forward": 45}
FAST = {
    "ceilings": 20,
    "1B dense, 2,048: cudnn": 55,
    "1B dense, 8,192: cudnn": 55,
    "1B dense, 2,048: xla": 55,
    "7B mixture, 2,048: cudnn": 60,
    "7B mixture, 2,048: xla": 60,
    "1B dense, 8,192: xla": 70,
}
PEER = {"1B dense, 2,048": 60, "1B dense, 8,192": 60}
TOY_FAST = ("ceilings", "1B dense, 2,048: cudnn", "1B dense, 2,048: xla", "7B mixture, 2,048: xla")
PARTS = (
    Part("right", 100, RIGHT, tuple(RIGHT)),
    Part("fast", 185, FAST, TOY_FAST),
    Part("peer", 75, PEER, ("1B dense, 2,048",)),
    Part("serving", 105, {"serving": 120}, ("serving",)),
)
SMOKE_SECONDS, LEAST = 120, 8  # of a part of a smoke run; what a case is started with at least


def ended(part: str, cases: tuple[str, ...], seconds: float, smoke: bool, folder: str) -> dict[str, Any]:
    """Run cases in a process; what they wrote, how long it took, and how it ended, with its standard error if that was badly."""
    lines, errors = os.path.join(folder, "lines.jsonl"), os.path.join(folder, "stderr.txt")
    command = [sys.executable, os.path.join(HERE, f"{part}.py"), *cases, "--out", lines, "--seconds", str(seconds)]
    start, how = time.monotonic(), "well"
    with open(errors, "wb") as stderr:
        process = subprocess.Popen([*command, *(["--smoke"] if smoke else [])], stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            how = "well" if code == 0 else f"with exit status {code}"
        except subprocess.TimeoutExpired:
            how = f"cut off after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"part": part, "cases": cases, "ended": how, "seconds": time.monotonic() - start, "records": []}
    with contextlib.suppress(FileNotFoundError), open(lines, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a line that was cut off
                found["records"].append(json.loads(line))
        os.remove(lines)
    if how != "well":
        with open(errors, encoding="utf-8", errors="replace") as file:
            found["stderr"] = file.read()[-TAIL:]
    return found


def run(parts: list[Part], smoke: bool) -> list[dict[str, Any]]:
    """All processes, one after the other: time that a part leaves goes to those behind it."""
    done, until = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            until += SMOKE_SECONDS if smoke else part.seconds
            groups = [(part.toys, SMOKE_SECONDS)] if smoke else [((case,), limit) for case, limit in part.cases.items()]
            for cases, limit in groups:
                left = until - time.monotonic()
                if left < LEAST:
                    skipped = {"kind": "fact", "name": ", ".join(cases), "text": "not run: the time of the part was spent"}
                    done.append({"part": part.name, "cases": cases, "ended": "not run", "seconds": 0.0, "records": [skipped]})
                    continue
                done.append(ended(part.name, cases, min(left, limit), smoke, folder))
                print(f"{part.name}: {', '.join(cases)}: ended {done[-1]['ended']} after {done[-1]['seconds']:.1f} s", flush=True)
    return done


def problems(done: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What went wrong, in order, whole."""
    found = []
    for process in done:
        for line in process["records"]:
            if line["kind"] == "error":
                found.append({"where": f"{process['part']}: {line['name']}", "text": line["text"]})
            elif line["kind"] == "check" and not line["right"]:
                found.append({"where": f"{process['part']}: {line['name']}", "text": f"{line['difference']} is more than {line['most']}"})
        if process["ended"] not in ("well", "not run"):
            where = f"{process['part']}: {', '.join(process['cases'])}"
            found.append({"where": where, "text": f"ended {process['ended']}\n{process['stderr']}"})
    return found


def machine() -> dict[str, Any]:
    """The machine and the checkout, asked without taking the device."""

    def ask(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=HERE).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": ask("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "nvidia": ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    }


def main() -> int:
    """The check; its exit status is 0 if all is right."""
    parser = argparse.ArgumentParser(description="Show what this checkout does on this machine's accelerator, in under 8 minutes.")
    parser.add_argument("--peer", action="store_true", help="PyTorch on the same shapes, where it is installed")
    parser.add_argument("--smoke", action="store_true", help="every part at toy size, on the CPU")
    parser.add_argument("--out", default="runs/accelerator", metavar="FOLDER", help="for check.json and table.md (%(default)s)")
    options = parser.parse_args()
    parts = [part for part in PARTS if options.peer or part.name != "peer"]
    if not options.peer:  # its time goes to the part before it
        parts = [part._replace(seconds=260) if part.name == "fast" else part for part in parts]
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if options.smoke:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif platforms and "cpu" not in platforms.split(","):  # where the weights of the miniatures are drawn
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # a reference on the same platform need not compile again
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        done = run(parts, options.smoke)
    wrong = problems(done)
    result = {"machine": machine(), "smoke": options.smoke, "seconds": time.monotonic() - start, "problems": wrong, "processes": done}
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "check.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    text = table.markdown(result)
    with open(os.path.join(options.out, "table.md"), "w", encoding="utf-8") as file:
        file.write(text)
    print(f"\n{text}")
    if wrong:
        print(f"The first of {len(wrong)} problems, in {wrong[0]['where']}:\n{wrong[0]['text']}")
    print(f"{options.out}/check.json and {options.out}/table.md, after {result['seconds']:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
