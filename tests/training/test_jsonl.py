"""metrics.jsonl: what is damaged in it is named and left out, what was written is known by its hash."""

import json

import pytest

from maxtrain.config import schema
from maxtrain.training.metrics import Jsonl


def rows(*steps, **more):
    return [{"step": step, "loss": 1.0 / step, **more} for step in steps]


def write(folder, found):
    sink = Jsonl(str(folder), schema.Metrics(), 9)
    for row in found:
        sink.write(row)
    return sink


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_measure_is_that_of_the_file_also_after_a_rewind(tmp_path):
    sink = write(tmp_path, rows(1, 2, 3))
    known = sink.measure()
    for row in rows(4, 5):
        sink.write(row)
    sink.close()
    sink = write(tmp_path, [])
    assert sink.rewind(3, known) == []
    assert sink.measure() == known
    assert steps(tmp_path) == [1, 2, 3]
    sink.write(*rows(4))
    assert sink.measure()["size"] == (tmp_path / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize(
    "line", [b"\xff\n", b'{"step": 2, "lo\n', b"[1]\n", b'{"loss": 2.0}\n', b'{"step": true}\n', b"[" * 100_000 + b"\n"]
)
def test_damaged_lines_are_left_out_by_number_and_the_file_kept(tmp_path, line):
    write(tmp_path, rows(1, 2, 3)).close()
    first, _, *rest = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([first, line, *rest]))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    sink = write(tmp_path, [])
    damaged, missing = sink.rewind(3)
    assert damaged == "metrics.jsonl: damaged lines are left out: 2; the file as it was: metrics.jsonl.damaged"
    assert missing == "metrics.jsonl: the rows of these steps are missing: 2 to 2"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert steps(tmp_path) == [1, 3]


def test_another_number_is_known_by_the_hash(tmp_path):
    sink = write(tmp_path, rows(1, 2, 3))
    known = sink.measure()
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace("0.5", "0.6"))
    (line,) = write(tmp_path, []).rewind(3, known)
    assert "has changed since step 3 was saved" in line
    assert (tmp_path / "metrics.jsonl.damaged").exists()


def test_a_gap_is_told_once(tmp_path):
    write(tmp_path, rows(1, 4, 5)).close()
    sink = write(tmp_path, [])
    (line,) = sink.rewind(7)
    assert line == "metrics.jsonl: the rows of these steps are missing: 2 to 3, 6 to 7"
    sink.write({"step": 7, "event": line})
    assert sink.rewind(7) == []


def test_a_line_cut_short_by_a_kill_is_no_damage(tmp_path):
    write(tmp_path, rows(1, 2)).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert write(tmp_path, []).rewind(2) == []
    assert steps(tmp_path) == [1, 2]
