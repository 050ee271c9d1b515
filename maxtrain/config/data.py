"""The sections about data: tokenizer, sources, batches and evaluation sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maxtrain.config.section import FrozenDict, NumBytes, Path, PositiveFloat, PositiveInt, Section


class Tokenizer(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "bpe", "huggingface"] = "byte"
    """`byte`: UTF-8 bytes. `bpe`: byte-level BPE trained on the training sources. `huggingface`: a tokenizer.json."""
    path: Path | None = None
    """The tokenizer.json of `kind: huggingface`, or its folder."""
    vocab_size: PositiveInt | None = None
    """Size of the vocabulary that `kind: bpe` trains, special tokens included."""
    train_bytes: NumBytes = 20_000_000
    """How much text `kind: bpe` trains on, at most, in bytes."""

    @model_validator(mode="after")
    def _check(self) -> Tokenizer:
        needs = {"byte": None, "bpe": "vocab_size", "huggingface": "path"}[self.kind]
        for key in ("path", "vocab_size"):
            if (getattr(self, key) is not None) != (key == needs):
                raise ValueError(f"kind: {self.kind} " + (f"needs {key}" if key == needs else f"does not read {key}: remove it"))
        if self.vocab_size is not None and self.vocab_size < 258:
            raise ValueError(f"vocab_size={self.vocab_size} is too small: 256 bytes and 2 special tokens need at least 258")
        return self


class Source(Section):
    """Where documents come from."""

    kind: Literal["stdlib", "text", "jsonl", "synthetic"]
    """`stdlib`: the standard library of Python. `text`: a file each. `jsonl`: a line each. `synthetic`: made up."""
    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the other sources."""
    path: Path | None = None
    """File or folder of `text` and `jsonl`; files ending in .gz are read too."""
    pattern: str = "**/*"
    """Which files below `path` are taken, when it is a folder."""
    field: str = "text"
    """The key of a `jsonl` line that holds the text."""
    split: Literal["all", "train", "heldout"] = "all"
    """Which part: documents (files) are assigned to `heldout` by the hash of their content."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents that `split: heldout` takes and `split: train` leaves."""
    num_documents: PositiveInt = 1000
    """Number of documents of a `synthetic` source."""
    document_length: PositiveInt = 512
    """Longest document of a `synthetic` source, in bytes."""
    max_bytes: NumBytes | None = None
    """Take no more text than this from the source (whole documents); null takes all."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        reads = {
            "stdlib": set(),
            "text": {"path", "pattern"},
            "jsonl": {"path", "pattern", "field"},
            "synthetic": {"num_documents", "document_length"},
        }
        own = set().union(*reads.values())
        extra = sorted((self.changed & own) - reads[self.kind])
        if extra:
            raise ValueError(f"kind: {self.kind} does not read {', '.join(extra)}: remove it")
        if "path" in reads[self.kind] and self.path is None:
            raise ValueError(f"kind: {self.kind} needs path")
        if "heldout_fraction" in self.changed and self.split == "all":
            raise ValueError("heldout_fraction has no effect with split: all; set split: train or heldout")
        return self


class Data(Section):
    """The training data and how it is cut into batches."""

    batch_size: PositiveInt = 8
    """Sequences in a global batch, over all devices."""
    length: PositiveInt = 256
    """Tokens in a sequence."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""
    sources: dict[str, Source] = FrozenDict(stdlib=Source(kind="stdlib", split="train"))
    """Training sources by name; their weights are shares of the training tokens."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare batches; 0 prepares them in threads of the trainer. Batches do not depend on it."""
    prefetch: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Batches prepared ahead."""
    cache_dir: Path = "~/.cache/maxtrain/data"
    """Where prepared token shards and trained tokenizers are kept, by the fingerprint of what made them."""

    @field_validator("sources", mode="after")
    @classmethod
    def _check_sources(cls, value: dict[str, Source]) -> dict[str, Source]:
        if not value:
            raise ValueError("sources is empty: name at least one source")
        return value
