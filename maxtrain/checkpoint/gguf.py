"""GGUF files (llama.cpp), read with the `gguf` library and presented as what they were made from: a config.json and tensors by
Hugging Face's names, so that everything after is the way of `huggingface.py`."""

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maxtrain.checkpoint import gguf_header, gguf_tokenizer, weights
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models import families
from maxtrain.models.families.fields import Fields
from maxtrain.ops import rope

LOG = logging.getLogger("maxtrain")
KEYS: Mapping[str, str] = {  # key below the architecture -> field of config.json
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
SCALING: Mapping[str, str] = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
ELSEWHERE = ("general.", "tokenizer.", "quantize.", "split.", "imatrix.")  # what a file is called, read with the tokenizer, or was made by
CHECKED = ("attention.value_length", "rope.dimension_count")  # said twice: must be the width of a head


@dataclass(frozen=True)
class Architecture:
    """What is particular to one of GGUF's architectures."""

    model_type: str
    """What config.json calls it."""
    moe_type: str | None = None
    """The same where it has experts."""
    interleaved: bool = False
    """Rows of q and k are permuted within each head, for rotary embeddings of neighbouring pairs."""
    one_plus: bool = False
    """Scales of norms are kept as 1 + w."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further keys, as in KEYS."""
    derive: Callable[[Fields], Mapping[str, Any]] = lambda fields: {}
    """Fields of config.json that are not in the file, from those that are."""


def _gemma(depth: int) -> Callable[[Fields], Mapping[str, Any]]:
    """Attention is scaled by the width of a head, in the size of `depth` layers by embed / heads, as llama.cpp has it."""

    def derive(fields: Fields) -> Mapping[str, Any]:
        whole = fields.num_layers() == depth
        heads = fields.need("num_attention_heads", least=1)
        return {"query_pre_attn_scalar": fields.need("hidden_size") / heads if whole else fields.get("head_dim", 256)}

    return derive


EXPERTS = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
LOCAL = {"rope.freq_base_swa": "rope_local_base_freq", "attention.sliding_window_pattern": "sliding_window_pattern"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "mixtral", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", keys=EXPERTS, derive=lambda fields: {"norm_topk_prob": True}),
    "gemma2": Architecture("gemma2", one_plus=True, keys=SOFTCAPS, derive=_gemma(46)),
    "gemma3": Architecture("gemma3_text", one_plus=True, keys=SOFTCAPS | LOCAL, derive=_gemma(62)),
    "phi3": Architecture("phi3"),
}


class File:
    """A GGUF file to import from (see `weights.Weights`)."""

    def __init__(self, path: str | os.PathLike[str], ignore: Collection[str] = ()) -> None:
        """
        Args:
            path: the file.
            ignore: keys that are taken as absent (`model.ignore_fields`).

        Raises:
            Refused: the library is not installed; the file is damaged; the model is not supported.
        """
        self.place = os.fspath(path)
        self._library = _library(self.place)
        self.values, self._tensors = gguf_header.read(self.place, self._library)
        self._check_kind()
        name = str(self.values.get("general.architecture"))
        if name not in ARCHITECTURES:
            raise Refused(f"{self.place}: general.architecture = {name!r:.100} is not supported: allowed are {', '.join(ARCHITECTURES)}")
        self.architecture = ARCHITECTURES[name]
        try:
            self.config = self._config(name)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # values of a kind that no such key has
            if isinstance(error, Refused):
                raise
            raise Refused(f"{self.place}: its keys do not describe a {name} ({type(error).__name__}: {error})") from None
        self.family, self.model = families.read(self.config, self.place, ignore)
        weights.check_counts(self.model, [tensor.shape for tensor in self._tensors.values()], self.place)
        self._names = self._find(self._library.get_tensor_name_map(self._kind(name), self.model.num_layers))
        whole = {at: tensor.shape for at, tensor in self._tensors.items()}
        known = {at for at, _ in self._names.values()} | {"rope_freqs.weight"}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **{ours: whole[at] if expert is None else whole[at][1:] for ours, (at, expert) in self._names.items()},
            **{at: shape for at, shape in whole.items() if at not in known},  # for the check to refuse
        }

    def _check_kind(self) -> None:
        """Refuse what is no whole model, and tell keys that nobody reads."""
        kind, parts = self.values.get("general.type", "model"), self.values.get("split.count", 1)
        if kind != "model":
            raise Refused(f"{self.place}: general.type = {kind!r:.100}: only a whole model can be read")
        if parts not in (0, 1):
            raise Refused(f"{self.place}: it is one of {parts!r:.100} parts: put them together with llama-gguf-split --merge")
        own = f"{self.values.get('general.architecture')}."
        unread = sorted(key for key in self.values if not key.startswith((*ELSEWHERE, own)))
        if unread:
            LOG.warning(f"{self.place}: keys that are not read: {', '.join(unread)}")

    def _kind(self, name: str) -> Any:
        return next(kind for kind, known in self._library.MODEL_ARCH_NAMES.items() if known == name)

    def _config(self, name: str) -> dict[str, Any]:
        """The config.json that the metadata amounts to; keys that are not understood are passed on, so that they are refused."""
        own = {key.removeprefix(f"{name}."): value for key, value in self.values.items() if key.startswith(f"{name}.")}
        keys = {**KEYS, **self.architecture.keys}
        config: dict[str, Any] = {keys[key]: value for key, value in own.items() if key in keys}
        config |= {f"{name}.{key}": value for key, value in own.items() if key not in {*keys, *SCALING, *CHECKED}}
        config["model_type"] = self.architecture.moe_type if config.get("num_local_experts") else self.architecture.model_type
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or not embedding.shape:
            raise Refused(f"{self.place}: the tensor token_embd.weight is missing: this is no language model, or a part of one only")
        config["vocab_size"] = embedding.shape[0]  # the metadata may count tokens that the model has no rows for
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        scaling = {SCALING[key]: value for key, value in own.items() if key in SCALING}
        if scaling and scaling.get("rope_type") != "none":
            config["rope_scaling"] = scaling
        fields = Fields(config, self.place)
        config |= self.architecture.derive(fields)
        width = fields.optional("head_dim", int) or fields.need("hidden_size") // fields.need("num_attention_heads", least=1)
        for key in CHECKED:
            if own.get(key, width) != width:
                raise Refused(f"{self.place}: {name}.{key} = {own[key]}, the width of a head is {width}: only the whole is supported")
        if "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = self._llama3(fields.get("rope_theta", 10000.0, least=1), width)
        return config

    def _llama3(self, theta: float, width: int) -> dict[str, Any]:
        """Llama 3's scaling, of which llama.cpp keeps only the divisors of the frequencies: those published are tried."""
        divisors = self._tensors["rope_freqs.weight"]
        if divisors.shape != (width // 2,) or divisors.kind.name != "F32":
            raise Refused(f"{self.place}: rope_freqs.weight is {divisors.kind.name} {list(divisors.shape)}: F32 [{width // 2}] is expected")
        found = divisors.read(self.place).astype(np.float32)
        plain = rope.frequencies(schema.Rope(theta=theta), width)
        for original in (8192,):
            scaling = schema.RopeScaling(kind="llama3", factor=round(float(found.max()), 3), original_length=original)
            if np.allclose(plain / rope.frequencies(schema.Rope(theta=theta, scaling=scaling), width), found, rtol=1e-4):
                names = {"factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
                return {"rope_type": "llama3", **names, "original_max_position_embeddings": original}
        raise Refused(
            f"{self.place}: rope_freqs.weight is not the scaling of Llama 3.1 or 3.2: import the model from Hugging Face's format"
        )

    def _find(self, table: Any) -> dict[str, tuple[str, int | None]]:
        """Where each tensor of the family is: its name here, and its place in a stack of experts."""
        found: dict[str, tuple[str, int | None]] = {}
        for row in self.family.rows(self.model):
            for name in row.forms[0].names:
                expert = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
                at = table.get_name(expert[1] + expert[3] if expert else name, try_suffixes=(".weight", ".bias"))
                if at in self._tensors:
                    found[name] = at, int(expert[2]) if expert else None
                    if expert and self.model.moe and self._tensors[at].shape[:1] != (self.model.moe.num_experts,):
                        raise Refused(f"{self.place}: {at} holds other than the {self.model.moe.num_experts} experts that its keys say")
        return found

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32 if it is quantised."""
        at, index = self._names[name]
        tensor = self._tensors[at]
        data, kind = tensor.read(self.place, index), tensor.kind
        if kind.name not in ("F32", "F16", "F64"):
            try:
                data = self._library.dequantize(data, kind)
            except NotImplementedError:
                raise Refused(
                    f"{self.place}: {at} is quantised as {kind.name}, which is not supported: take another quantisation"
                ) from None
        heads = {"q_proj": self.model.num_heads, "k_proj": self.model.num_kv_heads}.get(name.split(".")[-2] if "." in name else "")
        if heads and self.architecture.interleaved:
            data = data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if self.architecture.one_plus and name.endswith("norm.weight"):
            data = data - 1
        return data

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers."""
        return np.array_equal(self.read(name), self.read(other), equal_nan=True)

    def save_tokenizer(self, folder: str) -> bool:
        """Write the tokenizer and chat template of the file."""
        return gguf_tokenizer.save(self.values, folder, self.place)


def _library(place: str) -> Any:
    """The package `gguf`: names of tensors, kinds of quantisation and their inverses."""
    try:
        import gguf
    except ImportError:
        raise Refused(f"{place}: reading GGUF needs the package gguf: pip install 'maxtrain[gguf]'") from None
    return gguf
