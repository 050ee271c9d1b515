"""The typed sections of a run: every key a YAML file or the command line may set, with its type, default and meaning.

Parsing and validation are pure: nothing here imports jax, reads the environment or asks for devices. A section is a
frozen pydantic model, so it is hashable and can be a static part of a compiled function. The docstring below a field
is what `--help` prints. Values named `auto` depend on the platform and are resolved in `parallel/mesh.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from maxtrain.config.data import Data, Source, Tokenizer
from maxtrain.config.mla import Mla
from maxtrain.config.model import Model, Slot
from maxtrain.config.moe import Moe
from maxtrain.config.mtp import Mtp
from maxtrain.config.paths import expand
from maxtrain.config.rope import Rope, RopeScaling
from maxtrain.config.section import (
    MAX_INT,
    Dtype,
    Fraction,
    FrozenDict,
    MomentDecay,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Strings,
    freeze,
)
from maxtrain.config.serving import SamplingParams, Serve

__all__ = [  # the sections, whichever file they are in
    "Checkpoint",
    "Config",
    "Data",
    "Eval",
    "Guard",
    "Mesh",
    "Metrics",
    "Mla",
    "Model",
    "Moe",
    "Mtp",
    "Optimizer",
    "Precision",
    "Profile",
    "Remat",
    "Rope",
    "RopeScaling",
    "Run",
    "SamplingParams",
    "Schedule",
    "Serve",
    "Slot",
    "Source",
    "Tokenizer",
    "Train",
]


class Run(Section):
    """Name and place of a run."""

    name: Path = "run"
    """Name of the run; the default folder and the report's title depend on it, never what is computed."""
    dir: Path | None = None
    """The run's folder; `runs/<name>` when null."""
    compile_cache: Path | None = "~/.cache/maxtrain/xla"
    """Folder of XLA's persistent compilation cache, shared between runs; null switches it off."""

    @property
    def folder(self) -> str:
        """The run's folder as a path."""
        return expand(self.dir, "run.dir") if self.dir else f"runs/{self.name}"


MeshAxis = Literal["stage", "data", "fsdp", "expert", "context", "tensor"]  # the busier an axis, the closer its devices: tensor last
LogicalAxis = Literal["batch", "length", "residual", "vocab", "embed", "mlp", "heads", "kv_heads", "expert", "layers", "norm"]
Axes = Annotated[tuple[MeshAxis, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else freeze(v))]
AxisSize = Annotated[int, Field(ge=-1, le=MAX_INT)]


class Mesh(Section):
    """How many devices each mesh axis has, and which array axes are laid out over it."""

    data: AxisSize = 1
    """Replicas of the model that split the batch; -1 takes the devices that are left."""
    fsdp: AxisSize = -1
    """Devices that split batch, parameters and optimizer; -1 takes the devices that are left."""
    tensor: AxisSize = 1
    """Devices that split heads, hidden widths and vocabulary, and between layers the tokens (Megatron with sequence parallelism)."""
    context: AxisSize = 1
    """Devices that split the tokens of each sequence."""
    expert: AxisSize = 1
    """Devices that split the batch and the experts of a mixture; tokens travel to their experts."""
    stage: AxisSize = 1
    """Stages of a pipeline: devices that split the layers, and outside of the layers the batch."""
    pipeline_microbatches: PositiveInt | None = None
    """Microbatches that go through the pipeline, a multiple of its stages; null takes 4 for each stage, or fewer if the batch is small."""
    pipeline_repeats: PositiveInt = 1
    """How often each microbatch goes round the pipeline: 1 is GPipe; above that a stage holds as many groups of layers and
    waits so much less (interleaved schedule of Megatron-LM)."""
    context_attention: Literal["auto", "ring", "all_to_all", "gather"] = "auto"
    """How devices that share a sequence see all of it. `ring`: keys and values go around. `all_to_all`: tokens are exchanged for heads
    (Ulysses). `gather`: each device computes everything. `auto` is `ring`, which any number of heads allows."""
    context_order: Literal["auto", "balanced", "natural"] = "auto"
    """Which tokens a device of the ring has. `balanced`: an early and a late chunk, equal work for all. `natural`: neighbours.
    `auto` is `balanced` unless the length is no multiple of twice the devices or the experts have a capacity."""
    dcn: dict[MeshAxis, PositiveInt] = FrozenDict()
    """Factor of a mesh axis across slices (over the data-centre network), times its size within each slice; 1 where not named."""
    rules: dict[LogicalAxis, Axes] = FrozenDict(
        batch=("data", "fsdp", "expert", "stage"),
        length=("context",),
        residual=("context", "tensor"),
        vocab=("tensor",),
        embed=("fsdp", "context"),
        mlp=("tensor",),
        heads=("tensor",),
        kv_heads=("tensor",),
        expert=("expert",),
        layers=("stage",),
    )
    """Which mesh axes each logical axis is split over; `residual` are the tokens between layers. An axis that is not named is not split."""
    zero1: bool = False
    """Split the optimizer's moments also over `data` (ZeRO stage 1): each replica updates its part of the parameters."""
    coordinator: str | None = None
    """`host:port` of process 0 when several processes train together; null for one process or detection by the cluster."""
    num_processes: PositiveInt | Literal["auto"] = 1
    """Number of processes; `auto` asks the cluster environment (SLURM, GKE, Open MPI, Cloud TPU)."""
    process_id: NonNegativeInt | None = None
    """Index of this process; null when the cluster environment knows."""

    @model_validator(mode="after")
    def _check(self) -> Mesh:
        sizes = {axis: getattr(self, axis) for axis in get_args(MeshAxis)}
        if 0 in sizes.values():
            raise ValueError("a mesh axis cannot have 0 devices: write 1 for an axis that is not used, -1 for all that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1")
        ruled = {axis for axes in self.rules.values() for axis in axes}
        for axis, size in sizes.items():
            if axis not in ruled and size * self.dcn.get(axis, 1) > 1:
                raise ValueError(f"{axis}={size}, but no rule splits anything over {axis}: name it in rules or set it to 1")
        chosen = sorted(self.changed & {"context_attention", "context_order"})
        if chosen and all(sizes[axis] * self.dcn.get(axis, 1) == 1 for axis in self.rules.get("length", ())):
            raise ValueError(f"{chosen[0]} has no effect, as no sequence is split: set context above 1 or {chosen[0]} to auto")
        if self.context_order != "auto" and self.context_attention in ("all_to_all", "gather"):
            raise ValueError(f"context_order has no effect with context_attention: {self.context_attention}; remove one of them")
        for name, axes in self.rules.items():
            if len(set(axes)) != len(axes):
                raise ValueError(f"rules.{name} names a mesh axis twice: {list(axes)}")
        self._check_processes()
        return self

    def _check_processes(self) -> None:
        count = self.num_processes
        if self.coordinator is None and isinstance(count, int) and count > 1:
            raise ValueError(f"num_processes={count} needs coordinator and process_id; num_processes: auto asks the cluster")
        if self.coordinator is not None and (isinstance(count, str) or self.process_id is None):
            raise ValueError("coordinator needs num_processes and process_id")
        if self.process_id is not None and isinstance(count, int) and self.process_id >= count:
            raise ValueError(f"process_id={self.process_id} must be below num_processes={count}")
        if self.coordinator is not None and count == 1:
            raise ValueError("coordinator has no effect with num_processes=1: raise it, or remove coordinator and process_id")
        if self.coordinator is not None:
            host, colon, port = self.coordinator.rpartition(":")
            if not host or not colon or not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
                raise ValueError(f"coordinator must be host:port with a port from 1 to 65535, not {self.coordinator!r}")


class Train(Section):
    """The training loop."""

    steps: PositiveInt = 100
    """Optimizer steps of the whole run."""
    seed: Seed = 0
    """Seed of initial weights and data order."""
    microbatches: PositiveInt = 1
    """Parts a batch is cut into, one after the other, to save memory; gradients are exact whatever the number."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting (PaLM, section 5)."""
    loss_chunk: PositiveInt = 256
    """Positions of a sequence whose logits exist at the same time."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """What computes attention over whole sequences. `xla`: products in blocks, anywhere. `splash`: a kernel for TPU. `cudnn`: cuDNN's,
    for NVIDIA. `auto` takes splash where it can do what the model asks, else xla."""


class Optimizer(Section):
    """The update rule."""

    kind: Literal["adamw"] = "adamw"
    """`adamw`: Adam with decoupled weight decay."""
    b1: MomentDecay = 0.9
    """Decay of the first moment."""
    b2: MomentDecay = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    decay: Annotated[tuple[Literal["matrix", "embedding", "norm", "bias"], ...], BeforeValidator(freeze)] = ("matrix",)
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
        if "final_fraction" in self.changed and self.kind == "constant":
            raise ValueError("kind: constant does not read final_fraction: remove it")
        return self


class Guard(Section):
    """What happens when a step goes wrong: it is skipped, and past a limit the run rolls back and moves past the data."""

    spike_sigmas: PositiveFloat | None = 6.0
    """Skip a step whose loss or gradient norm is this many standard deviations above its recent mean; null skips only non-finite steps."""
    window: Annotated[int, Field(ge=8, le=1_000_000)] = 128
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
    second_moment: Dtype = "float32"
    """Format of the optimizer's second moment; in bfloat16 it all but stands still when `optimizer.b2` is near 1."""


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
    prompts: Strings = ()
    """Texts to go on from at each evaluation, as `serve.sampling` says; the samples are added to samples.jsonl."""
    questions: dict[str, Path] = FrozenDict()
    """Files of questions by name, as `python -m maxtrain.decode --eval` reads them; accuracies are metrics."""

    @field_validator("sets", mode="after")
    @classmethod
    def _check_sets(cls, value: dict[str, Source]) -> dict[str, Source]:
        weighted = [name for name, source in value.items() if "weight" in source.changed]
        if weighted:
            raise ValueError(f"weight has no effect in an evaluation set: remove it from {', '.join(weighted)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Eval:
        if not (self.sets or self.prompts or self.questions) and self.changed:
            raise ValueError("eval is set, but eval.sets names no set, and there are no eval.prompts or eval.questions")
        both = sorted(set(self.sets) & set(self.questions))
        if both:
            raise ValueError(f"sets and questions are both called {both[0]}: choose another name for one of them")
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

    sinks: Annotated[tuple[Literal["console", "jsonl", "tensorboard"], ...], BeforeValidator(freeze)] = ("console", "jsonl", "tensorboard")
    """`console`: a line for people. `jsonl`: metrics.jsonl. `tensorboard`: event files."""
    console_every: PositiveInt = 10
    """Steps between console lines; the other sinks take every step."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s for MFU; null looks the device up in a table and measures a CPU once."""
    profile: Profile | None = None
    """Record a profile for TensorBoard; null for none."""

    @field_validator("sinks", mode="after")
    @classmethod
    def _check_sinks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"sinks names one twice: {', '.join(value)}")
        return value


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
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _check(self) -> Config:
        problems: list[str] = []

        def refuse(key: str, why: str) -> None:
            problems.append(f"{key}: {why}")

        if self.data.batch_size % self.train.microbatches:
            refuse("train.microbatches", f"{self.train.microbatches} does not divide data.batch_size={self.data.batch_size}")
        known = not self.model.deferred  # else sizes are checked when the config of init_from has been read
        if known and self.data.length > self.model.max_length:
            refuse("data.length", f"{self.data.length} is longer than model.max_length={self.model.max_length}")
        if known and (self.eval.length or 0) > self.model.max_length:
            refuse("eval.length", f"{self.eval.length} is longer than model.max_length={self.model.max_length}")
        stride, window = self.eval_stride, self.eval_length
        if stride > window:
            refuse("eval.stride", f"{stride} is longer than the window of {window} tokens")
        if self.schedule.warmup_steps > self.train.steps:
            refuse("schedule.warmup_steps", f"{self.schedule.warmup_steps} is more than train.steps={self.train.steps}")
        elif self.schedule.warmup_steps + (self.schedule.decay_steps or 0) > self.train.steps:
            refuse("schedule.decay_steps", f"warm-up and decay together are longer than train.steps={self.train.steps}")
        least = {"byte": 258, "bpe": self.data.tokenizer.vocab_size or 0, "huggingface": 0}[self.data.tokenizer.kind]
        if known and self.model.vocab_size < least:
            refuse("model.vocab_size", f"{self.model.vocab_size} is smaller than the tokenizer's vocabulary of {least}")
        names = {f"eval/{name}/{metric}" for name in self.eval.sets for metric in ("loss", "bits_per_byte", "perplexity")}
        if self.checkpoint.best is not None and self.checkpoint.best not in names:
            refuse(
                "checkpoint.best",
                f"{self.checkpoint.best!r} is not measured; allowed: {', '.join(sorted(names)) or 'none, eval.sets is empty'}",
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def eval_length(self) -> int:
        """Window of the evaluation, in tokens."""
        return self.eval.length or self.data.length

    @property
    def eval_stride(self) -> int:
        """New tokens per evaluation window."""
        return self.eval.stride or max(1, self.eval_length // 2)
