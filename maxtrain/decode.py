"""Generate text with a trained model: `python -m maxtrain.decode MODEL --prompt TEXT`; without a prompt, a chat in the terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maxtrain.config import cli
from maxtrain.config.errors import Refused

if TYPE_CHECKING:
    from maxtrain.llm import LLM
    from maxtrain.serving.api import Output

USAGE = """python -m maxtrain.decode MODEL [--prompt TEXT ...] [--file FILE] [--out FILE] [--eval FILE] [section.key=value ...]

MODEL is a run of MaxTrain or one of its checkpoints, a folder of Hugging Face's, or a GGUF file. Without prompts they are read from
standard input, a line each; in a terminal a chat begins. Keys of the sections serve, mesh and precision may be set, such as
serve.sampling.top_p=0.9 or serve.max_requests=64; `python -m maxtrain.train --help` explains them."""
OPTIONS = {
    "prompt": "Text to go on from; may be given several times, may be empty.",
    "file": "Prompts from a file: lines of text, or for .jsonl objects with `prompt` (text or token ids) or `messages`.",
    "out": "Where the results go, a JSON object on each line; samples.jsonl in the folder of a run, else nowhere.",
    "eval": "Score a file of questions instead, JSON lines with `prompt` and either `choices` and `answer`, its index, or `target`.",
    "tokens": "Most new tokens for each prompt: serve.sampling.max_tokens (128).",
    "temperature": "0 takes the likeliest token, 1 samples from the model's distribution: serve.sampling.temperature (0.7).",
    "seed": "Seed of the sampling: serve.seed (0).",
}


def read_prompts(path: str) -> list[Any]:
    """Prompts of a file: texts, lists of token ids, or conversations.

    Raises:
        Refused: the file cannot be read, or a line of it is no prompt.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--file {path}: cannot be read: {error}") from error
    if not path.endswith(".jsonl"):
        return [line for line in lines if line]
    return [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(path: str, number: int, line: str) -> Any:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise Refused(f"{path}:{number}: not JSON ({error})") from error
    found = [item[key] for key in ("prompt", "messages") if isinstance(item, dict) and key in item]
    if len(found) != 1 or not isinstance(found[0], str | list):
        raise Refused(f"{path}:{number}: write an object with either prompt (text or token ids) or messages, not {line:.80}")
    return found[0]


def generate(llm: LLM, prompts: Sequence[Any]) -> Iterator[Output]:
    """The outputs in the order of the prompts, conversations answered by the chat template."""
    talks = [isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) for prompt in prompts]
    answered = iter(llm.chat([prompt for prompt, talk in zip(prompts, talks, strict=True) if talk], progress=sys.stderr.isatty()))
    continued = iter(llm.generate([prompt for prompt, talk in zip(prompts, talks, strict=True) if not talk], progress=sys.stderr.isatty()))
    return (next(answered if talk else continued) for talk in talks)


def record(output: Output, step: int | None) -> dict[str, Any]:
    """The line of JSON for an output."""
    line: dict[str, Any] = {"prompt": output.prompt} if step is None else {"step": step, "prompt": output.prompt}
    if output.error is not None:
        return line | {"error": output.error}
    first = output.completions[0]
    line |= {"text": first.text, "finish_reason": first.finish_reason, "prompt_tokens": len(output.prompt_token_ids)}
    line |= {"tokens": len(first.token_ids), "seconds": round(first.times[-1], 3)}
    if first.logprobs is not None:
        line["logprobs"] = first.logprobs
    return line | ({"samples": [item.text for item in output.completions]} if len(output.completions) > 1 else {})


def chat(llm: LLM, console: Console) -> None:
    """Answer what is typed, token by token, until the input ends."""
    console.print("Type a message; Ctrl-C ends an answer, Ctrl-D the chat.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": console.input("[bold]> [/bold]")})
        except (EOFError, KeyboardInterrupt):
            return
        answer = ""
        try:
            for delta in llm.stream(messages):
                answer += delta.text
                console.print(delta.text, end="", markup=False, highlight=False)
        except KeyboardInterrupt:
            pass
        console.print()
        messages.append({"role": "assistant", "content": answer})


def summary(llm: LLM, outputs: Sequence[Output], seconds: float) -> Table:
    """What was done, and how fast."""
    engine, samples = llm.engine, [item for output in outputs for item in output.completions]
    first = sorted(item.times[0] for item in samples)
    gaps = sorted(after - before for item in samples for before, after in zip(item.times, item.times[1:], strict=False))
    tokens, hits = sum(len(item.token_ids) for item in samples), engine.scheduler.num_hits / max(1, engine.scheduler.num_asked)
    table = Table(title=f"{len(outputs)} prompts, {sum(output.error is not None for output in outputs)} refused", show_header=False)
    rows = {"new tokens": f"{tokens:,}", "tokens/s": f"{tokens / seconds:,.1f}"}
    if first:
        rows["time to first token, median and 99%"] = " ".join(f"{first[int(share * (len(first) - 1))]:.3f} s" for share in (0.5, 0.99))
    if gaps:
        rows["time between tokens, median and 99%"] = " ".join(f"{gaps[int(share * (len(gaps) - 1))]:.4f} s" for share in (0.5, 0.99))
    rows |= {"prompt tokens from the cache": f"{hits:.1%}", "waste of the cache": f"{engine.stats.waste / max(1, engine.stats.steps):.1%}"}
    if engine.stats.guessed:
        rows["guessed tokens accepted"] = f"{engine.stats.accepted / engine.stats.guessed:.1%}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _overrides(arguments: cli.Arguments, given: Sequence[str]) -> list[str]:
    """`section.key=value` of the short options and of the command line, which wins."""
    tokens = cli.number(arguments, "tokens", 128, int, minimum=1)
    temperature = cli.number(arguments, "temperature", 0.7, float, minimum=0)
    seed = cli.number(arguments, "seed", 0, int, minimum=0)
    keys = {"serve.sampling.max_tokens": tokens, "serve.sampling.temperature": temperature, "serve.seed": seed}
    names = {word.partition("=")[0] for word in given}
    clash = [
        name for name, option in zip(keys, ("tokens", "temperature", "seed"), strict=True) if name in names and arguments.options[option]
    ]
    if clash:
        raise Refused(f"{clash[0]} is set twice, once by its short option")
    return [*(f"{name}={value}" for name, value in keys.items() if name not in names), *given]


def main(argv: Sequence[str]) -> int:
    """Print a continuation of each prompt, write the results, and say how fast it went."""
    given = [word for word in argv if re.match(r"[\w]+\.[\w.]+=", word)]
    words = [word for word in argv if word not in given]
    arguments = cli.parse(words, usage=USAGE, options=OPTIONS, positional="MODEL", overrides=False)
    overrides = _overrides(arguments, given)
    prompts: list[Any] = list(arguments.options["prompt"])
    for path in arguments.options["file"]:
        prompts += read_prompts(path)
    asked, talk = bool(prompts or arguments.options["eval"]), sys.stdin.isatty() and sys.stdout.isatty()
    if not asked and not talk:
        prompts = [line for line in sys.stdin.read().splitlines() if line]
        if not prompts:
            raise Refused(f"no prompt is given\nusage: {USAGE}")
    from maxtrain.llm import LLM

    console = Console(stderr=True)
    llm = LLM(arguments.config, overrides=overrides)
    if arguments.options["eval"]:
        from maxtrain.serving.questions import evaluate

        for path in arguments.options["eval"]:
            print(json.dumps({"file": path, **evaluate(llm, path)}))
        return 0
    if not asked and talk:
        chat(llm, Console())
        return 0
    return _batch(llm, arguments, prompts, console)


def _batch(llm: LLM, arguments: cli.Arguments, prompts: Sequence[Any], console: Console) -> int:
    import time

    start = time.perf_counter()
    outputs = list(generate(llm, prompts))
    seconds = time.perf_counter() - start
    own = os.path.join(arguments.config, "samples.jsonl") if llm.step is not None and os.path.isdir(arguments.config) else None
    path = next(iter(arguments.options["out"]), own)
    lines = [json.dumps(record(output, llm.step), ensure_ascii=False) for output in outputs]
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    for output in outputs:
        shown = output.prompt if isinstance(output.prompt, str) else ""
        print(f"refused: {output.error}" if output.error is not None else shown + output.text, flush=True)
    console.print(summary(llm, outputs, seconds))
    return 2 if any(output.error is not None for output in outputs) else 0


if __name__ == "__main__":
    cli.run(main)
