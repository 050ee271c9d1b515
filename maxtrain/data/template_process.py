"""A process that renders chat templates, which are programs of strangers: in a sandbox, within bounds of memory and of computing time.

It is run as a script, imports nothing of this package, and answers a line of JSON with a line of JSON until its input ends. What no
sandbox of Python can bound, a single product of a billion characters or a loop within a loop, ends this process alone.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**29  # bytes of this process
MAX_TEXT = 2**24  # characters of a conversation


class Generation(Extension):
    """`{% generation %}`, by which templates mark what the assistant says: rendered as if the tags were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements between the tags; in a scope of their own, as transformers has them."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache
def _compiled(template: str) -> Template:
    """A template, with the functions that those of Hugging Face may use; it can reach nothing else."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(template).render(**variables)
        return {"text": text} if len(text) <= MAX_TEXT else {"error": f"it makes {len(text):,} characters of them, more than {MAX_TEXT:,}"}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY // 2**20} MiB of memory"}
    except TemplateError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main() -> None:
    """Answer `{"template", "seconds", "variables"}` with `{"text"}` or `{"error"}`; more than `seconds` of computing end the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it is for the program that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = json.dumps(_answer(request["template"], request["variables"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
