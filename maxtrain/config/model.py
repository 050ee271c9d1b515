"""The section `model`: the decoder as nouns with values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from maxtrain.config.mla import Mla
from maxtrain.config.moe import Moe
from maxtrain.config.mtp import Mtp
from maxtrain.config.rope import Rope
from maxtrain.config.section import FrozenDict, Path, PositiveFloat, PositiveInt, Section, Strings


class Slot(Section):
    """What one kind of layer does differently; layers of one kind are named in `layer_pattern` and `prefix`."""

    window: PositiveInt | None = None
    """Sliding window of the attention in tokens, the current one included; null sees everything before it."""
    feed_forward: Literal["dense", "moe"] = "dense"
    """Dense gated MLP, or the mixture of experts of `model.moe`."""
    rope: Rope | None = None
    """Rotary embedding of this kind of layer; null takes `model.rope`."""
    rotary: bool = True
    """Rotate queries and keys by position; false leaves this kind of layer without positions (NoPE: SmolLM3, Command R7B)."""

    @model_validator(mode="after")
    def _check(self) -> Slot:
        if self.rope is not None and not self.rotary:
            raise ValueError("rope has no effect with rotary: false; remove one of them")
        return self


class Model(Section):
    """The decoder: a family of models is a set of values here, never a class of its own."""

    vocab_size: PositiveInt = 259
    """Number of token ids the embedding and the head have."""
    embed: PositiveInt = 64
    """Width of the residual stream."""
    mlp: PositiveInt = 176
    """Hidden width of the dense feed-forward."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Number of decoder layers, prefix included."""
    num_heads: PositiveInt = 4
    """Number of query heads."""
    num_kv_heads: PositiveInt = 2
    """Number of key and value heads; divides `num_heads`. Not with `mla`."""
    head_dim: PositiveInt | None = None
    """Width of a head; `embed / num_heads` when null. Not with `mla`."""
    mla: Mla | None = None
    """Multi-head latent attention (DeepSeek-V2 and V3); null is grouped-query attention."""
    max_length: PositiveInt = 2048
    """Longest context the model is meant for, in tokens."""
    norm: Literal["rms", "rms_float32", "rms_one_plus", "layer"] = "rms"
    """`rms`: root-mean-square norm with a scale, multiplied in the compute format (Llama). `rms_float32`: it is multiplied in
    float32 (OLMo 2, GPT-OSS). `rms_one_plus`: the scale is 1 + w, all in float32 (Gemma). `layer`: mean removed, a scale and no bias."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the norms."""
    norm_placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    """Where a layer normalises: before its parts, behind them (OLMo 2), both (Gemma 2), or once
    before both, which then run side by side (Command R)."""
    qk_norm: Literal["none", "head", "each_head", "projection"] = "none"
    """Normalise queries and keys before they are rotated: each head with one scale for all (Qwen3, Gemma 3) or with one
    of its own (Command R+), or all heads as one vector (OLMo 2)."""
    qkv_bias: bool = False
    """Biases in the projections of queries, keys and values (Qwen2.5); with `mla`, in those to the latent vectors."""
    out_bias: bool = False
    """A bias in the projection behind attention."""
    mlp_bias: bool = False
    """Biases in the three products of the dense feed-forward."""
    attention_scale: PositiveFloat | None = None
    """Factor on the products of queries and keys; 1 / sqrt(head width) when null, with `mla` times the square of
    0.1 m ln(factor) + 1 for m = `rope.scaling.mscale_all_dim`."""
    attention_softcap: PositiveFloat | None = None
    """Attention scores s become cap * tanh(s / cap); null for no cap (Gemma 2)."""
    attention_sinks: bool = False
    """A learned logit per head that takes part in the softmax of attention and has no value (GPT-OSS)."""
    activation: Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"] = "silu"
    """Activation of the gated feed-forward; `gelu_tanh` is the tanh approximation
    (Gemma), `clamped_swiglu` GPT-OSS's, cut off at 7."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor on the embeddings, in the compute format."""
    residual_multiplier: PositiveFloat = 1.0
    """Factor on what each part of a layer adds to the residual stream (Granite)."""
    logit_multiplier: PositiveFloat = 1.0
    """Factor on the logits, applied to the last hidden state (Granite, Command R)."""
    final_softcap: PositiveFloat | None = None
    """Logits z become cap * tanh(z / cap); null for no cap (Gemma 2)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output head."""
    rope: Rope = Rope()
    """Rotary embedding of all layers that do not name their own."""
    moe: Moe | None = None
    """Mixture of experts for the layers whose slot says `feed_forward: moe`."""
    mtp: Mtp | None = None
    """Multi-token prediction: layers behind the last that predict further tokens (DeepSeek-V3, GLM-4.5); null for none."""
    slots: dict[str, Slot] = FrozenDict(layer=Slot())
    """The kinds of layers by name."""
    prefix: Strings = ()
    """Kinds of the first layers, before the repeated body (DeepSeek's dense layers)."""
    layer_pattern: Strings = ("layer",)
    """Kinds of the layers of one period; repeated over the body, cut off at `num_layers`."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """`scan` compiles one period whatever the depth, `unroll` is faster on CPU; `auto` unrolls there unless `remat.policy` is to save
    memory, which it only does in a loop. Checkpoints are the same."""
    init_scale: PositiveFloat = 1.0
    """Factor on the standard deviation of the initial weights (1 / sqrt(fan in); 0.02 for embeddings)."""
    init_from: Path | None = None
    """Start from the weights of a run or checkpoint of MaxTrain, a folder of Hugging Face's or a GGUF file. Its config takes the place
    of this section if nothing else is set here, its tokenizer that of `data.tokenizer` if that is not set; otherwise they must agree."""
    ignore_fields: Strings = ()
    """Fields of a Hugging Face config.json, or keys of a GGUF file, that are taken as absent where a model is imported, loaded or started
    from: for those that are unknown here and known to you not to change what it computes. Dotted within sections (`rope_scaling.name`)."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        unread = sorted(self.changed & {"num_kv_heads", "head_dim", "qk_norm", "attention_sinks"}) if self.mla else []
        if unread:
            raise ValueError(f"{', '.join(unread)}: of no effect with mla, remove it")
        if self.mla is None and self.head_dim is None and self.embed % self.num_heads:
            raise ValueError(f"embed={self.embed} is not a multiple of num_heads={self.num_heads}: set head_dim")
        for rope in (self.rope, *(slot.rope for slot in self.slots.values() if slot.rope is not None)):
            width = self.mla.rope_dim if self.mla else self.head_width
            if rope.width(width) % 2 or not rope.width(width):
                share = f"{rope.fraction:g} (rope.fraction) of {'mla.rope_dim' if self.mla else 'the head width'} {width}"
                raise ValueError(f"rotary embedding turns pairs: {share} must be even and above 0")
            if rope.scaling and rope.scaling.kind == "dynamic" and rope.width(width) < 4:
                raise ValueError(f"rope.scaling.kind: dynamic needs two pairs at least: {rope.width(width)} elements are rotated")
            factors = rope.scaling.short_factors if rope.scaling else ()
            if factors and 2 * len(factors) != rope.width(width):
                raise ValueError(f"rope.scaling has factors for {len(factors)} pairs, {rope.width(width) // 2} are rotated")
        if self.init_from is not None and "init_scale" in self.changed:
            raise ValueError("init_scale has no effect with init_from: remove one of them")
        if self.ignore_fields and self.init_from is None:
            raise ValueError("ignore_fields has no effect without init_from: remove it")
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
        if self.mlp_bias and "dense" not in used:
            raise ValueError("mlp_bias has no effect: no layer in use has a dense feed-forward")
        return self

    @property
    def head_width(self) -> int:
        """Width of a head's query and key."""
        return self.mla.nope_dim + self.mla.rope_dim if self.mla else self.head_dim or self.embed // self.num_heads

    @property
    def value_width(self) -> int:
        """Width of a head's value."""
        return self.mla.value_dim if self.mla else self.head_width

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values attention sees in training."""
        return self.num_heads if self.mla else self.num_kv_heads

    @property
    def served_length(self) -> int:
        """Longest context whose keys stay as they are while it grows: some ropes turn those of a longer document anew."""
        ropes = [self.slots[kind].rope or self.rope for kind in dict.fromkeys(self.kinds)]
        return min([self.max_length, *(r.scaling.original_length for r in ropes if r.scaling and r.scaling.by_length)])

    @property
    def trained_kinds(self) -> tuple[str, ...]:
        """`kinds`, and that of the modules of multi-token prediction behind them, which training runs as well."""
        return self.kinds + self.kinds[-1:] * (self.mtp.num_layers if self.mtp else 0)

    @property
    def deferred(self) -> bool:
        """Whether the section is still to be taken from the config of `init_from`."""
        return self.init_from is not None and self.changed <= {"init_from", "layers", "ignore_fields"}

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
