"""`maxtrain.LLM`: any trained model, opened and ready to generate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from maxtrain.serving import api
from maxtrain.training import pretrained


class LLM(api.LLM):
    """The model at a path, ready to generate, chat and score.

    Args:
        path: a run of MaxTrain or one of its checkpoints, a folder of Hugging Face's, or a GGUF file.
        overrides: `section.key=value` of the sections serve, mesh and precision.
        serve: keys of the section `serve`, such as `max_requests=64`.

    Raises:
        maxtrain.config.Refused: no trained model is there, or it cannot be served so.
    """

    def __init__(self, path: str | os.PathLike[str], *, overrides: Sequence[str] = (), **serve: Any) -> None:
        opened = pretrained.load_for_serving(os.fspath(path), overrides, serve)
        self.step = opened.step
        super().__init__(opened.model, opened.config, opened.layout, opened.tokenizer)
