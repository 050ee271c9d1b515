"""Small training states and the few steps that the tests of checkpoints share."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.config import schema


def mesh(devices: int) -> jax.sharding.Mesh:
    shape = (2, devices // 2) if devices > 1 else (1, 1)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def tree(seed: int = 0, devices: int = 8) -> dict[str, Any]:
    """Arrays of every kind a training state has; all bits of the floats are random, infinities and NaNs included.

    A NaN in bfloat16 is the usual one: a copy that XLA compiles without LLVM's optimization, as the tests do, keeps no other.
    """
    bits, place = np.random.default_rng(seed), mesh(devices)

    def put(array: Any, *axes: str | None) -> jax.Array:
        return jax.device_put(jnp.asarray(array), NamedSharding(place, PartitionSpec(*axes)))

    def floats(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        drawn = bits.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
        if dtype == jnp.bfloat16:
            drawn[drawn.view(np.uint16) & 0x7FFF > 0x7F80] = np.nan
        return drawn

    return {
        "model": {
            "embedding": put(floats((16, 8), np.float32), "fsdp", "data"),
            "layers": {"mlp": put(floats((3, 8, 24), jnp.bfloat16), None, "fsdp"), "norm": put(floats((3, 8), np.float32))},
        },
        "opt_state": {"0": {"count": put(np.int32(seed))}, "scale": put(np.float32(2.5))},
        "key": put(jax.random.key_data(jax.random.key(seed))),
        "step": put(np.int32(seed)),
    }


def abstract(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def assert_same(found: Any, expected: Any) -> None:
    """Bitwise equal, with the same names, formats and placement."""
    names, others = jax.tree_util.tree_leaves_with_path(found), jax.tree_util.tree_leaves_with_path(expected)
    for (name, x), (other, y) in zip(names, others, strict=True):
        assert name == other
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder: Path, *steps: int, **keys: Any) -> None:
    with Checkpointer(str(folder), schema.Checkpoint(**keys)) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"step": step})


def newest(folder: Path) -> tuple[int | None, list[str]]:
    lines: list[str] = []
    with Checkpointer(str(folder), schema.Checkpoint()) as checkpoints:
        return checkpoints.newest_good(lines.append), lines


def restored(folder: Path, step: int) -> Any:
    with Checkpointer(str(folder), schema.Checkpoint()) as checkpoints:
        return checkpoints.restore(step, abstract(tree(step)))


def data_file(folder: Path) -> Path:
    """The largest of the files that hold arrays."""
    return max(folder.glob("arrays/**/d/*"), key=lambda path: path.stat().st_size)


def saved(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=str)


def run(code: str) -> str:
    """Run Python code in a process of its own, with a single CPU device."""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(paths), "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
