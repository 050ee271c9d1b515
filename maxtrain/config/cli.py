"""The command line that all entries share: a path, `section.key=value`, and the few flags an entry adds."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO, TypeVar, cast

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from maxtrain.config import keys, loader
from maxtrain.config.effects import without_effect
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.config.schema import Config, Section

Number = TypeVar("Number", int, float)
HELP = {"help": "Print this text."}
SHOW = {
    "print-config": "Print every value with the file and line that set it, and stop.",
    "diff": "The same for those values only that differ from their defaults.",
}
LAYERS = """
Keys are nested under their sections in the YAML file and written section.key=value here, the value being YAML too. `include:` names
files, relative to the one it stands in, that lie below it: later files win over earlier ones, the file over its includes, the command
line over all. Mappings are merged key by key, lists and single values replaced; `!replace` before a mapping replaces it as a whole.
"""


@dataclass(frozen=True)
class Arguments:
    """What was asked for on the command line."""

    config: Any
    """The path given first; None when it may be left out and is."""
    overrides: tuple[str, ...]
    """The words `section.key=value`."""
    flags: Mapping[str, bool]
    """Every flag by name, and whether it was given."""
    options: Mapping[str, list[str]]
    """Every option by name, and the values it was given."""
    words: tuple[str, ...] = ()
    """All words that are none of these, the path first."""


def parse(
    argv: Sequence[str],
    *,
    usage: str,
    flags: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    positional: str = "CONFIG.yml",
    overrides: bool = True,
    assignments: bool = False,
    positionals: int = 1,
) -> Arguments:
    """Read the command line of an entry; `--help`, `--print-config` and `--diff` print what they promise and exit with 0.

    Args:
        argv: The words behind the program's name.
        usage: The line that `--help` begins with.
        flags: Help of each flag without a value (`--name`).
        options: Help of each option with a value (`--name VALUE` or `--name=VALUE`), which may be given several times.
        positional: What the path is called in messages.
        overrides: Whether the entry takes a config and `section.key=value`; otherwise the path must be given.
        assignments: Whether it takes `section.key=value` beside a path that is no config, too.
        positionals: The most words that are read besides, `Arguments.words`.

    Raises:
        Refused: a word that is not understood, or the config that is to be printed.
    """
    flags, options = {**(flags or {}), **(SHOW if overrides else {}), **HELP}, options or {}
    given, values = dict.fromkeys(flags, False), {name: list[str]() for name in options}
    paths: list[str] = []
    assigned: list[str] = []
    assignment = re.compile(r"[^/=]+=" if overrides else r"\w+(\.\w+)+=" if assignments else r"(?!)")
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "-h":
            given["help"] = True
        elif not word.startswith("-"):
            (assigned if assignment.match(word) else paths).append(word)
        elif name in flags and not equals:
            given[name] = True
        elif name in options:
            following = value if equals else next(words, None)
            if following is None:
                raise Refused(f"--{name} needs a value: {options[name]}")
            values[name].append(following)
        else:
            raise Refused(_not_known(word, name, flags, options))
    if given["help"]:
        _show(help_text(usage, flags, options, overrides))
    if len(paths) > positionals:
        hint = ", a value is set by section.key=value" * (overrides or assignments)
        raise Refused(f"{paths[positionals]!r} is too much: {'one' if positionals == 1 else positionals} {positional} is read{hint}")
    if not paths and not overrides:
        raise Refused(f"no {positional} is given\nusage: {usage}")
    arguments = Arguments(paths[0] if paths else None, tuple(assigned), given, values, tuple(paths))
    if overrides and (given["print-config"] or given["diff"]):
        _show(loader.render(loader.load(arguments.config, arguments.overrides), given["diff"]))
    return arguments


def _not_known(word: str, name: str, flags: Mapping[str, str], options: Mapping[str, str]) -> str:
    if name in flags:
        return f"{word}: --{name} takes no value"
    if keys.at(name) is not None:
        return f"unknown flag {word}: a key of the config is written without dashes, {name}=value"
    near = keys.did_you_mean(name, [*flags, *options]).replace("mean ", "mean --")
    return f"unknown flag {word}{near or '; --help names them all'}"


def _show(text: str) -> NoReturn:
    """Print and exit with 0, also when the reader (`| head`) has seen enough."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard_output()
    raise SystemExit(0)


def help_text(usage: str, flags: Mapping[str, str], options: Mapping[str, str], config: bool) -> str:
    """The text of `--help`, as wide as the terminal; with `config` it goes on to every key's type, default and meaning."""
    width = min(max(shutil.get_terminal_size().columns, 40), 120)

    def paragraph(text: str, first: int, rest: int) -> str:
        text = " ".join(text.split())
        return textwrap.fill(text, width, initial_indent=" " * first, subsequent_indent=" " * rest, break_on_hyphens=False)

    named = {f"--{name} VALUE": about for name, about in options.items()} | {f"--{name}": about for name, about in flags.items()}
    lines = [f"usage: {usage}", ""]
    for name, about in named.items():
        lines += [f"  {name}", paragraph(about, 6, 6)]
    if config:
        lines += ["", paragraph(LAYERS, 0, 0)]
        for path, field in keys.walk():
            if path in Config.model_fields:
                lines += ["", paragraph(f"{path}: {getattr(field.annotation, '__doc__', '')}", 0, 0)]
            elif field.description:
                lines += [paragraph(f"{path}{_default(field)}  [{keys.allowed(field)}]", 2, 6), paragraph(field.description, 6, 6)]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    """` = value` as YAML; nothing for a section, whose keys have their own defaults."""
    if field.is_required():
        return " (required)"
    if isinstance(field.default, Section):
        return ""
    annotation: Any = field.annotation
    return f" = {loader.text(TypeAdapter(annotation).dump_python(field.default, mode='json', exclude_defaults=True))}"


def one(arguments: Arguments, name: str) -> str | None:
    """The value of an option, None if it is not given; `Refused` if it is given twice."""
    given = arguments.options[name]
    if len(given) > 1:
        raise Refused(f"--{name} is given {len(given)} times ({', '.join(given)}): one is read")
    return given[0] if given else None


def number(arguments: Arguments, name: str, kind: type[Number], *, minimum: Number) -> Number | None:
    """The value of an option that is a number, None if it is not given.

    Raises:
        Refused: it is not such a number, is below the minimum, or is given twice.
    """
    given = one(arguments, name)
    if given is None:
        return None
    try:
        value = kind(given)
    except ValueError:
        value = None
    if value is None or not minimum <= value < math.inf:
        raise Refused(f"--{name} {given}: write {keys.WORDS[kind]} >= {minimum}")
    return value


def load_config(arguments: Arguments) -> Config:
    """The config that was asked for; keys that have no effect in it are named on standard error.

    Raises:
        Refused: it has mistakes.
    """
    config = loader.load(arguments.config, arguments.overrides).config
    for sentence in without_effect(config):
        print(f"note: {sentence}", file=sys.stderr)
    return config


def open_output(path: str, mode: str) -> TextIO:
    """The file of `--out`, opened before the work whose results it is for; half a character is written as JSON spells it.

    Raises:
        Refused: it cannot be written.
    """
    try:
        return cast(TextIO, open(expand(path, "--out"), mode, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise Refused(f"--out {path}: cannot be written: {error.strerror}") from error


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream, which is None or closed where there is none, is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run an entry and exit with its code (0 for None).

    2 and a message without traceback for `Refused`, 1 and a message for what the system refuses (a full disk, no more memory), 130 for
    Ctrl-C, 0 if whoever reads the output (`| head`) has seen enough.
    """
    if sys.stdout is not None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to end
    try:
        code = main(sys.argv[1:]) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        code = 2
    except BrokenPipeError:
        _discard_output()
        code = 0
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else str(error), file=sys.stderr)
        code = 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says it
            raise
        print(f"the memory does not suffice: {' '.join(str(error).split())[:300]}; --dry-run shows what takes it", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _discard_output() -> None:
    """What is still to be printed goes nowhere, because its reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
