"""Text to token ids and back. Text never yields a special token: `<|eos|>` within a document is seven ordinary characters.

Every tokenizer is saved as Hugging Face does (tokenizer.json and tokenizer_config.json), so a folder of one opens there too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data import chat, conversation, sources
from maxtrain.data.cache import build_once, key

BOS, EOS = "<|bos|>", "<|eos|>"
# The pre-tokenisation of GPT-4 but for two things: digits stand alone, so that numbers are split the same way everywhere; punctuation
# takes the blanks after it along and a line break its indentation, which saves a tenth of the tokens of Python source.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# Names that special tokens go by, for a tokenizer.json without a tokenizer_config.json.
KNOWN = {
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>"),  # noqa: RUF001
    "eos": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
}
# Files of a tokenizer besides tokenizer.json
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Tokenizer:
    """What the rest of the package needs of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text which a model writes."""
        return frozenset({self.eos_id})

    def encode(self, text: str) -> np.ndarray:
        """Ids [num_tokens] int32 of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to go on from: with the special tokens that documents begin with, and no others."""
        return [self.bos_id, *map(int, self.encode(text))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, generate: bool = True) -> list[int]:
        """Ids of a conversation by the model's chat template, with the beginning of an answer if `generate`.

        Raises:
            Refused: there is no template, or it does not accept the messages.
        """
        raise Refused("the model has no chat template: give it a prompt instead")

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_saved` reads."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8."""

    vocab_size, bos_id, eos_id, fingerprint = 258, 256, 257, "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        # Byte-level BPE writes byte b as one printable character: itself, or the next unused one from U+0100 on (GPT-2).
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        vocab = {chr(byte): byte for byte in plain}
        vocab |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(plain)))}
        backend = _byte_level(models.BPE(vocab=vocab, merges=[]))
        backend.add_special_tokens([BOS, EOS])
        _save(folder, backend.to_str(), BOS, EOS, kind="byte")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, trained here or by others; where it has no beginning token, documents begin with its end token.

    The files beside it that belong to a tokenizer, a chat template among them, are kept and saved with it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._text = path.read_text("utf-8")
            self._backend = Backend.from_str(self._text)
        except OSError as error:
            raise Refused(f"{path}: cannot be read: {error.strerror}; correct tokenizer.path") from error
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise Refused(f"{path}: not a tokenizer.json ({error})") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self._bos, self._eos = (_special(role, vocab, path) for role in KNOWN)
        if self._eos is None:
            raise Refused(f"{path}: no end-of-document token is known; name it as eos_token in a tokenizer_config.json beside it")
        self.vocab_size, self.eos_id, self.bos_id = max(vocab.values()) + 1, vocab[self._eos], vocab[self._bos or self._eos]
        self.fingerprint = key(self._text, self._bos, self._eos)
        self._config = _config(path.parent)
        self._beside = {name: (path.parent / name).read_bytes() for name in BESIDE if (path.parent / name).is_file()}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(item.ids, np.int32) for item in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def end_ids(self) -> frozenset[int]:
        try:
            named = json.loads(self._beside.get("generation_config.json", b"{}")).get("eos_token_id")
        except ValueError:
            named = None
        return frozenset(i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)) | {self.eos_id}

    @functools.cached_property
    def _with_special(self) -> Backend:
        """The tokenizer for text in which special tokens are spelled out."""
        backend = Backend.from_str(self._text)
        backend.encode_special_tokens = False
        backend.no_truncation()
        backend.no_padding()
        return backend

    def encode_prompt(self, text: str) -> list[int]:
        ids = self._backend.encode(text).ids  # with what the tokenizer's own post-processor adds
        if len(ids) == len(self._backend.encode(text, add_special_tokens=False).ids) and self._config.get("add_bos_token"):
            ids = [self.bos_id, *ids]
        return list(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, generate: bool = True) -> list[int]:
        template = self._beside.get("chat_template.jinja", b"").decode() or self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {item["name"]: item["template"] for item in template}.get("default")
        if not template:
            return super().encode_chat(messages, generate=generate)
        messages = conversation.read_by(template, chat.check(messages))
        text = chat.render(template, messages, generate=generate, bos_token=self._bos or "", eos_token=self._eos or "")
        return list(self._with_special.encode(text, add_special_tokens=False).ids)

    def save(self, folder: str | Path) -> None:
        _save(folder, self._text, self._bos, self._eos)
        for name, content in self._beside.items():
            (Path(folder) / name).write_bytes(content)


def _special(role: str, vocab: Mapping[str, int], path: Path) -> str | None:
    """The special token that a file beside `path` gives the role, else a well-known one of `vocab`; None if it has none."""
    token = _config(path.parent).get(f"{role}_token", next((name for name in KNOWN[role] if name in vocab), None))
    token = token["content"] if isinstance(token, dict) else token
    if token is not None and token not in vocab:
        raise Refused(f"{path}: the {role}_token {token!r} of the files beside it is not in its vocabulary")
    return token


def load_tokenizer(cfg: schema.Data) -> Tokenizer:
    """The tokenizer that `cfg` describes; `kind: bpe` is trained on the sources once and kept in `cache_dir`. Bad data is `Refused`."""
    return KINDS[cfg.tokenizer.kind](cfg)


def load_saved(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`, or one of Hugging Face's; `Refused` if there is none."""
    folder = Path(folder)
    if _config(folder).get("kind") == "byte":
        return ByteTokenizer()
    return JsonTokenizer(folder / "tokenizer.json")


def _huggingface(cfg: schema.Data) -> Tokenizer:
    path = Path(cfg.tokenizer.path or "").expanduser()
    return JsonTokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _bpe(cfg: schema.Data) -> Tokenizer:
    text = [(source.weight, sources.fingerprint(source, cfg.cache_dir)) for _, source in sorted(cfg.sources.items())]
    folder = Path(cfg.cache_dir).expanduser() / "tokenizers" / key(cfg.tokenizer.model_dump(), PATTERN, text)
    return build_once(folder, lambda folder: load_saved(folder) if folder.exists() else None, partial(_train, cfg))


def _train(cfg: schema.Data, folder: Path) -> None:
    backend = _byte_level(models.BPE())
    assert cfg.tokenizer.vocab_size is not None
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.tokenizer.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(_training_text(cfg.sources, cfg.tokenizer.train_bytes), trainer)
    _save(folder, backend.to_str(), BOS, EOS)


def _training_text(training: Mapping[str, schema.Source], limit: int) -> Iterator[str]:
    """The first documents of every source, as many bytes of each as its weight is of `limit`."""
    total = sum(source.weight for source in training.values())
    for _, source in sorted(training.items()):
        left = int(limit * source.weight / total)
        for document in sources.documents(source):
            data = document.text.encode()[:left]
            yield data.decode(errors="ignore")
            left -= len(data)
            if not left:
                break


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _save(folder: str | Path, text: str, bos: str | None, eos: str | None, **extra: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "add_bos_token": True, **extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _config(folder: Path) -> dict:
    """The first file in `folder` that tells special tokens; {} if there is none."""
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.exists():
            try:
                return json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise Refused(f"{path}: not JSON ({error})") from error
    return {}


KINDS: dict[str, Callable[[schema.Data], Tokenizer]] = {"byte": lambda cfg: ByteTokenizer(), "bpe": _bpe, "huggingface": _huggingface}
