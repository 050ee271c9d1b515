"""What can compute attention over a whole sequence, and what each of them is able to do.

A backend is a row of `BACKENDS`: a function with the arguments of `causal_attention` and the limits within which it computes
the same. A backend that was asked for and cannot is refused with the reason; `train.attention: auto` takes the first of
`AUTOMATIC` that can. Ring attention has blocks of its own, so there is no choice there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.cudnn_attention import cudnn_attention
from maxtrain.ops.splash_attention import BLOCK, splash_attention
from maxtrain.parallel import context
from maxtrain.parallel.sharding import Layout

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, Options], jax.Array]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention and its limits; None is no limit.

    platforms, dtypes: where and in which formats it runs.
    softcap, sinks, unequal: whether it has the cap of scores, sinks, and keys that are wider than values.
    length, width: what the length of sequences and the width of heads must be a multiple of.
    widest: the widest head.
    capability: the least compute capability of a GPU.
    """

    attention: Attention
    platforms: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    softcap: bool = True
    sinks: bool = True
    unequal: bool = True
    length: int = 1
    width: int = 1
    widest: int | None = None
    capability: tuple[int, int] | None = None


BACKENDS: Mapping[str, Backend] = {
    "splash": Backend(splash_attention, ("tpu",), ("bfloat16", "float32"), length=BLOCK),
    "cudnn": Backend(
        cudnn_attention,
        ("gpu",),
        ("bfloat16", "float16"),
        softcap=False,
        sinks=False,
        unequal=False,
        length=2,
        width=8,
        widest=256,
        capability=(9, 0),
    ),
    "xla": Backend(causal_attention),
}
AUTOMATIC = ("splash", "xla")  # cudnn has not been run, and must be asked for


def reason_against(name: str, config: schema.Config, layout: Layout) -> str | None:
    """Why a backend cannot compute the attention of a resolved config on a layout; None if it can."""
    backend, model, device = BACKENDS[name], config.model, layout.mesh.devices.flat[0]
    platform = device.platform
    if layout.parts("length") > 1 and layout.exchange == "ring" and name != "xla":
        return "ring attention computes its own blocks: set mesh.context_attention to all_to_all"
    if backend.platforms is not None and platform not in backend.platforms:
        return f"it runs on {', '.join(backend.platforms)}, and the devices are of the platform {platform}"
    if backend.capability is not None and not _capable(device, backend.capability):
        least = ".".join(map(str, backend.capability))
        return f"it takes an NVIDIA GPU of compute capability {least}, and this one has {getattr(device, 'compute_capability', 'none')}"
    if backend.dtypes is not None and config.precision.compute not in backend.dtypes:
        return f"precision.compute={config.precision.compute}, and it computes in {', '.join(backend.dtypes)}"
    for key, length in context.lengths(config).items():
        if length % backend.length:
            return f"{key}={length} is not a multiple of {backend.length}"
    widths = model.head_width, model.value_width
    if not backend.unequal and len(set(widths)) > 1:
        return f"heads have keys of width {widths[0]} and values of width {widths[1]} (model.mla), and it needs equal ones"
    for width in widths:
        if width % backend.width or (backend.widest is not None and width > backend.widest):
            return f"the head width {width} is not a multiple of {backend.width}, at most {backend.widest}"
    if model.attention_softcap is not None and not backend.softcap:
        return f"model.attention_softcap={model.attention_softcap}, and it has no cap"
    if model.attention_sinks and not backend.sinks:
        return "model.attention_sinks=true, and it has none"
    return None


def _capable(device: jax.Device, least: tuple[int, int]) -> bool:
    """Whether a GPU has at least this compute capability, as NVIDIA numbers it."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= least


def chosen(config: schema.Config, layout: Layout) -> str:
    """The name of the backend of a resolved config on a layout whose exchange is settled.

    Raises:
        Refused: the one that was asked for cannot.
    """
    name = config.train.attention
    if name == "auto":
        return next(each for each in AUTOMATIC if reason_against(each, config, layout) is None)
    reason = reason_against(name, config, layout)
    if reason is not None:
        raise Refused(f"train.attention={name}: {reason}; or take auto")
    return name
