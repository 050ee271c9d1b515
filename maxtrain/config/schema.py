"""The typed sections of a run: every key a YAML file or the command line may set, with its type, default and meaning.

Parsing and validation are pure: nothing here imports jax, reads the environment or asks for devices. A section is a
frozen pydantic model, so it is hashable and can be a static part of a compiled function. The docstring below a field
is what `--help` prints. Values named `auto` depend on the platform and are resolved in `parallel/mesh.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _freeze(value: Any) -> Any:
    """Lists become tuples and mappings sorted item tuples are left alone: YAML has no tuple, a hashable section needs one."""
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


class FrozenDict(dict):
    """A mapping that is hashed by its items, so that a section holding one stays hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a config mapping cannot be changed")


type_ = type  # `type` is a field name below
Strings = Annotated[tuple[str, ...], BeforeValidator(_freeze)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Common behaviour of all sections: strict types, unknown keys refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Run(Section):
    """Name and place of a run."""

    name: str = "run"
    """Name of the run; only the default folder depends on it, never what is computed."""
    dir: str | None = None
    """The run's folder; `runs/<name>` when null."""
    compile_cache: str | None = "~/.cache/maxtrain/xla"
    """Folder of XLA's persistent compilation cache, shared between runs; null switches it off."""

    @property
    def folder(self) -> str:
        """The run's folder as a path."""
        return self.dir or f"runs/{self.name}"


# ---------------------------------------------------------------------------------------------------------- model


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


class Moe(Section):
    """Mixture of experts in place of the dense feed-forward."""

    num_experts: PositiveInt
    """Number of routed experts."""
    experts_per_token: PositiveInt
    """How many experts each token is sent to (top-k)."""
    mlp: PositiveInt
    """Hidden width of one expert."""
    routing: Literal["softmax"] = "softmax"
    """`softmax`: weights are the softmax over all experts (Mixtral, Qwen)."""
    norm_topk: bool = True
    """Divide the weights of the chosen experts by their sum."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """`dropless`: every token reaches its experts. `capacity`: each expert takes at most a fixed number of tokens of a sequence, the rest are dropped."""
    capacity_factor: PositiveFloat = 1.25
    """Capacity of an expert per sequence, in units of an even split; read by `dispatch: capacity` only."""
    aux_loss: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, computed per sequence so that neither mesh nor microbatch changes it."""

    @model_validator(mode="after")
    def _check(self) -> Moe:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}")
        if "capacity_factor" in self.model_fields_set and self.dispatch != "capacity":
            raise ValueError("capacity_factor has no effect with dispatch: dropless; set dispatch: capacity or remove it")
        return self


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
    activation: Literal["silu"] = "silu"
    """Activation of the gated feed-forward."""
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


# ----------------------------------------------------------------------------------------------------------- mesh

MeshAxis = Literal["data", "fsdp"]
LogicalAxis = Literal["batch", "length", "vocab", "embed", "mlp", "heads", "kv_heads", "head", "expert", "layers", "norm"]
Axes = Annotated[tuple[MeshAxis, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else _freeze(v))]


class Mesh(Section):
    """How many devices each mesh axis has, and which array axes are laid out over it."""

    data: Annotated[int, Field(ge=-1)] = 1
    """Replicas of the model that split the batch; -1 takes the devices that are left."""
    fsdp: Annotated[int, Field(ge=-1)] = -1
    """Devices that split batch, parameters and optimizer; -1 takes the devices that are left."""
    rules: dict[LogicalAxis, Axes] = FrozenDict(batch=("data", "fsdp"), embed=("fsdp",))
    """Which mesh axes each logical axis is split over; a logical axis that is not named is not split."""
    coordinator: str | None = None
    """`host:port` of process 0 when several processes train together; null for one process or detection by the cluster."""
    num_processes: PositiveInt | Literal["auto"] = 1
    """Number of processes; `auto` asks the cluster environment (SLURM, GKE, Open MPI, Cloud TPU)."""
    process_id: NonNegativeInt | None = None
    """Index of this process; null when the cluster environment knows."""

    @model_validator(mode="after")
    def _check(self) -> Mesh:
        if 0 in (self.data, self.fsdp):
            raise ValueError("a mesh axis cannot have 0 devices: write 1 for an axis that is not used, -1 for all that are left")
        if self.data == -1 and self.fsdp == -1:
            raise ValueError("only one mesh axis can be -1")
        for name, axes in self.rules.items():
            if len(set(axes)) != len(axes):
                raise ValueError(f"rules.{name} names a mesh axis twice: {list(axes)}")
        if self.coordinator is not None and (isinstance(self.num_processes, str) or self.process_id is None):
            raise ValueError("coordinator needs num_processes and process_id")
        if self.coordinator is not None and ":" not in self.coordinator:
            raise ValueError(f"coordinator must be host:port, not {self.coordinator!r}")
        return self

    @field_validator("rules", mode="after")
    @classmethod
    def _freeze_rules(cls, value: dict) -> dict:
        return FrozenDict(value)


# ----------------------------------------------------------------------------------------------------------- data


class Tokenizer(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "bpe", "huggingface"] = "byte"
    """`byte`: UTF-8 bytes. `bpe`: byte-level BPE trained on the training sources. `huggingface`: a tokenizer.json."""
    path: str | None = None
    """The tokenizer.json of `kind: huggingface`, or its folder."""
    vocab_size: PositiveInt | None = None
    """Size of the vocabulary that `kind: bpe` trains, special tokens included."""
    train_bytes: PositiveInt = 20_000_000
    """How much text `kind: bpe` trains on, at most, in bytes."""

    @model_validator(mode="after")
    def _check(self) -> Tokenizer:
        needs = {"byte": None, "bpe": "vocab_size", "huggingface": "path"}[self.kind]
        for key in ("path", "vocab_size"):
            if (getattr(self, key) is not None) != (key == needs):
                raise ValueError(f"kind: {self.kind} " + (f"needs {key}" if key == needs else f"does not read {key}: remove it"))
        if self.vocab_size is not None and self.vocab_size < 258:
            raise ValueError(f"vocab_size={self.vocab_size} is too small: 256 bytes and 2 special tokens need at least 258")
        return self


class Source(Section):
    """Where documents come from."""

    kind: Literal["stdlib", "text", "jsonl", "synthetic"]
    """`stdlib`: the standard library of the running interpreter. `text`: files, a document each. `jsonl`: a document a line. `synthetic`: made from the seed."""
    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the other sources."""
    path: str | None = None
    """File or folder of `text` and `jsonl`; files ending in .gz are read too."""
    pattern: str = "**/*"
    """Which files below `path` are taken, when it is a folder."""
    field: str = "text"
    """The key of a `jsonl` line that holds the text."""
    split: Literal["all", "train", "heldout"] = "all"
    """Which part: documents (files) are assigned to `heldout` by the hash of their content."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the documents that `split: heldout` takes and `split: train` leaves."""
    num_documents: PositiveInt = 1000
    """Number of documents of a `synthetic` source."""
    document_length: PositiveInt = 512
    """Longest document of a `synthetic` source, in bytes."""
    max_bytes: PositiveInt | None = None
    """Take no more text than this from the source (whole documents); null takes all."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        reads = {"stdlib": set(), "text": {"path", "pattern"}, "jsonl": {"path", "pattern", "field"}, "synthetic": {"num_documents", "document_length"}}
        own = set().union(*reads.values())
        extra = sorted((self.model_fields_set & own) - reads[self.kind])
        extra = [key for key in extra if getattr(self, key) != Source.model_fields[key].default]
        if extra:
            raise ValueError(f"kind: {self.kind} does not read {', '.join(extra)}: remove it")
        if "path" in reads[self.kind] and self.path is None:
            raise ValueError(f"kind: {self.kind} needs path")
        if "heldout_fraction" in self.model_fields_set and self.split == "all":
            raise ValueError("heldout_fraction has no effect with split: all; set split: train or heldout")
        return self


class Data(Section):
    """The training data and how it is cut into batches."""

    batch_size: PositiveInt = 8
    """Sequences in a global batch, over all devices."""
    length: PositiveInt = 256
    """Tokens in a sequence."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""
    sources: dict[str, Source] = FrozenDict(stdlib=Source(kind="stdlib", split="train"))
    """Training sources by name; their weights are shares of the training tokens."""
    workers: NonNegativeInt = 0
    """Processes that prepare batches; 0 prepares them in threads of the trainer. Batches do not depend on it."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead."""
    cache_dir: str = "~/.cache/maxtrain/data"
    """Where prepared token shards and trained tokenizers are kept, by the fingerprint of what made them."""

    @field_validator("sources", mode="after")
    @classmethod
    def _freeze_sources(cls, value: dict[str, Source]) -> dict[str, Source]:
        if not value:
            raise ValueError("sources is empty: name at least one source")
        return FrozenDict(value)


# ------------------------------------------------------------------------------------------------------- training


class Train(Section):
    """The training loop."""

    steps: PositiveInt = 100
    """Optimizer steps of the whole run."""
    seed: NonNegativeInt = 0
    """Seed of initial weights and data order."""
    microbatches: PositiveInt = 1
    """Parts a batch is cut into, one after the other, to save memory; gradients are exact whatever the number."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting (PaLM, section 5)."""
    loss_chunk: PositiveInt = 256
    """Positions of a sequence whose logits exist at the same time."""


class Optimizer(Section):
    """The update rule."""

    kind: Literal["adamw"] = "adamw"
    """`adamw`: Adam with decoupled weight decay."""
    b1: Fraction = 0.9
    """Decay of the first moment."""
    b2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    decay: Annotated[tuple[Literal["matrix", "embedding", "norm", "bias"], ...], BeforeValidator(_freeze)] = ("matrix",)
    """Kinds of parameters that decay."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null does not clip."""


class Schedule(Section):
    """The learning rate over the steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: to the end. `wsd`: warm-up, stable, linear decay over the last `decay_steps`. `constant`: after warm-up."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInt | None = None
    """Length of the decay of `wsd`; a fifth of the run when null."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(f"kind: {self.kind} does not read decay_steps: remove it or use wsd")
        if "final_fraction" in self.model_fields_set and self.kind == "constant":
            raise ValueError("kind: constant does not read final_fraction: remove it")
        return self


class Guard(Section):
    """What happens when a step goes wrong: it is skipped, and past a limit the run rolls back and moves past the data."""

    spike_sigmas: PositiveFloat | None = 6.0
    """Skip a step whose loss or gradient norm is this many standard deviations above its recent mean; null skips only non-finite steps."""
    window: Annotated[int, Field(ge=8)] = 128
    """Number of recent steps that mean and deviation are taken over; nothing counts as a spike before it is full."""
    max_skipped: PositiveInt = 8
    """Skipped steps in a row after which the run rolls back to the last checkpoint."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks after which the run ends with an error."""


class Precision(Section):
    """Number formats."""

    compute: Dtype | Literal["auto"] = "auto"
    """Format of activations and matrix products; `auto` is float32 on CPU (bfloat16 is slower there) and bfloat16 elsewhere."""
    params: Dtype = "float32"
    """Format the parameters are kept in."""
    moments: Dtype = "float32"
    """Format of the optimizer's first moment."""


class Remat(Section):
    """What the backward pass keeps and what it computes again."""

    policy: Literal["none", "dots", "full"] = "none"
    """`none` keeps all activations, `dots` keeps the products with weights, `full` only the input of each layer."""


class Eval(Section):
    """Evaluation on held-out sets within training."""

    every: PositiveInt | None = None
    """Steps between evaluations; null evaluates only at the end."""
    sets: dict[str, Source] = FrozenDict()
    """Held-out sets by name; each document is scored whole, starting from an empty context."""
    batch_size: PositiveInt | None = None
    """Sequences scored together; `data.batch_size` when null."""
    length: PositiveInt | None = None
    """Window in which documents are scored; `data.length` when null."""
    stride: PositiveInt | None = None
    """New tokens per window of a document longer than one; the rest of the window is context. Half of `length` when null."""

    @field_validator("sets", mode="after")
    @classmethod
    def _freeze_sets(cls, value: dict[str, Source]) -> dict[str, Source]:
        weighted = [name for name, source in value.items() if "weight" in source.model_fields_set]
        if weighted:
            raise ValueError(f"weight has no effect in an evaluation set: remove it from {', '.join(weighted)}")
        return FrozenDict(value)

    @model_validator(mode="after")
    def _check(self) -> Eval:
        if not self.sets and self.model_fields_set - {"sets"}:
            raise ValueError("eval is set, but eval.sets names no set")
        return self


class Checkpoint(Section):
    """Saving and resuming."""

    every: PositiveInt | None = None
    """Steps between checkpoints; null saves only at the end and when stopped."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_every: PositiveInt | None = None
    """Keep for good every checkpoint whose step is a multiple of this."""
    best: str | None = None
    """A metric, such as `eval/<set>/loss`; the checkpoint with its lowest value is kept too."""
    resume: bool = True
    """Go on from the newest good checkpoint in the run's folder, if there is one."""


class Profile(Section):
    """A window of steps recorded by the profiler."""

    start: NonNegativeInt
    """Step (of this process) before which recording starts."""
    steps: PositiveInt = 3
    """Number of recorded steps."""


class Metrics(Section):
    """What is measured and where it goes."""

    sinks: Annotated[tuple[Literal["console", "jsonl", "tensorboard"], ...], BeforeValidator(_freeze)] = ("console", "jsonl", "tensorboard")
    """`console`: a line for people. `jsonl`: metrics.jsonl. `tensorboard`: event files."""
    console_every: PositiveInt = 10
    """Steps between console lines; the other sinks take every step."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s for MFU; null looks the device up in a table and measures a CPU once."""
    profile: Profile | None = None
    """Record a profile for TensorBoard; null for none."""


class Config(Section):
    """A whole run."""

    run: Run = Run()
    model: Model = Model()
    mesh: Mesh = Mesh()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    guard: Guard = Guard()
    precision: Precision = Precision()
    remat: Remat = Remat()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _check(self) -> Config:
        def refuse(key: str, why: str) -> None:
            raise ValueError(f"{key}: {why}")

        if self.data.batch_size % self.train.microbatches:
            refuse("train.microbatches", f"{self.train.microbatches} does not divide data.batch_size={self.data.batch_size}")
        if self.data.length > self.model.max_length:
            refuse("data.length", f"{self.data.length} is longer than model.max_length={self.model.max_length}")
        if (self.eval.length or 0) > self.model.max_length:
            refuse("eval.length", f"{self.eval.length} is longer than model.max_length={self.model.max_length}")
        stride, window = self.eval_stride, self.eval_length
        if stride > window:
            refuse("eval.stride", f"{stride} is longer than the window of {window} tokens")
        if self.schedule.warmup_steps > self.train.steps:
            refuse("schedule.warmup_steps", f"{self.schedule.warmup_steps} is more than train.steps={self.train.steps}")
        if self.schedule.warmup_steps + (self.schedule.decay_steps or 0) > self.train.steps:
            refuse("schedule.decay_steps", f"warm-up and decay together are longer than train.steps={self.train.steps}")
        least = {"byte": 258, "bpe": self.data.tokenizer.vocab_size or 0, "huggingface": 0}[self.data.tokenizer.kind]
        if self.model.vocab_size < least:
            refuse("model.vocab_size", f"{self.model.vocab_size} is smaller than the tokenizer's vocabulary of {least}")
        names = {f"eval/{name}/{metric}" for name in self.eval.sets for metric in ("loss", "bits_per_byte", "perplexity")}
        if self.checkpoint.best is not None and self.checkpoint.best not in names:
            refuse("checkpoint.best", f"{self.checkpoint.best!r} is not measured; allowed: {', '.join(sorted(names)) or 'none, eval.sets is empty'}")
        return self

    @property
    def eval_length(self) -> int:
        """Window of the evaluation, in tokens."""
        return self.eval.length or self.data.length

    @property
    def eval_stride(self) -> int:
        """New tokens per evaluation window."""
        return self.eval.stride or max(1, self.eval_length // 2)
