"""Attacks on runs as processes: kills and signals at any moment, damage to every file that is kept, odd settings and templates, traffic.

Each function makes one item from the draws it is given; it returns what was tried, and raises for a fault.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = (
    "data.sources={a: {kind: synthetic, num_documents: 400}, b: {kind: synthetic, num_documents: 90, document_length: 90}}",
    "data.tokenizer={kind: bpe, vocab_size: 300, train_bytes: 20000}",
    "data.length=32",
    "data.batch_size=4",
    "model={vocab_size: 300, embed: 32, mlp: 48, num_heads: 2, num_kv_heads: 1, max_length: 64}",
    "eval={every: 4, sets: {held: {kind: synthetic, num_documents: 20}}}",
    "checkpoint.every=3",
    "metrics={sinks: [jsonl], peak_tflops: 1}",
)
STEPS, MORE = 12, 16  # of the run, and of the run that goes on after damage
SAME = ("loss", "grad_norm", "lr", "tokens", "eval/held/loss", "skipped")  # what every row must have again, bit for bit
LEFTOVERS = ("*.draft", "*.new", "*.tmp")
LIMIT = 240.0  # seconds of one command


def command(top: pathlib.Path, run: pathlib.Path, cache: pathlib.Path, *words: str) -> list[str]:
    """A training command; `top` has the compilation cache, which all items share."""
    places = (f"run.dir={run}", f"data.cache_dir={cache}", f"run.compile_cache={top / 'xla'}", f"train.steps={STEPS}")
    given = {word.partition("=")[0] for word in words}
    return [sys.executable, "-m", "maxtrain.train", *SETTINGS, *(w for w in places if w.partition("=")[0] not in given), *words]


def start(words: Sequence[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
    """The command as a process of its own group, its output in a file."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(log, "ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True, stdin=subprocess.DEVNULL)


def finish(words: Sequence[str], log: pathlib.Path) -> int:
    """The exit code of a command that runs to its end."""
    process = start(words, log)
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {LIMIT:g} s: {log.read_text()[-1500:]}") from None


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without events, what must be the same in each."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"]} | {name: line[name] for name in SAME if name in line} for line in lines if "event" not in line]


def check(run: pathlib.Path, log: pathlib.Path, expected: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the run has these rows and nothing else is left over or was traced back."""
    found = rows(run)
    assert found == list(expected), f"rows differ: {[pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]][:2]}"
    assert "Traceback" not in log.read_text(), log.read_text()[-1500:]
    left = [str(path) for pattern in LEFTOVERS for path in run.rglob(pattern)]
    assert not left, f"left over: {left}"


# ---------------------------------------------------------------------------------------------------------- one process


def make_run(top: pathlib.Path) -> None:
    """A run that nothing disturbs, its rows and how long it takes."""
    log = top / "log"
    code = finish(command(top, top / "warm", top / "cache"), log)  # fills the compilation cache
    began = time.monotonic()
    code = code or finish(command(top, top / "whole", top / "cold"), log)
    assert code == 0, log.read_text()[-1500:]
    (top / "seconds").write_text(str(time.monotonic() - began))
    (top / "rows.json").write_text(json.dumps(rows(top / "whole")))


def kill(top: pathlib.Path, draws: random.Random) -> str:
    """SIGKILL at one to three random moments, a cold data cache; then the run goes on to the end."""
    item, seconds = top / "item", float((top / "seconds").read_text())
    item.mkdir()
    words, log, moments = command(top, item / "run", item / "cache"), item / "log", []
    for _ in range(draws.choice((1, 1, 2, 3))):
        process, moment = start(words, log), draws.uniform(0.3, seconds)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        moments.append(round(moment, 2))
    code = finish(words, log)
    assert code == 0, f"{code} after kills at {moments}: {log.read_text()[-1500:]}"
    check(item / "run", log, json.loads((top / "rows.json").read_text()))
    return f"killed at {moments} of {seconds:.1f} s"


def make_damage(top: pathlib.Path) -> None:
    """What going on and evaluating give from an undamaged run."""
    make_run(top)
    shutil.copytree(top / "whole", top / "longer")
    assert finish(command(top, top / "longer", top / "cold", f"train.steps={MORE}"), top / "log") == 0
    assert finish([sys.executable, "-m", "maxtrain.evaluate", str(top / "whole")], top / "log") == 0
    (top / "longer.json").write_text(json.dumps(rows(top / "longer")))


def damage(top: pathlib.Path, draws: random.Random) -> str:
    """One file of the run or the data cache is damaged; to go on or to evaluate is refused, or gives what it gives undamaged."""
    item = top / "item"
    shutil.copytree(top / "whole", item / "run")
    shutil.copytree(top / "cold", item / "cache")
    file = draws.choice(sorted(path for path in item.rglob("*") if path.is_file() and not path.name.endswith((".lock", "log"))))
    kind, log = _damage(file, draws), item / "log"
    name = f"{kind} of {file.relative_to(item)}"
    if draws.random() < 0.7:
        code = finish(command(top, item / "run", item / "cache", f"train.steps={MORE}"), log)
        said = f"{name}: exit {code}: {log.read_text()[-1500:]}"
        assert code in (0, 2), said
        assert "Traceback" not in said, said
        assert code == 2 or rows(item / "run") == json.loads((top / "longer.json").read_text()), f"other numbers, exit 0: {said}"
        return f"{name}: train {code}"
    code = finish([sys.executable, "-m", "maxtrain.evaluate", str(item / "run")], log)
    said = f"{name}: exit {code}: {log.read_text()[-1500:]}"
    assert code in (0, 2), said
    assert "Traceback" not in said, said
    if code == 0:
        found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (item / "run", top / "whole"))
        assert found == expected or found["held"]["step"] != expected["held"]["step"], f"other numbers, exit 0: {said}"
    return f"{name}: evaluate {code}"


def _damage(path: pathlib.Path, draws: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = draws.choice(("bit", "bit", "bit", "cut", "empty", "gone", "digit"))
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    if kind == "gone":
        path.unlink()
        return kind
    if kind == "bit" and data:
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    elif kind == "digit" and digits:
        place = draws.choice(digits)
        data[place] = ord(draws.choice(sorted(set("0123456789") - {chr(data[place])})))
    elif kind == "cut":
        del data[draws.randrange(len(data) + 1) :]
    else:
        data.clear()
    path.write_bytes(data)
    return kind


# -------------------------------------------------------------------------------------------------------- two processes


def pair(top: pathlib.Path, run: pathlib.Path, cache: pathlib.Path) -> list[list[str]]:
    """The commands of a run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = (f"mesh.coordinator=127.0.0.1:{port}", "mesh.num_processes=2", "mesh.fsdp=1", "mesh.data=2")
    return [command(top, run, cache, *processes, f"mesh.process_id={index}") for index in range(2)]


def finish_pair(words: list[list[str]], item: pathlib.Path) -> list[int]:
    """Exit codes of two processes that run to their end."""
    processes = [start(command, item / f"log{index}") for index, command in enumerate(words)]
    try:
        return [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def make_pair(top: pathlib.Path) -> None:
    """A run of two processes that nothing disturbs."""
    (top / "log0").touch()
    for name in ("warm", "whole"):
        began = time.monotonic()
        codes = finish_pair(pair(top, top / name, top / "cold" / name), top)
        assert codes == [0, 0], (top / "log0").read_text()[-1500:]
        (top / "seconds").write_text(str(time.monotonic() - began))
    (top / "rows.json").write_text(json.dumps(rows(top / "whole")))


def signals(top: pathlib.Path, draws: random.Random) -> str:
    """A signal to one or both of two processes at a random moment: both end soon with documented codes, and the run goes on."""
    item, seconds = top / "item", float((top / "seconds").read_text())
    item.mkdir()
    sent, targets = draws.choice((signal.SIGTERM, signal.SIGINT, signal.SIGKILL)), draws.choice(([0], [1], [0, 1]))
    moment = draws.uniform(0.3, seconds)
    processes = [start(words, item / f"log{i}") for i, words in enumerate(pair(top, item / "run", item / "cache"))]
    time.sleep(moment)
    for index in targets:
        processes[index].send_signal(sent)
    codes, began = [], time.monotonic()
    name = f"{sent.name} to {targets} at {moment:.2f} of {seconds:.1f} s"
    try:
        codes = [process.wait(90) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{name}: no end after 90 s: {[(item / f'log{i}').read_text()[-700:] for i in (0, 1)]}") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    took, logs = time.monotonic() - began, "\n".join((item / f"log{i}").read_text() for i in (0, 1))
    allowed = {0, 75, 76, *([-signal.SIGKILL] if sent is signal.SIGKILL else [])}
    assert set(codes) <= allowed, f"{name}: exit {codes}: {logs[-2000:]}"
    ended = finish_pair(pair(top, item / "run", item / "cache"), item)
    assert ended == [0, 0], f"{name}: {codes}, then {ended}: {(item / 'log0').read_text()[-1500:]}"
    check(item / "run", item / "log0", json.loads((top / "rows.json").read_text()))
    return f"{name}: {codes} after {took:.1f} s"


# ------------------------------------------------------------------------------------------------------- in the process

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "7",
    "8",
    "16",
    "32",
    "64",
    "100",
    "258",
    "300",
    "1000",
    "4096",
    "65536",
    "1000000",
    "2147483647",
    "2147483648",
    "0.5",
    "1e-6",
    "1e6",
    "1e20",
    "1e-40",
    "-1",
]
ODD = (
    "-0.0",
    "null",
    "true",
    "[]",
    "{}",
    "[1]",
    "'x'",
    "~/x",
    "~nobody/x",
    "''",
    '"\\0"',
    "9" * 30,
    "[layer]",
    "{a: 1}",
    "1e300",
    "x",
    "auto",
)


def setting(top: pathlib.Path, draws: random.Random) -> str:
    """One to three odd values over a small preset: it is refused, or has a dry run and reads back as it was written."""
    from maxtrain.config import dump, keys, load
    from maxtrain.config.effects import without_effect
    from maxtrain.training import dry_run

    leaves = [path for path, field in keys.walk() if not keys.children(field)]
    words: dict[str, str] = {}
    for _ in range(draws.choice((1, 1, 2, 3))):
        key = draws.choice(leaves)
        field = keys.at(key)
        assert field is not None
        number = keys.accepts(field, int) or keys.accepts(field, float)
        chosen = keys.choices(field) if draws.random() < 0.7 else []
        value = draws.choice(chosen or (NUMBERS if number and draws.random() < 0.8 else ODD))
        words[key.replace("sources.<name>", "sources.stdlib").replace("slots.<name>", "slots.layer").replace("<name>", "x")] = value
    base = draws.choice([*sorted((ROOT / "configs" / "models").glob("*tiny*.yml")), ROOT / "configs" / "runs" / "tiny.yml"])
    given = [f"{key}={value}" for key, value in words.items()]
    if words.get("model.num_layers", "") in NUMBERS[10:]:
        return f"{base.stem} {given}: not tried, because each layer takes a tenth of a second"
    config = load(base, given).config
    without_effect(config)
    (top / "item").write_text(dump(config))
    assert load(top / "item").config == config, given
    dry_run.report(config)
    return f"{base.stem} {given}"


PIECES = (
    *("{{ bos_token }}", "{% for m in messages %}", "{{ m['content'] }}", "{{ m.role }}", "{% endfor %}", "{% if add_generation_prompt %}"),
    *(
        "{% endif %}",
        "{{ 1/0 }}",
        "{{ 'x' * 10**9 }}",
        "{% for i in range(10**9) %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ m }}",
        "{% set a = m %}",
    ),
    *("{{ a.b.c }}", "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}", "{% include 'x' %}", "{{ ().__class__ }}"),
    *(
        "{{ 'a'.center(10**9) }}",
        "{{ messages | tojson }}",
        "{{ 2**(10**8) }}",
        "{%",
        "}}",
        "text",
        "\n",
        "{% macro f() %}{{ f() }}{% endmacro %}",
    ),
)


def template(top: pathlib.Path, draws: random.Random) -> str:
    """A chat template of random pieces: it renders text or is refused, in time."""
    from maxtrain.data import chat

    text = "".join(draws.choice(PIECES) for _ in range(draws.randint(1, 9)))
    messages = [{"role": draws.choice(("user", "system", "x")), "content": draws.choice(("hello", "", "<|im_end|>"))}]
    chat.render(text, messages, generate=draws.random() < 0.5, bos_token="<s>", eos_token="</s>")
    return text


def make_traffic(top: pathlib.Path) -> None:
    """A trained model."""
    words = command(top, top / "whole", top / "cold", "train.steps=4")
    assert finish(words, top / "log") == 0, (top / "log").read_text()[-1500:]


def traffic(top: pathlib.Path, draws: random.Random) -> str:
    """Ten seconds of threads that generate, stream, leave early, score and load weights, their answers compared with those of one alone."""
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from traffic import traffic as ask

    from maxtrain import LLM
    from maxtrain.training import pretrained

    path = str(top / "whole")
    program, source = pretrained.open_for_serving(path, (), {})
    weights = source.load(program.state.model)  # not the engine's: on one CPU it keeps its matrices transposed
    return str(ask(LLM(path, max_requests=8, memory_gib=0.01), weights, 10, draws.randrange(2**31)))


PARTS = {  # what is made once, what makes an item, and seconds that an item may take
    "kills": (make_run, kill, 1000.0),
    "damage": (make_damage, damage, 300.0),
    "signals": (make_pair, signals, 600.0),
    "settings": (lambda top: None, setting, 120.0),
    "templates": (lambda top: None, template, 30.0),
    "traffic": (make_traffic, traffic, 120.0),
}
