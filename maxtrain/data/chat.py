"""Conversations as text, by the Jinja template that a model's tokenizer carries."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config.errors import Refused

SECONDS = 5.0  # of computing for one conversation; published templates take a millisecond for ten messages
SCRIPT = os.path.join(os.path.dirname(__file__), "template_process.py")


class TemplateProcess:
    """The process in which templates are rendered: started when it is first needed, and anew when a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, str]:
        """Its answer, `text` or `error`. Raises `OSError` where no process can be started."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # again where it had ended before it was asked
                process = self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()
                    answer = process.stdout.readline()
                    if answer.endswith(b"\n"):
                        return json.loads(answer)
                    break
            code = process.wait()
            if code == -signal.SIGPROF:
                return {"error": f"it takes more than {request['seconds']:g} seconds of computing"}
            return {"error": f"the process that renders it ended with code {code}"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:  # a fork must not share its pipes
            command = [sys.executable, "-P", SCRIPT]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._owner = os.getpid()
            atexit.register(self._end, self._process)
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if self._owner == os.getpid() and process.stdin is not None:
            process.stdin.close()  # it ends where its input does
            process.wait()


PROCESS = TemplateProcess()


def check(messages: Any) -> list[dict[str, Any]]:
    """The messages of a conversation as plain data; keys that are null are left out, as transformers does.

    Raises:
        Refused: it is no list of messages with a role.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Refused(f"a conversation is a list of messages with role and content, not {messages!r:.100}")
    bad = [message for message in messages if not isinstance(message, Mapping) or not isinstance(message.get("role"), str)]
    if bad:
        raise Refused(f"a conversation is a list of messages with role and content, not {bad[0]!r:.100}")
    try:
        plain = [json.loads(json.dumps(dict(message))) for message in messages]
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"a message is made of texts, numbers, lists and objects: {error}") from None
    return [{key: value for key, value in message.items() if value is not None} for message in plain]


def render(template: str, messages: Sequence[Mapping[str, Any]], *, generate: bool, **variables: Any) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: each with `role` and `content`.
        generate: whether the text ends with the beginning of an answer.
        variables: what else the template may read, such as `bos_token`.

    Raises:
        Refused: the messages are malformed, or the template does not accept them, fails, or takes too much time or memory.
    """
    known = {"messages": check(messages), "tools": None, "documents": None, "add_generation_prompt": generate, **variables}
    try:
        answer = PROCESS.ask({"template": template, "seconds": SECONDS, "variables": known})
    except OSError as error:
        raise Refused(f"chat templates are rendered by a process of their own, which cannot be started: {error.strerror}") from None
    if "error" in answer:
        raise Refused(f"the model's chat template does not accept these messages: {answer['error']}")
    return answer["text"]
