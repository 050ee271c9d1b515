"""An entry of the compilation cache that cannot be loaded is written anew; JAX itself never does."""

import subprocess
import sys
import warnings

from maxtrain.parallel import compile_cache

RUN = """
import sys, jax, jax.numpy as jnp
from maxtrain.config import schema
from maxtrain.parallel import mesh
mesh.start(schema.Run(compile_cache=sys.argv[1]), schema.Mesh())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.sin(x) @ x, compiler_options=None)(jnp.eye(3)).sum())
"""


def test_damaged_entries_are_written_anew_and_said_once(tmp_path):
    def run():
        return subprocess.run([sys.executable, "-W", "default", "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True)

    first = run()
    entries = {path: path.read_bytes() for path in tmp_path.glob("*-cache")}
    assert entries
    for number, (path, content) in enumerate(entries.items()):
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"")
    second = run()
    assert second.stdout == first.stdout
    assert second.stderr.count("removed and made anew") == 1
    assert "Error reading" not in second.stderr
    assert all(path.stat().st_size > 10 for path in entries)
    assert run().stderr == first.stderr == ""


def test_other_warnings_are_shown(tmp_path, monkeypatch):
    shown = []
    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
        compile_cache.mend.__wrapped__(str(tmp_path))
        warnings.warn("something else", stacklevel=1)
    assert shown == ["something else"]
