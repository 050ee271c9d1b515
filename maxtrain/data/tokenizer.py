"""Text to token ids and back. Text yields no special token unless asked: `<|eos|>` within a document is seven ordinary characters.

Every tokenizer is saved as Hugging Face does (tokenizer.json with its post-processor, tokenizer_config.json, generation_config.json), so
that a folder of one begins and ends texts in other programs as it does here.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.json_file import parse_object
from maxtrain.config.paths import expand
from maxtrain.config.regular_file import read_bytes
from maxtrain.data import backend as backends
from maxtrain.data import bpe, chat, conversation, sources, tokenizer_files
from maxtrain.data.boundaries import BOS, EOS, Boundaries, read_named
from maxtrain.data.cache import build_once, key
from maxtrain.data.pieces import Cutter

HIDING = "\ue000"  # the first of the characters, of no meaning by Unicode, that stand for those with which special tokens begin


class Tokenizer:
    """What the rest of the package needs of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    boundaries: Boundaries
    fingerprint: str

    @property
    def bos_id(self) -> int:
        """The first token of every document."""
        return self.boundaries.document_begin[0]

    @property
    def eos_id(self) -> int:
        """The last token of every document."""
        return self.boundaries.document_end[-1]

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text which a model writes."""
        return self.boundaries.ends

    @property
    def text_size(self) -> int:
        """One more than the largest id that documents hold: tokens that only pad or mark a turn may lie beyond a model's embedding."""
        return self.vocab_size

    def as_trained(self) -> Tokenizer:
        """The tokenizer of a model that is trained here: its prompts begin as the documents do."""
        return self

    def encode(self, text: str) -> np.ndarray:
        """Ids [num_tokens] int32 of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text. Raises `Refused` for what is no text, such as half of a surrogate pair."""
        raise NotImplementedError

    def encode_long(self, chunks: Iterable[str], grown: Callable[[int], None]) -> Iterator[np.ndarray]:
        """`encode` of the text that the chunks make together, in parts, without the whole text in memory where that can be.

        `grown` is called with the number of characters that are held, where more are needed to find a place to cut.
        """
        yield self.encode("".join(chunks))

    def encode_spelled(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are spelled out and count as such."""
        raise NotImplementedError

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text to go on from: with the special tokens that prompts begin with, and no others.

        Args:
            text: may be empty; then it begins as documents do.
            special: whether special tokens that are spelled out in it count as such; those it begins with are not put there twice.
        """
        begin = list(self.boundaries.begin if text else self.boundaries.begin or self.boundaries.document_begin)
        ids = self.encode_spelled(text) if special else [int(index) for index in self.encode(text)]
        return ids if special and begin and ids[: len(begin)] == begin else [*begin, *ids]

    def encode_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of what is to be scored after it; blanks at the prompt's end go with what follows.

        Both are encoded as one text and cut where the prompt alone ends; where a token lies across that place, each alone.
        """
        stripped = prompt.rstrip()
        context, whole = self.encode(stripped).tolist(), self.encode(prompt + continuation).tolist()
        rest = whole[len(context) :]
        if not rest or whole[: len(context)] != context:
            rest = self.encode(prompt[len(stripped) :] + continuation).tolist()
        return [*(self.boundaries.begin if context else self.encode_prompt("")), *context], rest

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True, special: bool = False) -> list[int]:
        """Ids of a conversation by the model's chat template.

        Args:
            messages: each with `role` and `content`.
            generate: with the beginning of an answer.
            special: whether special tokens that are spelled out in the messages count as such; those of the template always do.

        Raises:
            Refused: there is no template, or it does not accept the messages.
        """
        raise Refused("the model has no chat template: give it a prompt instead")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `load_saved` reads."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8."""

    vocab_size, fingerprint = 258, "byte"
    boundaries = Boundaries((256,), (256,), (257,), frozenset({257}), special={BOS: 256, EOS: 257})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def encode_spelled(self, text: str) -> list[int]:
        special = self.boundaries.special
        parts = re.split(f"({'|'.join(map(re.escape, special))})", _bytes(text).decode())
        return [index for part in parts for index in ([special[part]] if part in special else _bytes(part))]

    def encode_long(self, chunks: Iterable[str], grown: Callable[[int], None]) -> Iterator[np.ndarray]:
        return map(self.encode, chunks)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        text = tokenizer_files.begun(bpe.bytes_only().to_str(), self.boundaries, trained=True)
        config = tokenizer_files.described({"kind": "byte"}, text, self.fingerprint, bos=BOS, eos=EOS, trained=True)
        files = {tokenizer_files.CONFIG: tokenizer_files.as_json(config), "tokenizer.json": text.encode()}
        tokenizer_files.write(folder, files | {tokenizer_files.GENERATION: tokenizer_files.generation(None, self.boundaries, "")})


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, trained here or by others; where it has no beginning token, documents begin with its end token.

    The files beside it that belong to a tokenizer, a chat template among them, are kept and saved with it.

    Raises:
        Refused: a file is missing or damaged, or the tokenizer does not work.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._trained = path, False
        self._text = _decoded(read_bytes(path, backends.MAX_BYTES), path)
        self._backend = backends.open_backend(self._text, path)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self._named = named = read_named(path.parent)
        self._bos, self._eos = (named.text(role, vocab, path) for role in ("bos", "eos"))
        if self._eos is None:
            raise Refused(f"{path}: no end-of-document token is known; name it as eos_token in a tokenizer_config.json beside it")
        tokens = {**named.tokens, "bos": self._bos, "eos": self._eos}
        backends.mark_special(self._backend, [token for token in tokens.values() if token in vocab])
        self._beside = tokenizer_files.read_beside(path.parent)
        self._template = _template(path.parent, self._beside, named.config)
        self._variables = {f"{role}_token": token for role, token in tokens.items() if token} | {"bos_token": self._bos or ""}
        with backends.in_words(path):
            added = backends.added_by_itself(self._backend)
        bos = () if self._bos is None else (vocab[self._bos],)
        begin = added[0] or (bos if named.config.get("add_bos_token") is True else ())
        self.vocab_size = max(vocab.values()) + 1
        self._ends = frozenset(named.ids.get("eos", ())) | {vocab[self._eos]}
        end, special = (vocab[self._eos],), backends.special_tokens(self._backend)
        self._plain = Boundaries(begin, begin or bos or end, end, self._ends, added=added, special=special)
        plain = key(self._text, self._bos, self._eos)
        usual = self._plain.document_begin == (bos or self._plain.document_end)
        own = plain if usual else key(self._text, self._bos, self._eos, self._plain.document_begin)
        self.fingerprint = tokenizer_files.original(named.config, plain) or own

    @functools.cached_property
    def boundaries(self) -> Boundaries:  # type: ignore[override]
        """With what the chat template puts behind an answer, which is looked for when it is first asked for."""
        turn_ends = self._turn_ends()
        return Boundaries(**{**vars(self._plain), "ends": self._ends | turn_ends, "turn_ends": turn_ends})

    @property
    def text_size(self) -> int:
        special = set(self._plain.special.values())
        text = (index for index in self._backend.get_vocab(with_added_tokens=True).values() if index not in special)
        return max(*text, *self._plain.document_begin, *self._plain.document_end) + 1

    def as_trained(self) -> Tokenizer:
        trained = copy.copy(self)
        trained.__dict__.pop("boundaries", None)
        trained._plain, trained._trained = Boundaries(**{**vars(self._plain), "begin": self._plain.document_begin}), True
        return trained

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            _bytes(text)
        with backends.in_words(self.path):
            return [np.array(item.ids, np.int32) for item in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_long(self, chunks: Iterable[str], grown: Callable[[int], None]) -> Iterator[np.ndarray]:
        with backends.in_words(self.path):
            yield from Cutter(self._backend.to_str()).encode(chunks, grown)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @functools.cached_property
    def _with_special(self) -> Any:
        """The tokenizer for text in which special tokens are spelled out."""
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = False
        return backend

    def encode_spelled(self, text: str) -> list[int]:
        _bytes(text)
        with backends.in_words(self.path):
            return list(self._with_special.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True, special: bool = False) -> list[int]:
        if not self._template:
            return super().encode_chat(messages, generate=generate)
        messages = conversation.read_by(self._template, chat.check(messages))
        hidden, marks = (messages, {}) if special else hide(messages, self._plain.special)
        text = chat.render(self._template, hidden, generate=generate, **self._variables)
        if not marks:
            return self.encode_spelled(text)
        _bytes(text)
        with backends.in_words(self.path):
            return list(backends.with_marks(self._with_special, marks).encode(text, add_special_tokens=False).ids)

    def _turn_ends(self) -> frozenset[int]:
        """The added token that the chat template puts behind an answer, if there is one."""
        if not self._template:
            return frozenset()
        said = "an answer"
        try:
            messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
            text = chat.render(self._template, messages, generate=False, **self._variables)
        except Refused:
            return frozenset()
        behind = text[text.rindex(said) + len(said) :].lstrip() if said in text else ""
        added = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        found = max((content for content in added if content and behind.startswith(content)), key=len, default=None)
        return frozenset() if found is None else frozenset({added[found]})

    def save(self, folder: str | os.PathLike[str]) -> None:
        files, trained = dict(self._beside), self._trained
        text = tokenizer_files.begun(self._text, self.boundaries, trained=trained)
        if text != self._text or tokenizer_files.CONFIG not in files:
            known = {"bos": self._bos, "eos": self._eos}
            config = tokenizer_files.described(self._named.config, text, self.fingerprint, **known, trained=trained)
            files[tokenizer_files.CONFIG] = tokenizer_files.as_json(config)
        name = tokenizer_files.GENERATION
        files[name] = tokenizer_files.generation(files.get(name), self.boundaries, str(self.path.parent / name))
        tokenizer_files.write(folder, files | {"tokenizer.json": text.encode()})


def hide(messages: Any, special: Collection[str]) -> tuple[Any, dict[str, str]]:
    """Messages in which no special token is spelled out, and which character stands for which.

    The first character of each look-alike is replaced by one of no meaning that occurs nowhere, so that a template goes on as before.
    """
    text = json.dumps(messages, ensure_ascii=False)
    marks: dict[str, str] = {}
    look_alike = re.compile(f"(?=({'|'.join(re.escape(token) for token in sorted(special, key=len, reverse=True))}))") if special else None
    free = (chr(code) for code in range(ord(HIDING), 0xF900) if chr(code) not in text)

    def replaced(value: Any) -> Any:
        if isinstance(value, str) and look_alike is not None:
            places = {found.start() for found in look_alike.finditer(value)}
            for character in {value[place] for place in places} - set(marks):
                marks[character] = next(free)
            return "".join(marks[c] if place in places else c for place, c in enumerate(value)) if places else value
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return {replaced(name): replaced(item) for name, item in value.items()} if isinstance(value, dict) else value

    return replaced(messages), marks


def _bytes(text: str) -> bytes:
    """UTF-8 of a text."""
    if not isinstance(text, str):
        raise Refused(f"a text is expected, not {text!r:.100}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"the text holds {text[error.start]!r} at character {error.start}, which is half of a character") from None


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: byte {error.start} is not UTF-8: download or export it again") from None


def _template(folder: Path, beside: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The chat template, from the file that transformers would take it from; None where there is none."""
    if "chat_template.jinja" in beside:
        return _decoded(beside["chat_template.jinja"], folder / "chat_template.jinja")
    place, template = folder / "tokenizer_config.json", config.get("chat_template")
    if template is None and "chat_template.json" in beside:
        place = folder / "chat_template.json"
        template = parse_object(beside["chat_template.json"], str(place)).get("chat_template")
    if isinstance(template, list):  # several by name
        good = all(isinstance(item, dict) and isinstance(item.get("name"), str) and "template" in item for item in template)
        template = {item["name"]: item["template"] for item in template}.get("default") if good else template
    if not isinstance(template, str | None):
        raise Refused(f"{place}: chat_template = {template!r:.100} is neither a text nor a list of objects with name and template")
    return template or None


def load_tokenizer(cfg: schema.Data) -> Tokenizer:
    """The tokenizer to train with that `cfg` describes; `kind: bpe` is trained on the sources once and kept in `cache_dir`.

    Raises:
        Refused: data or the tokenizer's files are bad.
    """
    return KINDS[cfg.tokenizer.kind](cfg).as_trained()


def load_saved(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`, or one of Hugging Face's; `Refused` if there is none."""
    folder = Path(folder)
    if read_named(folder).config.get("kind") == "byte":
        return ByteTokenizer()
    return JsonTokenizer(folder / "tokenizer.json")


def _huggingface(cfg: schema.Data) -> Tokenizer:
    path = Path(expand(cfg.tokenizer.path or "", "data.tokenizer.path"))
    return JsonTokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _bpe(cfg: schema.Data) -> Tokenizer:
    text = [(source.weight, sources.fingerprint(source, cfg.cache_dir)) for _, source in sorted(cfg.sources.items())]
    folder = Path(expand(cfg.cache_dir, "data.cache_dir")) / "tokenizers" / key(cfg.tokenizer.model_dump(), bpe.PATTERN, text)
    return build_once(folder, load_saved, partial(_train, cfg))


def _train(cfg: schema.Data, folder: Path) -> None:
    text = bpe.train(cfg).to_str()
    (folder / "tokenizer.json").write_text(text, "utf-8")
    JsonTokenizer(folder / "tokenizer.json").as_trained().save(folder)


KINDS: dict[str, Callable[[schema.Data], Tokenizer]] = {"byte": lambda cfg: ByteTokenizer(), "bpe": _bpe, "huggingface": _huggingface}
