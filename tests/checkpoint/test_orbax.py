"""Checkpoints: bitwise round trips over meshes, refusals, fallback past damage, and what is kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from states import abstract, assert_same, data_file, newest, restored, run, save, saved, tree

from maxtrain.checkpoint.orbax import Checkpointer, newest_meta
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data.integrity import MANIFEST

# ----------------------------------------------------------------------------------------------------- save and restore


def test_round_trip_is_bitwise_on_other_meshes(tmp_path: Path) -> None:
    previous = 8
    for devices in (8, 2, 1, 8):
        folder = tmp_path / f"{previous}-{devices}"
        with Checkpointer(str(folder), schema.Checkpoint()) as checkpoints:
            checkpoints.save(5, tree(5, previous), {})
            target = tree(5, devices)
            assert_same(checkpoints.restore(5, abstract(target)), target)
        previous = devices


def test_saved_on_eight_devices_restores_where_there_is_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    run(f"""
        import jax, states as t
        assert len(jax.devices()) == 1
        with t.Checkpointer({str(tmp_path)!r}, t.schema.Checkpoint()) as checkpoints:
            t.assert_same(checkpoints.restore(5, t.abstract(t.tree(5, 1))), t.tree(5, 1))
    """)


def test_training_may_go_on_in_the_same_buffers_while_they_are_written(tmp_path: Path) -> None:
    arrays = {"w": jnp.arange(1 << 22, dtype=jnp.float32)}
    step = jax.jit(lambda arrays: jax.tree.map(lambda x: x * 2 + 1, arrays), donate_argnums=0)
    target = abstract(arrays)
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        checkpoints.save(1, arrays, {})
        for _ in range(5):
            arrays = step(arrays)
        assert_same(checkpoints.restore(1, target), {"w": jnp.arange(1 << 22, dtype=jnp.float32)})


def test_meta_and_steps_come_back(tmp_path: Path) -> None:
    meta = {"data_step": 7, "config": "train:\n  steps: 3\n", "versions": {"jax": jax.__version__}}
    with Checkpointer(str(tmp_path / "a" / "b"), schema.Checkpoint()) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.newest_good(pytest.fail) is None
        checkpoints.save(0, tree(), meta, {"loss": 1.5})
        checkpoints.save(3, tree(), {})
        checkpoints.wait()
        assert checkpoints.steps() == [0, 3]
        assert checkpoints.read_meta(0) == meta
        with pytest.raises(Refused, match=r"no complete checkpoint of step 2 .*\[0, 3\]"):
            checkpoints.restore(2, abstract(tree()))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = tree(1)
    del other["key"]
    other["opt_state"]["0"]["nu"] = jnp.zeros((3,))
    other["model"]["embedding"] = jnp.zeros((16, 16))
    other["model"]["layers"]["norm"] = jnp.zeros((3, 8), jnp.bfloat16)
    other["step"] = jnp.zeros((1,), jnp.int32)
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints, pytest.raises(Refused) as refusal:
        checkpoints.restore(1, abstract(other))
    for line in (
        "key: uint32[2] in the checkpoint, absent in this run",
        "opt_state/0/nu: absent in the checkpoint, float32[3] in this run",
        "model/embedding: float32[16, 8] in the checkpoint, float32[16, 16] in this run",
        "model/layers/norm: float32[3, 8] in the checkpoint, bfloat16[3, 8] in this run",
        "step: int32[] in the checkpoint, int32[1] in this run",
        "5 of its arrays differ",
    ):
        assert line in str(refusal.value)
    assert "model/layers/mlp" not in str(refusal.value)


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    save(tmp_path, 1)
    target = {**abstract(tree(1)), "extra": {str(i): jax.ShapeDtypeStruct((i,), jnp.float32) for i in range(40)}}
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints, pytest.raises(Refused, match="40 of its arrays") as refusal:
        checkpoints.restore(1, target)
    assert len(str(refusal.value).splitlines()) == 13
    assert "and 30 more" in str(refusal.value)


def test_remote_folder_is_refused() -> None:
    with pytest.raises(Refused, match="gs://bucket/run"):
        Checkpointer("gs://bucket/run", schema.Checkpoint())


def test_orbax_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("absl").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        save(tmp_path, 1)
        restored(tmp_path, 1)
    assert [record for record in caplog.records if record.name == "absl"] == []


# -------------------------------------------------------------------------------------------------------------- damage


def flip(folder: Path) -> None:
    content = bytearray(data_file(folder).read_bytes())
    content[len(content) // 2] ^= 4
    data_file(folder).write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip, "has changed: expected"),
    "truncated": (lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes()[:-1]), "has changed: expected"),
    "missing file": (lambda folder: data_file(folder).unlink(), "is missing"),
    "record": (lambda folder: (folder / "record.json").write_text("{}"), "record.json has changed"),
    "deleted manifest": (lambda folder: (folder / MANIFEST).unlink(), "incomplete"),
    "corrupted manifest": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json itself is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_and_the_one_before_taken_until_the_step_is_saved_again(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 10, 20)
    cause, words = DAMAGE[kind]
    cause(tmp_path / "20")
    lines: list[str] = []
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        assert checkpoints.newest_good(lines.append) == 10
        checkpoints.save(20, tree(20), {})
    (line,) = lines
    assert line.startswith(f"skipping the checkpoint {tmp_path}/20: ")
    assert words in line
    assert newest(tmp_path) == (20, [])
    assert_same(restored(tmp_path, 20), tree(20))
    assert_same(restored(tmp_path, 10), tree(10))


@pytest.mark.parametrize("place", [".DS_Store", "evaluation.json", "arrays/core"])
def test_a_file_too_many_is_told_and_no_damage(tmp_path: Path, place: str) -> None:
    save(tmp_path, 10, 20)
    (tmp_path / "20" / place).touch()
    step, (line,) = newest(tmp_path)
    assert step == 20
    assert line == f"not of the checkpoint {tmp_path}/20, and left alone: {place}"
    assert_same(restored(tmp_path, 20), tree(20))
    save(tmp_path, 30)
    assert saved(tmp_path) == ["20", "30"]


def test_what_is_damaged_is_renamed_and_never_overwritten(tmp_path: Path) -> None:
    for time in range(3):
        save(tmp_path, 20)
        flip(tmp_path / "20")
        with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
            assert checkpoints.newest_good(lambda line: None) is None
            assert checkpoints.traces() == [20]
            checkpoints.save(20, tree(time), {})
    assert saved(tmp_path) == ["20", "20.damaged", "20.damaged-1", "20.damaged-2"]
    assert newest(tmp_path) == (20, [])


def test_each_complete_checkpoint_is_announced(tmp_path: Path) -> None:
    steps: list[int] = []
    with Checkpointer(str(tmp_path), schema.Checkpoint(keep_last=1), steps.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), {"step": step})
    assert steps == [1, 2]
    assert newest_meta(tmp_path) == {"step": 2}
    (tmp_path / "2" / "record.json").write_text("{}")
    assert newest_meta(tmp_path) is None


def test_all_damaged(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    flip(tmp_path / "10")
    flip(tmp_path / "20")
    step, lines = newest(tmp_path)
    assert step is None
    assert len(lines) == 2


def test_looking_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    flip(tmp_path / "20")
    (tmp_path / "30.new").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    step, lines = newest(tmp_path)
    assert (step, len(lines)) == (10, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------- retention


def test_newest_and_multiples_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_last=2, keep_every=3)
    assert saved(tmp_path) == ["3", "6", "7"]


def test_best_is_kept_also_after_a_resume(tmp_path: Path) -> None:
    cfg = schema.Checkpoint(keep_last=1, best="eval/a/loss")
    for losses in ({1: 3.0, 2: float("nan"), 3: 1.0}, {4: 2.0, 5: None}, {6: 1.5}):
        with Checkpointer(str(tmp_path), cfg) as checkpoints:
            for step, loss in losses.items():
                checkpoints.save(step, tree(step), {}, None if loss is None else {"eval/a/loss": loss, "eval/b/loss": -step})
    assert saved(tmp_path) == ["3", "6"]
    with Checkpointer(str(tmp_path), cfg) as checkpoints:
        checkpoints.save(7, tree(7), {}, {"eval/a/loss": 0.5})
    assert saved(tmp_path) == ["7"]


def test_damaged_newer_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep_last=3)
    flip(tmp_path / "20")
    flip(tmp_path / "30")
    with Checkpointer(str(tmp_path), schema.Checkpoint(keep_last=2)) as checkpoints:
        assert checkpoints.newest_good(lambda line: None) == 10
        checkpoints.save(12, tree(12), {})
    assert saved(tmp_path) == ["10", "12", "20.damaged", "30.damaged"]
    assert newest(tmp_path) == (12, [])


def test_good_newer_ones_stay_and_do_not_push_out_either(tmp_path: Path) -> None:
    save(tmp_path, 20, 30)
    save(tmp_path, 1, 2, 3)
    assert saved(tmp_path) == ["2", "20", "3", "30"]


def test_saving_a_step_twice_replaces_it(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        checkpoints.save(1, tree(7), {"try": 1})
        checkpoints.save(1, tree(1), {"try": 2})
        checkpoints.wait()
        assert checkpoints.read_meta(1) == {"try": 2}
    assert saved(tmp_path) == ["1"]
    assert_same(restored(tmp_path, 1), tree(1))
