"""Where rows go, and what a sink that cannot write says."""

import json
import struct

import pytest
import tensorboardX.record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from maxtrain.config import schema
from maxtrain.training.metrics import Recorder


def events(folder):
    """All events under a folder, file after file."""
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.name.rpartition(".")[2]):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def recorder(folder, *sinks):
    return Recorder(str(folder), schema.Metrics(sinks=sinks), 10, True)


def test_tensorboard_has_every_number_at_once_and_forgets_what_is_rewound(tmp_path):
    found = recorder(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        found.write({"step": step, "loss": step / 2, "eval/held/loss": float("nan"), "event": "no number"})
    written = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events(tmp_path)]
    assert [step for step, _ in written] == [0, 1, 2, 3]  # the first one begins the file
    assert written[2][1] == pytest.approx({"train/loss": 1.0, "eval/held/loss": float("nan")}, nan_ok=True)
    found.rewind(1)
    found.write({"step": 2, "loss": 7.0})
    found.close()
    marks = [(event.step, event.session_log.status) for event in events(tmp_path) if event.HasField("session_log")]
    assert marks == [(2, SessionLog.START)]
    assert [*events(tmp_path)][-1].summary.value[0].simple_value == 7.0


@pytest.mark.parametrize("sinks", [("tensorboard",), ("jsonl", "tensorboard"), ("jsonl",)])
def test_a_full_disk_is_said_with_sink_and_file_and_blocks_nothing(tmp_path, monkeypatch, sinks):
    monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    found = recorder(tmp_path, *sinks)
    with pytest.raises(OSError) as refusal:
        found.write({"step": 1, "loss": 1.0})
    for sink in sinks:
        path = tmp_path / {"jsonl": "metrics.jsonl"}.get(sink, sink)
        assert f"{sink} cannot write {path}: No space left on device" in str(refusal.value)
    found.write({"step": 2, "loss": 1.0})
    found.close()


def test_what_is_lost_in_closing_is_said(tmp_path, monkeypatch):
    found = recorder(tmp_path, "jsonl")
    found.write({"step": 1, "loss": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}

    def fail():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(found.sinks[0], "close", fail)
    with pytest.raises(OSError, match=r"jsonl cannot write .*metrics.jsonl: Input/output error"):
        found.close()
