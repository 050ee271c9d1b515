"""Every way a write can be cut short: a stop at any point, a full disk, kill -9; and two processes together."""

import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

import jax
import pytest
from states import abstract, assert_same, data_file, newest, restored, run, save, saved, tree

from maxtrain.checkpoint import orbax as module
from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.config import schema
from maxtrain.data.integrity import MANIFEST, damage


@pytest.mark.parametrize("again", [1, 2], ids=["replacing", "new"])
@pytest.mark.parametrize("place", ["manifest", "removal", "half removed", "renaming", "retention"])
def test_a_stop_at_any_point_after_the_arrays_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, again: int
) -> None:
    """Stopped there, the folder is as a kill leaves it; with keep_last=1 there is nothing to spare."""
    save(tmp_path, 1, keep_last=1)
    rename = Path.rename

    def stop(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("killed here")

    def stop_removing(folder: Path, **_: object) -> None:
        if folder.exists():
            data_file(folder).unlink()
            stop()

    def stop_renaming(folder: Path, target: Path) -> Path:
        return stop() if folder.suffix == ".new" else rename(folder, target)

    with monkeypatch.context() as patch:
        match place:
            case "manifest":
                patch.setattr(module, "write_manifest", stop)
            case "removal":
                patch.setattr(module, "_remove", stop)
            case "half removed":
                patch.setattr(module.shutil, "rmtree", stop_removing)
            case "renaming":
                patch.setattr(Path, "rename", stop_renaming)
            case "retention":
                patch.setattr(Checkpointer, "_retain", stop)
        checkpoints = Checkpointer(str(tmp_path), schema.Checkpoint(keep_last=1))
        checkpoints.save(again, tree(9), {})
        with pytest.raises(OSError, match=f"(?s)step {again} .* failed: killed here"):
            checkpoints.close()
    assert not any(damage(folder) for folder in tmp_path.iterdir() if (folder / MANIFEST).exists())
    step, _ = newest(tmp_path)
    assert step == (1 if place == "manifest" else again)
    assert_same(restored(tmp_path, step), tree(1) if place == "manifest" else tree(9))
    save(tmp_path, 3, keep_last=1)
    assert saved(tmp_path) == ["3"]
    assert newest(tmp_path) == (3, [])


def test_leftovers_are_removed_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "2.new" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "2.new" / "arrays.orbax-checkpoint-tmp" / "data").write_bytes(b"part")
    step, (line,) = newest(tmp_path)
    assert step == 1
    assert "2.new: it is incomplete" in line
    save(tmp_path, 3)
    assert saved(tmp_path) == ["1", "3"]


def test_full_disk_is_an_error_that_names_the_step_and_spares_the_rest(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: the write fails half way, in the background."""
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        checkpoints.save(1, big, {})
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            checkpoints.save(2, big, {})
            with pytest.raises(OSError, match=r"(?s)step 2 .* failed: .*File too large.*Complete and untouched: steps \[1\]"):
                checkpoints.save(3, big, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.newest_good(lambda line: None) == 1
        checkpoints.save(3, big, {})
        assert checkpoints.newest_good(pytest.fail) == 3
        assert_same(checkpoints.restore(3, abstract(big)), big)
    assert saved(tmp_path) == ["1", "3"]


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Four processes after each other save as fast as they can until killed; each checks what the one before left."""
    out = run(f"""
        import os, random, signal, time
        import jax, numpy as np
        from maxtrain.checkpoint.orbax import Checkpointer
        from maxtrain.config import schema

        def arrays(step):
            noise = np.random.default_rng(step).integers(0, 2**32, 1 << 21, np.uint32)  # 8 MB
            return {{"w": jax.device_put(noise), "step": jax.device_put(np.int32(step))}}

        def session(pipe):
            checkpoints = Checkpointer({str(tmp_path)!r}, schema.Checkpoint(keep_last=1))
            step = checkpoints.newest_good(lambda line: os.write(pipe, b"torn\\n")) or 0
            if step:
                like = {{name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays(step).items()}}
                found = checkpoints.restore(step, like)
                assert all(np.array_equal(found[name], x) for name, x in arrays(step).items()), step
                assert checkpoints.read_meta(step) == {{"step": step}}
            else:  # so that there is always one to come back to
                step = 1
                checkpoints.save(step, arrays(step), {{"step": step}})
                checkpoints.wait()
            os.write(pipe, f"good {{step}}\\n".encode())
            while True:
                step += 1
                checkpoints.save(step, arrays(step), {{"step": step}})

        random.seed(0)
        for _ in range(4):
            read, write = os.pipe()
            child = os.fork()  # before any jax call: no device, no thread exists yet
            if child == 0:
                try:
                    session(write)
                finally:
                    os._exit(1)
            os.close(write)
            with os.fdopen(read) as lines:
                for line in lines:
                    print(line, end="")
                    if line.startswith("good"):
                        break
                time.sleep(random.uniform(0.1, 0.5))
                os.kill(child, signal.SIGKILL)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    """)
    good = [int(line.split()[1]) for line in out.splitlines() if line.startswith("good")]
    assert len(good) == 4
    assert good == sorted(good)
    assert good[0] == 1
    step, _ = newest(tmp_path)
    assert step is not None
    assert step >= good[-1]
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:  # the last may have been killed before its renaming
        assert checkpoints.read_meta(step) == {"step": step}


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    worker = f"""
        import sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from pathlib import Path
        from maxtrain.checkpoint.orbax import Checkpointer
        from maxtrain.config import schema

        process = int(sys.argv[1])
        jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, process)
        mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        place, everywhere = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

        def arrays(step):
            return {{"w": jax.make_array_from_callback((16, 4), place, lambda i: np.arange(64, dtype=np.float32).reshape(16, 4)[i] + step),
                     "step": jax.make_array_from_callback((), everywhere, lambda i: np.int32(step))}}

        def same(x, y):
            return all(np.array_equal(a.data, b.data) for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True))

        reports = []
        with Checkpointer({str(tmp_path)!r}, schema.Checkpoint(keep_last=2)) as checkpoints:
            for step in (10, 20, 30):
                checkpoints.save(step, arrays(step), {{"step": step}})
            checkpoints.wait()
            assert checkpoints.steps() == [20, 30]
            if process == 0:
                record = Path({str(tmp_path)!r}, "30", "record.json")
                record.write_text(record.read_text().replace("30", "31"))
            assert checkpoints.newest_good(reports.append) == 20
            assert len(reports) == (1 if process == 0 else 0)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays(0))
            found = checkpoints.restore(20, like)
            assert all(jax.tree.leaves(jax.tree.map(same, found, arrays(20))))
            checkpoints.save(30, arrays(30), {{}})
            assert checkpoints.newest_good(reports.append) == 30
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(filter(None, sys.path)), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", textwrap.dedent(worker)]
    processes = [subprocess.Popen([*command, str(i), port], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
