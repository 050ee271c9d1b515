"""MaxTrain: train a language model from a YAML file, on a laptop's CPU first and on pods with the same code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxtrain.config.serving import SamplingParams
    from maxtrain.llm import LLM
    from maxtrain.training.pretrained import Pretrained

__all__ = ["LLM", "SamplingParams", "load"]

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Pretrained:
    """A trained model: a run of MaxTrain or one of its checkpoints, a folder of Hugging Face's, or a GGUF file.

    `overrides` are `section.key=value` that do not change what it computes, such as `model.ignore_fields=[name]`.

    Returns: an object with `.config`, `.tokenizer` (None where there is none) and `.model`; calling it with tokens
    int32 [batch, length] gives logits float32 [batch, length, vocab].

    Raises:
        maxtrain.config.Refused: no trained model is there, it is damaged, or it is of a kind that is not supported.
    """
    from maxtrain.training.pretrained import load_pretrained  # jax only from here on

    return load_pretrained(path, overrides)


def __getattr__(name: str) -> Any:
    """`LLM` and `SamplingParams`, with jax and pydantic only when they are asked for."""
    if name == "LLM":
        from maxtrain.llm import LLM

        return LLM
    if name == "SamplingParams":
        from maxtrain.config.serving import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
