"""Data sheets by the names that devices go by; the peak of a CPU, remembered where that is possible."""

import json
from types import SimpleNamespace

import jax
import pytest

from maxtrain.training import hardware


@pytest.mark.parametrize("text", [None, "[1, 2]", '{"a": "b"}', '{"a": []}', "{", "5"])
def test_a_cache_that_cannot_be_used_does_not_matter(tmp_path, monkeypatch, text):
    monkeypatch.setattr(hardware, "measure", lambda device: 0.5)
    cache = tmp_path / "home" / "peak.json"
    if text is None:
        (tmp_path / "home").write_text("a file where the folder should be")  # as root, rights alone stop nothing
    else:
        cache.parent.mkdir()
        cache.write_text(text)
    assert hardware.peak_tflops(jax.devices()[0], "float32", str(cache)) == 0.5 / jax.local_device_count()
    assert text is None or 0.5 in json.loads(cache.read_text()).values()


def test_nothing_is_remembered_where_the_home_folder_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "measure", lambda device: 0.5)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    assert hardware.peak_tflops(jax.devices()[0], "float32") == 0.5 / jax.local_device_count()
    assert not list(tmp_path.iterdir())


def test_the_best_measurement_counts(tmp_path, monkeypatch):
    for found, best in ((0.5, 0.5), (0.8, 0.8), (0.2, 0.8)):
        monkeypatch.setattr(hardware, "measure", lambda device, found=found: found)
        assert hardware.peak_tflops(jax.devices()[0], "float32", str(tmp_path / "peak.json")) == best / jax.local_device_count()


@pytest.mark.parametrize(
    ("kind", "compute", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "float32", 459 / 6),
        ("NVIDIA H1000", "bfloat16", None),
    ],
)
def test_a_device_is_found_by_whole_words_of_its_name(kind, compute, peak):
    assert hardware.peak_tflops(SimpleNamespace(platform="gpu", device_kind=kind), compute) == peak


def test_the_memory_of_a_card_is_its_own():
    sizes = {kind: hardware.chip(SimpleNamespace(device_kind=kind)).memory for kind in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB")}
    assert list(sizes.values()) == [40, 80]
