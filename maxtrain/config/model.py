"""The section `model`: the decoder as nouns with values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from maxtrain.config.moe import Moe
from maxtrain.config.section import FrozenDict, PositiveFloat, PositiveInt, Section, Strings


class RopeScaling(Section):
    """Frequency scaling of rotary embeddings for contexts beyond the original training length."""

    kind: Literal["llama3"] = "llama3"
    """`llama3`: interpolation by wavelength as in Llama 3.1 (section 3.4.3 of its report and its published config)."""
    factor: PositiveFloat = 8.0
    """How many times the context is stretched."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above `original_length / low_freq_factor` are divided by `factor` in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below `original_length / high_freq_factor` are left as they are."""
    original_length: PositiveInt = 8192
    """Context length before the stretch, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


class Rope(Section):
    """Rotary position embedding."""

    theta: PositiveFloat = 10000.0
    """Base of the frequencies."""
    scaling: RopeScaling | None = None
    """Scaling for long contexts; null for none."""


class Slot(Section):
    """What one kind of layer does differently; layers of one kind are named in `layer_pattern` and `prefix`."""

    window: PositiveInt | None = None
    """Sliding window of the attention in tokens, the current one included; null sees everything before it."""
    feed_forward: Literal["dense", "moe"] = "dense"
    """Dense gated MLP, or the mixture of experts of `model.moe`."""
    rope: Rope | None = None
    """Rotary embedding of this kind of layer; null takes `model.rope`."""


def _slots(value: Any) -> Any:
    return FrozenDict(value) if isinstance(value, dict) else value


class Model(Section):
    """The decoder: a family of models is a set of values here, never a class of its own."""

    vocab_size: PositiveInt = 259
    """Number of token ids the embedding and the head have."""
    embed: PositiveInt = 64
    """Width of the residual stream."""
    mlp: PositiveInt = 176
    """Hidden width of the dense feed-forward."""
    num_layers: PositiveInt = 2
    """Number of decoder layers, prefix included."""
    num_heads: PositiveInt = 4
    """Number of query heads."""
    num_kv_heads: PositiveInt = 2
    """Number of key and value heads; divides `num_heads`."""
    head_dim: PositiveInt | None = None
    """Width of a head; `embed / num_heads` when null."""
    max_length: PositiveInt = 2048
    """Longest context the model is meant for, in tokens."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the RMS norms."""
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    """Gated activation of the feed-forward: `silu(gate) * up`, or GPT-OSS's `clamped_swiglu`, cut off at 7."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output head."""
    rope: Rope = Rope()
    """Rotary embedding of all layers that do not name their own."""
    moe: Moe | None = None
    """Mixture of experts for the layers whose slot says `feed_forward: moe`."""
    slots: Annotated[dict[str, Slot], BeforeValidator(_slots)] = FrozenDict(layer=Slot())
    """The kinds of layers by name."""
    prefix: Strings = ()
    """Kinds of the first layers, before the repeated body (DeepSeek's dense layers)."""
    layer_pattern: Strings = ("layer",)
    """Kinds of the layers of one period; repeated over the body, cut off at `num_layers`."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """`scan` compiles one period whatever the depth, `unroll` is faster on CPU; `auto` chooses by platform. Checkpoints are the same."""
    init_scale: PositiveFloat = 1.0
    """Factor on the standard deviation of the initial weights (1 / sqrt(fan in); 0.02 for embeddings)."""

    @field_validator("slots", mode="after")
    @classmethod
    def _freeze_slots(cls, value: dict[str, Slot]) -> dict[str, Slot]:
        return FrozenDict(value)

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None and self.embed % self.num_heads:
            raise ValueError(f"embed={self.embed} is not a multiple of num_heads={self.num_heads}: set head_dim")
        if self.head_width % 2:
            raise ValueError(f"the head width {self.head_width} is odd: rotary embedding needs an even one")
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty: name at least one slot")
        unknown = sorted({*self.prefix, *self.layer_pattern} - set(self.slots))
        if unknown:
            raise ValueError(f"layer_pattern or prefix names {unknown}, which slots does not define: it has {sorted(self.slots)}")
        if len(self.prefix) > self.num_layers:
            raise ValueError(f"prefix has {len(self.prefix)} layers, num_layers is {self.num_layers}")
        used = {self.slots[name].feed_forward for name in self.kinds}
        if "moe" in used and self.moe is None:
            raise ValueError("a slot says feed_forward: moe, but model.moe is not set")
        if self.moe is not None and "moe" not in used:
            raise ValueError("model.moe is set, but no layer in use says feed_forward: moe")
        return self

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed // self.num_heads

    @property
    def num_periods(self) -> int:
        """Number of whole periods in the body."""
        return (self.num_layers - len(self.prefix)) // len(self.layer_pattern)

    @property
    def remainder(self) -> tuple[str, ...]:
        """Kinds of the layers after the last whole period."""
        return self.layer_pattern[: (self.num_layers - len(self.prefix)) % len(self.layer_pattern)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The slot name of every layer, first to last."""
        return self.prefix + self.layer_pattern * self.num_periods + self.remainder
