"""The tokenizer inside a GGUF file as Hugging Face's tokenizer.json, with the chat template beside it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from maxtrain.config.errors import Refused

CONTROL, USER_DEFINED = 3, 4  # token types of llama.cpp
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as published
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


SPLITS: Mapping[str, Callable[[], Any]] = {  # tokenizer.ggml.pre -> how text is cut before merging
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(LLAMA3),
    "llama3": lambda: _split(LLAMA3),
    "qwen2": lambda: _split(QWEN2),
    "smollm": _digits,
}


def _byte_level(values: Mapping[str, Any], tokens: Sequence[str], place: str) -> Tokenizer:
    """GPT-2's kind: merges of printable stand-ins for bytes."""
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise Refused(
            f"{place}: tokenizer.ggml.pre = {pre!r} is not supported: allowed are {', '.join(SPLITS)}; import from Hugging Face's format"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in values["tokenizer.ggml.merges"]]
    ignore = pre in ("llama-bpe", "llama3")  # a whole word of the vocabulary is taken without merging
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, ignore_merges=ignore))
    backend.pre_tokenizer = SPLITS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def merges_of(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores amount to: every pair of pieces that makes a piece, best piece first."""
    found = []
    for piece in vocab:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        own = sorted(((a, b) for a, b in pairs if a in vocab and b in vocab), key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(pair, scores[piece]) for pair in own]
    return [pair for pair, _ in sorted(found, key=lambda item: -item[1])]


def _sentencepiece(values: Mapping[str, Any], tokens: Sequence[str], place: str) -> Tokenizer:
    """Llama 2's kind: pieces with scores, blanks as U+2581, unknown characters as bytes."""
    vocab = {token: index for index, token in enumerate(tokens)}
    types = values.get("tokenizer.ggml.token_type", [1] * len(tokens))
    plain = {token: index for token, index in vocab.items() if types[index] == 1}
    scores = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
    unknown = tokens[values.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = merges_of(plain, scores)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    parts: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


MODELS: Mapping[str, Callable[[Mapping[str, Any], Sequence[str], str], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def save(values: Mapping[str, Any], folder: str, place: str) -> bool:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja from a file's metadata; False where it has no tokenizer.

    Raises:
        Refused: the kind of tokenizer is not supported, or its parts do not fit together.
    """
    kind, tokens = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        return False
    if kind not in MODELS:
        raise Refused(f"{place}: tokenizer.ggml.model = {kind!r} is not supported: allowed are {', '.join(MODELS)}")
    try:
        backend = MODELS[kind](values, tokens, place)
        types = values.get("tokenizer.ggml.token_type", [1] * len(tokens))
        special = [
            AddedToken(token, normalized=False, special=True) for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL
        ]
        backend.add_special_tokens(special)
        backend.add_tokens([AddedToken(t, normalized=False) for t, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED])
        roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {role: values.get(f"tokenizer.ggml.{name}_token_id") for name, role in roles.items()}
        named = {f"{role}_token": tokens[index] for role, index in ids.items() if index is not None}
    except Refused:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise Refused(f"{place}: its tokenizer is damaged ({type(error).__name__}: {error}): download it again") from None
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    for flag in ("add_bos_token", "add_eos_token"):
        config |= {flag: values[f"tokenizer.ggml.{flag}"]} if f"tokenizer.ggml.{flag}" in values else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
    template = values.get("tokenizer.chat_template")
    if template:
        (path / "chat_template.jinja").write_text(template, "utf-8")
    return True
