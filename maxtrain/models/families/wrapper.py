"""Models for images or sound that have a language model of a known family in them: its config and its tensors' names.

The language model alone is read; with text it computes what the whole model does.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.models.families.rows import EMBEDDING, HEAD

SECTIONS = ("text_config", "llm_config", "language_config")
# The language model of wrappers whose section does not name it
LANGUAGE_MODELS: Mapping[str, str] = {
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "gemma3": "gemma3_text",
    "got_ocr2": "qwen2",
    "granite_speech": "granite",
    "idefics2": "mistral",
    "idefics3": "llama",
    "internvl": "qwen2",
    "kimi_k25": "deepseek_v3",
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "perception_lm": "llama",
    "smolvlm": "llama",
    "video_llava": "llama",
    "vipllava": "llama",
    "voxtral": "llama",
}
# Wrappers in which a prompt's text is not read from left to right
OTHERWISE = frozenset({"paligemma", "pi0"})
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What the classes take for sizes that a section leaves out, as it does where they are the class's own
DEFAULTS: Mapping[str, tuple[int, int, int, int, int]] = {
    "cohere": (256000, 8192, 22528, 40, 64),
    "cohere2": (256000, 8192, 22528, 40, 64),
    "deepseek_v2": (102400, 4096, 11008, 32, 32),
    "deepseek_v3": (129280, 7168, 18432, 61, 128),
    "gemma": (256000, 3072, 24576, 28, 16),
    "gemma2": (256000, 2304, 9216, 26, 8),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "glm": (151552, 4096, 13696, 40, 32),
    "glm4": (151552, 4096, 13696, 40, 32),
    "glm4_moe": (151552, 4096, 10944, 46, 96),
    "glm4_moe_lite": (154880, 2048, 10240, 47, 20),
    "gpt_oss": (201088, 2880, 2880, 36, 64),
    "granite": (32000, 4096, 11008, 32, 32),
    "kimi_k2": (129280, 7168, 18432, 61, 128),
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "mixtral": (32000, 4096, 14336, 32, 32),
    "olmo2": (50304, 4096, 11008, 32, 32),
    "olmo3": (50304, 4096, 11008, 32, 32),
    "olmoe": (50304, 2048, 2048, 16, 16),
    "phi3": (32064, 3072, 8192, 32, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen2_moe": (151936, 2048, 5632, 24, 16),
    "qwen3": (151936, 4096, 22016, 32, 32),
    "qwen3_moe": (151936, 2048, 6144, 24, 32),
    "smollm3": (128256, 2048, 11008, 36, 16),
}


def section_of(config: Mapping[str, Any]) -> str | None:
    """The field of a wrapper's config.json that holds the config of its language model; None for what is no wrapper."""
    return next((name for name in SECTIONS if isinstance(config.get(name), Mapping)), None)


def language_model(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The config of the language model in a wrapper, with the sizes that it leaves to its class; the config itself if it is no wrapper.

    Raises:
        Refused: the wrapper computes something else with text.
    """
    section = section_of(config)
    if section is None:
        return dict(config)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in OTHERWISE:
        raise Refused(
            f"{place}: model_type = {kind!r} is not supported: it sees a prompt from both sides, the language model in it does not"
        )
    inner = dict(config[section])
    if isinstance(kind, str) and inner.get("model_type") is None:
        inner["model_type"] = LANGUAGE_MODELS.get(kind)
    for name in ("tie_word_embeddings", "quantization_config"):  # of the whole model
        if config.get(name) is not None:
            inner[name] = config[name]
    found = inner.get("model_type")
    defaults = DEFAULTS.get(found, ()) if isinstance(found, str) else ()
    return dict(zip(SIZES, defaults, strict=False)) | {
        name: value for name, value in inner.items() if value is not None or name not in SIZES
    }


@dataclass(frozen=True)
class Names:
    """What the tensors of the language model are called in a wrapper."""

    body: str
    """Beginning of all but the head's: `language_model.model.` in published files, `model.language_model.` in those of transformers 5."""
    head: str

    def outer(self, name: str) -> str:
        """The name here of a tensor by its name in a language model of its own."""
        return self.head if name == HEAD else self.body + name.removeprefix("model.")

    def inner(self, name: str) -> str | None:
        """The inverse of `outer`; None for what is no part of the language model."""
        if name == self.head:
            return HEAD
        return "model." + name.removeprefix(self.body) if name.startswith(self.body) else None


def names_among(tensors: Collection[str], place: str) -> Names:
    """What a wrapper with these tensors calls those of its language model.

    Raises:
        Refused: there is none among them, or more than one.
    """
    ending = EMBEDDING.removeprefix("model.")
    found = [name for name in tensors if name.endswith(ending) and ".layers." not in name]
    if len(found) != 1:
        many = f"{', '.join(found[:4])} could be it" if found else f"no tensor ends with {ending}"
        raise Refused(f"{place}: the language model of the wrapper is not found in its tensors: {many}")
    body = found[0].removesuffix(ending)
    within = body.removesuffix("model.") + HEAD
    return Names(body, within if within in tensors or body.endswith(".model.") else HEAD)


def wrapped(config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapper's config with another one of its language model, whose weights are not quantised."""
    section = section_of(config)
    assert section is not None
    own = {name: value for name, value in inner.items() if name not in ("architectures", "dtype")}
    outer = {name: value for name, value in config.items() if name not in ("torch_dtype", "quantization_config")}
    return {**outer, section: own, "dtype": inner["dtype"], "tie_word_embeddings": inner["tie_word_embeddings"]}
