"""Attack the package: what is wrong must be refused in words or change nothing; anything else is a fault, and so is no end.

    python scripts/attack.py PART [--count N] [--seed S] [--out results.jsonl]

    folders, gguf, configs    model folders, GGUF files and config.json files, damaged at random and read
    settings, templates       odd values over a small config, chat templates of random pieces
    kills                     SIGKILL at any moment of a run, which then goes on: the same rows, bit for bit
    damage                    one file of a run or of the data cache is damaged, then the run goes on or is evaluated
    signals                   SIGTERM, SIGINT or SIGKILL to one or both of two processes
    traffic                   ten seconds of four clients of the engine, with weights loaded in between

Item i of a seed is always the same, so that a run goes on where its results end and a fault can be looked at alone (`--first i --count 1`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import pathlib
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import attack_files
import attack_runs

PARTS = attack_files.PARTS | attack_runs.PARTS
SOUND = ("kills", "damage", "signals", "traffic")  # parts whose commands and requests are right: nothing of them may be refused
MEGABYTES = 1500  # of memory that an item may take above what the worker took before its first


def work(part: str, seed: int, first: int, last: int, pipe: Any) -> None:
    """Send the outcome of each item, in a process of its own."""
    from maxtrain.config.errors import Refused

    logging.disable()
    make, attack, _ = PARTS[part]
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        make(top)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        pipe.send(None)
        for index in range(first, last):
            outcome = "good"
            try:
                words = attack(top, random.Random(f"{part} {seed} {index}"))
            except Refused as refusal:
                outcome, words = "refused", str(refusal)
                unnamed = part in attack_files.PARTS and not any(name in words for name in ("item", "config.json"))
                if part in SOUND or unnamed or len(words) > 20_000:
                    outcome = "fault"  # nothing was wrong, the file is not named, or the message is no message
                words.encode()
            except BaseException:
                outcome, words = "fault", traceback.format_exc()[-2000:]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before
            if grown > MEGABYTES:
                outcome, words = "fault", f"{grown} MB more memory\n{words}"
            with contextlib.suppress(OSError):  # first, because rmtree waits for the writer of a fifo
                (top / "item").unlink()
            shutil.rmtree(top / "item", ignore_errors=True)
            pipe.send({"part": part, "seed": seed, "index": index, "outcome": outcome, "words": words[:2000]})
            if grown > MEGABYTES:
                return


def attack(part: str, count: int, seed: int = 0, first: int = 0) -> Iterator[dict[str, Any]]:
    """The outcomes of `count` items from `first` on: good, refused, fault (another error, a file not named, memory) or hang."""
    seconds = PARTS[part][2]
    context, index, last = multiprocessing.get_context("spawn"), first, first + count
    while index < last:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(part, seed, index, last, theirs))
        worker.start()
        theirs.close()
        try:
            if ours.poll(900):
                ours.recv()
            while index < last:
                row = {"part": part, "seed": seed, "index": index, "outcome": "hang", "words": f"no end after {seconds:g} s"}
                ended = ours.poll(seconds)
                if ended:
                    row = ours.recv()
                yield row
                index += 1
                if not ended:
                    break
        except EOFError:  # it ended itself after too much memory, or died
            if worker.join(10) or worker.exitcode:
                yield {"part": part, "seed": seed, "index": index, "outcome": "fault", "words": f"died with {worker.exitcode}"}
                index += 1
        finally:
            worker.kill()
            worker.join()


def main() -> int:
    """Print every fault and the sums; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="results, an object a line; what is there is not done again")
    arguments = parser.parse_args()
    known = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out and arguments.out.exists() else []
    sums, began = Counter(row["outcome"] for row in known), time.monotonic()
    first = max([arguments.first, *(row["index"] + 1 for row in known)])
    for row in attack(arguments.part, arguments.first + arguments.count - first, arguments.seed, first):
        sums[row["outcome"]] += 1
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row["outcome"] not in ("good", "refused"):
            print(f"{row['part']} {row['index']}: {row['outcome']}\n{row['words']}", flush=True)
    print(f"{arguments.part}, seed {arguments.seed}: {dict(sums)}, {time.monotonic() - began:.0f} s")
    return 0 if not sums["fault"] + sums["hang"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
