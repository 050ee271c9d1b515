"""Generate text with a trained model: `python -m maxtrain.decode MODEL --prompt TEXT`; without a prompt, a chat in the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from maxtrain.config import cli
from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.serving import lines
from maxtrain.serving import prompts as forms

if TYPE_CHECKING:
    from maxtrain.llm import LLM
    from maxtrain.serving.api import Output

USAGE = """python -m maxtrain.decode MODEL [--prompt TEXT ...] [--file FILE] [--out FILE] [--eval FILE] [section.key=value ...]

MODEL is a run of MaxTrain or one of its checkpoints, a folder of Hugging Face's, or a GGUF file. Without prompts they are read from
standard input, a line each; in a terminal a chat begins. Keys of the sections serve, mesh and precision may be set, such as
serve.sampling.top_p=0.9 or serve.max_requests=64; `python -m maxtrain.train --help` explains them."""
OPTIONS = {
    "prompt": "Text to go on from; may be given several times, may be empty.",
    "file": "Prompts from a file: lines of text, or for .jsonl objects with `prompt` (text or token ids) or `messages`, and, if wanted, "
    "`id`, which is handed back, and keys of serve.sampling for this prompt alone.",
    "out": "Where the results go, a JSON object on each line; samples.jsonl in the folder of a run, else nowhere.",
    "eval": "Score a file of questions instead, JSON lines with `prompt` and either `choices` and `answer`, its index, or `target`.",
    "tokens": "Most new tokens for each prompt: serve.sampling.max_tokens.",
    "temperature": "0 takes the likeliest token, 1 samples from the model's distribution: serve.sampling.temperature.",
    "seed": "Seed of the sampling: serve.seed.",
}
FLAGS = {"special": "Special tokens that are spelled out in prompts and messages, such as <|im_start|>, count as such, not as text."}
SAMPLES = {"top_k", "top_p", "min_p", "seed"}  # what a temperature of 0 has no use for
SHORT = {"tokens": "serve.sampling.max_tokens", "temperature": "serve.sampling.temperature", "seed": "serve.seed"}


@dataclass(frozen=True)
class Asked:
    """A prompt: text, token ids or a conversation."""

    prompt: Any
    id: Any = None
    """Handed back with the result."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What it asks for in place of what `serve.sampling` says."""


def read_prompts(path: str) -> list[Asked]:
    """The prompts of a file.

    Raises:
        Refused: the file cannot be read, or a line of it is no prompt.
    """
    if not path.endswith(".jsonl"):
        return [Asked(line) for line in lines.read(path) if line]
    allowed = ("id", "prompt", "messages", *SamplingParams.model_fields)
    return [_asked(f"{path}:{number}", item) for number, item in lines.objects(path, allowed)]


def _asked(place: str, item: Mapping[str, Any]) -> Asked:
    found = [item[key] for key in ("prompt", "messages") if key in item]
    if len(found) != 1 or not isinstance(found[0], str | list):
        raise Refused(f"{place}: write an object with either prompt (text or token ids) or messages, not {json.dumps(item):.80}")
    if "messages" in item and not forms.is_conversation(found[0]):
        raise Refused(f"{place}: messages is a list of objects with role and content, not {found[0]!r:.80}")
    sampling = {key: value for key, value in item.items() if key in SamplingParams.model_fields}
    _sampling(place, SamplingParams(), sampling)
    return Asked(found[0], item.get("id"), sampling)


def _sampling(place: str, usual: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request: those that are usual, but for what it gives. A temperature of 0 takes back what only samples read."""
    kept = usual.model_dump(include=usual.changed - (SAMPLES if given.get("temperature") == 0 else set()))
    try:
        return SamplingParams.model_validate({**kept, **given})
    except ValidationError as error:
        found = [f"{place}: {'.'.join(map(str, item['loc']))}: {item['msg']}".replace(": :", ":") for item in error.errors()]
        raise Refused("\n".join(found)) from None


def generate(llm: LLM, prompts: Sequence[Asked], special: bool = False) -> list[Output]:
    """The outputs in the order of the prompts, conversations answered by the chat template; `special` as in `LLM.generate`."""
    params = [_sampling("serve.sampling", llm.config.serve.sampling, asked.sampling) for asked in prompts]
    outputs: dict[int, Output] = {}
    for ask, talk in ((llm.chat, True), (llm.generate, False)):
        chosen = [index for index, asked in enumerate(prompts) if forms.is_conversation(asked.prompt) == talk]
        given = [prompts[index].prompt for index in chosen]
        wanted = [params[index] for index in chosen]
        found = ask(given, wanted, progress=cli.is_terminal(sys.stderr), special=special) if given else []
        outputs |= zip(chosen, found, strict=True)
    return [outputs[index] for index in range(len(prompts))]


def record(asked: Asked, output: Output, step: int | None) -> dict[str, Any]:
    """The line of JSON for an output."""
    line: dict[str, Any] = {} if asked.id is None else {"id": asked.id}
    line |= {"prompt": output.prompt} if step is None else {"step": step, "prompt": output.prompt}
    if output.error is not None:
        return line | {"error": output.error, "finish_reason": "refused"}
    first = output.completions[0]
    line |= {"text": first.text, "finish_reason": first.finish_reason, "prompt_tokens": len(output.prompt_token_ids)}
    line |= {"tokens": len(first.token_ids), "seconds": round(first.times[-1], 3)}
    if first.logprobs is not None:
        line["logprobs"] = first.logprobs
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = output.prompt_logprobs
    return line | ({"samples": [item.text for item in output.completions]} if len(output.completions) > 1 else {})


def chat(llm: LLM, console: Console, special: bool = False) -> None:
    """Answer what is typed, token by token, until the input ends; `special` as in `LLM.generate`."""
    console.print("Type a message; Ctrl-C ends an answer, Ctrl-D the chat.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
        messages = _answer(llm, console, [*messages, {"role": "user", "content": said}], special)


def _answer(llm: LLM, console: Console, messages: list[dict[str, str]], special: bool) -> list[dict[str, str]]:
    """The conversation with an answer to its last message, without its oldest turns where it would be refused with them.

    A message that is refused even alone is taken back, and the conversation stays as it was before.
    """
    for first in range(0, len(messages), 2):
        answer = ""
        try:
            for delta in llm.stream(messages[first:], special=special):
                if first and not answer:
                    console.print(f"(without the first {first} messages, which no longer fit)", style="dim")
                answer += delta.text
                console.print(delta.text, end="", markup=False, highlight=False)
        except Refused as refusal:
            error = str(refusal)
            continue
        except KeyboardInterrupt:
            pass
        console.print()
        return [*messages[first:], {"role": "assistant", "content": answer}]
    console.print(f"This message is refused, and left out: {error}", markup=False, highlight=False)
    return messages[:-1]


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


def _overrides(arguments: cli.Arguments) -> list[str]:
    """`section.key=value` of the short options that are given, and of the command line."""
    values = {
        "tokens": cli.number(arguments, "tokens", int, minimum=1),
        "temperature": cli.number(arguments, "temperature", float, minimum=0),
        "seed": cli.number(arguments, "seed", int, minimum=0),
    }
    names = {word.partition("=")[0] for word in arguments.overrides}
    clash = [key for option, key in SHORT.items() if key in names and values[option] is not None]
    if clash:
        raise Refused(f"{clash[0]} is set twice, once by its short option")
    words = [f"{SHORT[option]}={value}" for option, value in values.items() if value is not None]
    if values["temperature"] == 0:  # the likeliest token: what a run says of samples does not hold for it
        neutral = SamplingParams().model_dump(mode="json", include=SAMPLES)
        words += [f"serve.sampling.{name}={json.dumps(value)}" for name, value in neutral.items() if f"serve.sampling.{name}" not in names]
    return [*words, *arguments.overrides]


def _prompts(arguments: cli.Arguments) -> list[Asked]:
    """The prompts of the command line, its files, or standard input; none for questions, or for a chat in the terminal."""
    options = arguments.options
    if options["eval"]:
        useless = [name for name in ("prompt", "file", "tokens", "temperature") if options[name]]
        useless += ["special"] if arguments.flags["special"] else []
        if useless:
            raise Refused(f"--{useless[0]} has no effect with --eval, which asks the questions of its file: leave one of them out")
        return []
    prompts = [Asked(text) for text in options["prompt"]]
    for path in options["file"]:
        prompts += read_prompts(path)
    if prompts:
        return prompts
    if not options["file"] and cli.is_terminal(sys.stdin) and cli.is_terminal(sys.stdout):
        if options["out"]:
            raise Refused("--out has no effect in a chat: give prompts, or leave it out")
        return []
    try:
        text = "" if sys.stdin is None or options["file"] else sys.stdin.read()
    except (OSError, ValueError) as error:
        raise Refused(f"standard input cannot be read: {error}") from error
    prompts = [Asked(line) for line in text.split("\n") if line]
    if not prompts:
        raise Refused(f"no prompt is given\nusage: {USAGE}")
    return prompts


def main(argv: Sequence[str]) -> int:
    """Print a continuation of each prompt, write the results, and say how fast it went."""
    arguments = cli.parse(argv, usage=USAGE, flags=FLAGS, options=OPTIONS, positional="MODEL", overrides=False, assignments=True)
    overrides, prompts, out = _overrides(arguments), _prompts(arguments), cli.one(arguments, "out")
    file = None if out is None else cli.open_output(out, "a")
    from maxtrain.llm import LLM

    llm = LLM(arguments.config, overrides=overrides)
    if arguments.options["eval"]:
        from maxtrain.serving.questions import evaluate

        for path in arguments.options["eval"]:
            line = json.dumps({"file": path, **evaluate(llm, path)})
            print(line, flush=True)
            if file is not None:
                print(line, file=file, flush=True)
        return 0
    if not prompts:
        chat(llm, Console(), arguments.flags["special"])
        return 0
    return _batch(llm, prompts, file, arguments.flags["special"])


def _batch(llm: LLM, prompts: Sequence[Asked], file: TextIO | None, special: bool) -> int:
    console, start = Console(stderr=True), time.perf_counter()
    outputs = generate(llm, prompts, special)
    seconds = time.perf_counter() - start
    for output in outputs:  # first, since a disk may be full
        shown = output.prompt if isinstance(output.prompt, str) else ""
        print(f"refused: {output.error}" if output.error is not None else shown + output.text, flush=True)
    if file is None and llm.folder is not None:
        try:
            file = cli.open_output(os.path.join(llm.folder, "samples.jsonl"), "a")
        except Refused as refusal:  # such as on a read-only disk: what was found is printed
            console.print(str(refusal), markup=False, highlight=False)
    if file is not None:
        with file:
            for asked, output in zip(prompts, outputs, strict=True):
                file.write(json.dumps(record(asked, output, llm.step), ensure_ascii=False) + "\n")
    console.print(summary(llm, outputs, seconds))
    return 2 if any(output.error is not None for output in outputs) else 0


if __name__ == "__main__":
    cli.run(main)
