"""Reading a Hugging Face config.json so that nothing in it is overlooked: what was not read, and is not known to be
without effect, is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.keys import did_you_mean

# Without effect on the function of any family: names, token ids, how it is run or was made.
NEVER_MATTERS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
# Of no effect at these values, which are the only ones supported.
FIXED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
}


class Fields:
    """The fields of a config, of which those that were asked for are remembered."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        """`place` is what messages call it, usually the path of the file."""
        self.values, self.place = values, place
        self._read: set[str] = set()
        self._sections: dict[str, Fields] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; `default` where it is absent or null."""
        self._read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The value of a field that must be there; `Refused` otherwise."""
        value = self.get(name)
        if value is None:
            near = did_you_mean(name, [key for key in self.values if key not in self._read])
            raise Refused(f"{self.place}: the field {name} is missing{near}")
        return value

    def section(self, name: str) -> Fields | None:
        """The fields of a nested mapping; None where it is absent, null or empty."""
        value = self.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise Refused(f"{self.place}: {name} = {value!r}: a mapping is expected")
        return self._sections.setdefault(name, Fields(value, f"{self.place}: {name}"))

    def one_of(self, name: str, table: Mapping[str, Any], default: str | None = None) -> Any:
        """The entry of `table` that a field names; `Refused` for a name that is not in it."""
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, str) or value not in table:
            raise Refused(f"{self.place}: {name} = {value!r} is not supported: allowed are {', '.join(sorted(table))}")
        return table[value]

    def finish(self, ignored: Collection[str] = (), fixed: Mapping[str, Any] | None = None) -> None:
        """Refuse every field that was neither read nor is without effect: in `ignored`, or in `fixed` with that very value."""
        problems = list(self._unread(frozenset(ignored) | NEVER_MATTERS, {**FIXED, **(fixed or {})}))
        for section in self._sections.values():
            problems += section._unread(frozenset(), {})
        if problems:
            raise Refused("\n".join(problems))

    def _unread(self, ignored: Collection[str], fixed: Mapping[str, Any]) -> Iterator[str]:
        for name, value in self.values.items():
            if name in self._read or name in ignored or value is None:
                continue
            if name in fixed and value == fixed[name]:
                continue
            known = (
                f"only {fixed[name]!r} is supported" if name in fixed else "this field is unknown, it may change what the model computes"
            )
            yield f"{self.place}: {name} = {value!r}: {known}"
