"""What several tests of the data share: a source on disk, and a tokenizer in which every character is a token of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maxtrain.config.schema import Source
from maxtrain.data.boundaries import Boundaries
from maxtrain.data.tokenizer import Tokenizer


class CharTokenizer(Tokenizer):
    """Code points from 2 on; so a test can write documents in which no token occurs twice."""

    vocab_size, fingerprint = 70_000, "char"
    boundaries = Boundaries((0,), (0,), (1,), frozenset({1}))

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text], np.int32) for text in texts]


@pytest.fixture
def characters() -> Tokenizer:
    return CharTokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Source]:
    """Makes a jsonl source of the given texts."""

    def make(texts: list[str], name: str = "documents", **keys) -> Source:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return Source(kind="jsonl", path=str(path), **keys)

    return make
