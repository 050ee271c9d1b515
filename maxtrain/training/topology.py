"""Slices of TPUs by name, as libtpu describes them where there is none: enough to compile for, nothing runs."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from maxtrain.config.errors import Refused


class Generation(NamedTuple):
    """The slices that a generation of TPUs comes in."""

    shapes: tuple[tuple[int, ...], ...]
    """Those smaller than a cube, or all of them."""
    cubes: int = 0
    """Largest side of a slice made of cubes of 4 x 4 x 4; 0 where there are none."""


FLAT = Generation(((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)))
SOLID = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
GENERATIONS = {"v5e": FLAT, "v6e": FLAT, "v5p": Generation(SOLID, 24), "tpu7x": Generation(SOLID, 36)}

OPEN_RINGS = (
    "libtpu describes several slices of this generation without the links that close their rings: it adds weights up where it would gather "
    "them on the real ones. Memory and DCN hold; compile for one slice to see its ICI."
)
QUIET = {  # there is no metadata server that libtpu could ask about its host, and no device that two processes could both want
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices_of(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of `slices` slices called `v5e:4x4` or `v5p:4x4x8`: generation, then chips along each axis of the torus.

    Raises:
        Refused: there is no such slice, or libtpu is not installed.
    """
    generation, _, size = name.partition(":")
    if generation not in GENERATIONS or not re.fullmatch(r"\d+(x\d+)*", size):
        raise Refused(f"topology={name}: a generation and its chips are expected, such as v5p:4x4x8; generations: {', '.join(GENERATIONS)}")
    shape, known = tuple(map(int, size.split("x"))), GENERATIONS[generation]
    cubes = len(shape) == 3 and all(side % 4 == 0 and 0 < side <= known.cubes for side in shape)
    if shape not in known.shapes and not cubes:
        named = ", ".join("x".join(map(str, sides)) for sides in known.shapes)
        more = f", and multiples of 4x4x4 up to {known.cubes} on a side" if known.cubes else ""
        raise Refused(f"topology={name}: {generation} has no such slice: there are {named}{more}")
    if slices < 1:
        raise Refused(f"slices={slices}: at least one slice is expected")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if len(shape) == 3:  # sides of whole cubes are closed to rings
        options |= {"wrap": tuple(side % 4 == 0 for side in shape), "chips_per_host_bounds": (2, 2, 1)}
    elif math.prod(shape) == 1:
        options |= {"chips_per_host_bounds": (1, 1, 1)}
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # whatever the plugin raises
        raise Refused(
            f"topology={name}: libtpu cannot describe it ({str(error).splitlines()[0]:.200}): pip install 'maxtrain[tpu]'"
        ) from None
