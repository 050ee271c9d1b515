"""`maxtrain.LLM`: any trained model, opened and ready to generate; and `Probe`, which asks a model while it is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import jax

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.serving import api, questions
from maxtrain.training import loop, pretrained
from maxtrain.training import run as runs


class LLM(api.LLM):
    """The model at a path, ready to generate, chat and score.

    Args:
        path: a run of MaxTrain or one of its checkpoints, a folder of Hugging Face's, or a GGUF file.
        overrides: `section.key=value` of the sections serve, mesh and precision, and `model.ignore_fields`.
        serve: keys of the section `serve`, such as `max_requests=64`.

    Raises:
        maxtrain.config.Refused: no trained model is there, or it cannot be served so.
    """

    def __init__(self, path: str | os.PathLike[str], *, overrides: Sequence[str] = (), **serve: Any) -> None:
        program, source = pretrained.open_for_serving(os.fspath(path), overrides, serve)
        super().__init__(lambda: source.load(program.state.model), program.config, program.layout, source.tokenizer)
        self.step = source.step
        """Of the checkpoint; None for a model that is not MaxTrain's."""
        self.folder = None if source.step is None else runs.locate(os.fspath(path))[0]
        """Of the run, where results of it are kept; a checkpoint is only looked at."""


class Probe(loop.Hook):
    """Goes on from `eval.prompts` and answers `eval.questions` at each evaluation of a run, with the live parameters.

    Raises:
        Refused: a file of questions cannot be read.
    """

    def __init__(self, cfg: schema.Eval) -> None:
        for path in cfg.questions.values():
            questions.read(path)
        self.cfg = cfg
        self.llm: api.LLM | None = None

    def on_start(self, trainer: loop.Trainer) -> None:
        """Forget the samples of steps that are computed again. The engine is driven by one process."""
        if jax.process_count() > 1:
            raise Refused("eval.prompts and eval.questions are for runs of one process: use `python -m maxtrain.decode` on a checkpoint")
        if self.cfg.prompts:
            rewind(self._path(trainer), int(trainer.state.step))

    @staticmethod
    def _path(trainer: loop.Trainer) -> str:
        return os.path.join(trainer.config.run.folder, "samples.jsonl")

    def on_eval(self, trainer: loop.Trainer, row: dict[str, Any]) -> None:
        """Add accuracies to the row, and the samples to the run's samples.jsonl."""
        config, step = trainer.config, row["step"]
        if self.llm is None:
            self.llm = api.LLM(lambda: trainer.state.model, config, trainer.program.layout, trainer.tokenizer)
        else:
            self.llm.load(trainer.state.model, version=step)
        for name, path in self.cfg.questions.items():
            row |= {f"eval/{name}/{metric}": value for metric, value in questions.evaluate(self.llm, path).items()}
        if not self.cfg.prompts:
            return
        params = config.serve.sampling
        if params.temperature and params.seed is None:  # the same samples after a resume
            params = params.model_copy(update={"seed": config.serve.seed})
        outputs = self.llm.generate(self.cfg.prompts, params)
        rewind(self._path(trainer), step - 1)  # after a rollback this step comes a second time
        with open(self._path(trainer), "a", encoding="utf-8", errors="backslashreplace") as file:
            for output in outputs:
                text = {"error": output.error} if output.error else {"text": output.text}
                file.write(json.dumps({"step": step, "prompt": output.prompt} | text, ensure_ascii=False) + "\n")


def rewind(path: str, step: int) -> None:
    """Take the rows that training wrote after `step` out of a run's samples.jsonl, and a row that was cut short; others stay.

    Rows of `maxtrain.decode` have a `finish_reason`, those of training have none.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        rows = file.read().splitlines(keepends=True)
    kept = [row for row in rows if _stays(row, step)]
    if kept != rows:
        with open(f"{path}.new", "wb") as file:
            file.writelines(kept)
        os.replace(f"{path}.new", path)


def _stays(row: bytes, step: int) -> bool:
    if not row.endswith(b"\n"):
        return False  # cut short by a kill
    try:
        found = json.loads(row)
    except ValueError:
        return True
    return not isinstance(found, dict) or "finish_reason" in found or not isinstance(at := found.get("step"), int) or at <= step


def probes(cfg: schema.Eval) -> list[loop.Hook]:
    """The hook that an evaluation asks for, if it does."""
    return [Probe(cfg)] if cfg.prompts or cfg.questions else []
