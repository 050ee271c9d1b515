"""The tokenizer inside a GGUF file as Hugging Face's tokenizer.json, with the chat template beside it."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from maxtrain.config.errors import Refused
from maxtrain.data.tokenizer import load_saved

CONTROL, USER_DEFINED = 3, 4  # token types of llama.cpp
# Tokens that end an answer whether a key names them or not, as llama.cpp has it
ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
)
BEGUN = ("llama3", "llama-v3", "llama-bpe", "tekken")  # tokenizer.ggml.pre of those whose texts begin with bos unless a key says no
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


ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # as GGUF and as Hugging Face call them
MODELS: Mapping[str, Callable[[Mapping[str, Any], Sequence[str], str], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _special_ids(values: Mapping[str, Any], kind: str, tokens: Sequence[str], place: str) -> dict[str, int]:
    """Ids by role, with the defaults of SentencePiece's kind; `Refused` for one that is no token."""
    ids = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        found = values.get(f"tokenizer.ggml.{role}_token_id")
        if found is not None and not (isinstance(found, int) and 0 <= found < len(tokens)):
            raise Refused(f"{place}: tokenizer.ggml.{role}_token_id = {found!r} is none of its {len(tokens)} tokens: download it again")
        ids |= {} if found is None else {role: found}
    return {role: index for role, index in ids.items() if index < len(tokens)}


def end_ids(tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int]) -> list[int]:
    """Ids of the tokens that end an answer: those that keys name, then those of `ENDS`."""
    named = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    known = {tokens[index]: index for index, type_ in enumerate(types) if type_ == CONTROL and tokens[index] in ENDS}
    if {"<|return|>", "<|call|>"} <= set(known) or {"<|calls|>", "<|flush|>"} <= set(known):
        known.pop("<|end|>", None)  # ends a message there, after which the answer goes on
    return list(dict.fromkeys([*named, *known.values()]))


def save(values: Mapping[str, Any], folder: str, place: str) -> bool:
    """Write tokenizer, chat template and end tokens from a file's metadata in Hugging Face's files; False where it has no tokenizer.

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
        ids = _special_ids(values, kind, tokens, place)
        ends = end_ids(tokens, types, ids)
    except Refused:
        raise
    except BaseException as error:  # the tokenizers library raises nothing more precise, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Refused(f"{place}: its tokenizer is damaged ({type(error).__name__}: {error}): download it again") from None
    named = {f"{name}_token": tokens[ids[role]] for role, name in ROLES.items() if role in ids}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    config["add_bos_token"] = values.get("tokenizer.ggml.add_bos_token", kind == "llama" or values.get("tokenizer.ggml.pre") in BEGUN)
    if "tokenizer.ggml.add_eos_token" in values:
        config["add_eos_token"] = values["tokenizer.ggml.add_eos_token"]
    template = values.get("tokenizer.chat_template")
    with tempfile.TemporaryDirectory() as draft:
        path = Path(draft)
        backend.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
        if ends:
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if template:
            (path / "chat_template.jinja").write_text(template, "utf-8")
        try:
            load_saved(path).save(folder)  # with a post-processor that begins texts as the flag says
        except Refused as refusal:
            raise Refused(f"{place}: {refusal}".replace(f"{draft}/", "")) from None
    return True
