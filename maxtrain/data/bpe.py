"""A byte-level BPE tokenizer trained on the documents of sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from maxtrain.config import schema
from maxtrain.data import sources
from maxtrain.data.boundaries import BOS, EOS

# The pre-tokenisation of GPT-4 but for two things: digits stand alone, so that numbers are split the same way everywhere; punctuation
# takes the blanks after it along and a line break its indentation, which saves a tenth of the tokens of Python source.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"


def train(cfg: schema.Data) -> Backend:
    """The tokenizer for the sources of `cfg`, with the special tokens `BOS` and `EOS`."""
    backend = byte_level(models.BPE())
    assert cfg.tokenizer.vocab_size is not None
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.tokenizer.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(training_text(cfg.sources, cfg.tokenizer.train_bytes), trainer)
    return backend


def training_text(training: Mapping[str, schema.Source], limit: int) -> Iterator[str]:
    """The first documents of every source, as many bytes of each as its weight is of `limit`."""
    total = sum(source.weight for source in training.values())
    for _, source in sorted(training.items()):
        left = int(limit * source.weight / total)
        for text in (text for document in sources.documents(source) for text in document.whole_or_chunks()):
            data = text.encode()[:left]
            yield data.decode(errors="ignore")
            left -= len(data)
            if not left:
                break


def byte_level(model: models.BPE) -> Backend:
    """A tokenizer of bytes, cut by `PATTERN` before `model` merges."""
    backend = Backend(model)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def bytes_only() -> Backend:
    """A tokenizer without merges: ids 0 to 255 are the bytes, then come `BOS` and `EOS`."""
    # Byte-level BPE writes byte b as one printable character: itself, or the next unused one from U+0100 on (GPT-2).
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocab = {chr(byte): byte for byte in plain}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(plain)))}
    backend = byte_level(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([BOS, EOS])
    return backend
