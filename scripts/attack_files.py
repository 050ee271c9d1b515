"""Attacks on model files: each is damaged at random and read; it loads or is refused by name, in time and in bounded memory."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "mixtral", "deepseek-v3", "gpt-oss", "gemma3", "qwen2-moe", "phi3", "command-r7b", "smollm3", "glm4.5")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**6, 2**31, 2**63, 10**30, 10**400, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "full_attention", "silu", "\x00", "\ud800", "9" * 5000),
    *([], [None], [0], [[1]], [1e308] * 3, ["x"] * 10, {}, {"": 1}, {"a": {"a": 1}}),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def change_json(value: Any, draws: random.Random) -> Any:
    """JSON with one to three values replaced, removed, moved, wrapped or added."""
    value = copy.deepcopy(value)
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        *path, name = draws.choice(list(places(value)) or [("x",)])
        part = value
        for step in path:
            part = part[step]
        kind = draws.randrange(8)
        if kind == 0:
            part.pop(name, None) if isinstance(part, dict) else part.pop(name)
        elif kind == 1 and isinstance(part, dict):
            part[draws.choice(("x", "", "rope_scaling", "text_config", str(name) + "_"))] = part.pop(name, None)
        elif kind == 2:
            part[name] = [part[name]] if draws.random() < 0.5 else {"x": part[name]}
        elif kind == 3 and isinstance(part[name], int | float):
            part[name] = draws.choice((-part[name], part[name] * 2, part[name] + 1, str(part[name]), float(part[name]), part[name] * 1000))
        elif kind == 4:
            other = value
            for step in draws.choice(list(places(value))):
                other = other[step]
            part[name] = copy.deepcopy(other)
        else:
            part[name] = copy.deepcopy(draws.choice(ODD))
    return value


def change_bytes(data: bytes, draws: random.Random, within: int) -> bytes:
    """Bytes with one change, mostly among the first `within`."""
    found, end = bytearray(data), max(1, min(within if draws.random() < 0.8 else len(data), len(data)))
    at = draws.randrange(end)
    kind = draws.randrange(7)
    if kind == 0:
        return bytes(found[:at])
    if kind == 1:
        found[at : at + 8] = struct.pack("<Q", draws.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, len(data))))
    elif kind == 2:
        found[at : at + 4] = struct.pack("<I", draws.choice((0, 1, 6, 8, 9, 10, 12, 13, 2**31, 2**32 - 1)))
    elif kind == 3:
        found[at:at] = draws.randbytes(draws.randint(1, 40))
    elif kind == 4:
        del found[at : at + draws.randint(1, 40)]
    elif kind == 5:
        found[at : at + 16] = bytes(16)
    elif found:
        for _ in range(draws.choice((1, 1, 3, 20))):
            found[draws.randrange(end) % len(found)] ^= 1 << draws.randrange(8)
    return bytes(found)


def misplace(path: pathlib.Path, draws: random.Random) -> None:
    """Put something else in the place of a file."""
    data = path.read_bytes()
    path.unlink()
    kind = draws.randrange(9)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind in (2, 3):
        path.symlink_to(("/dev/zero", path.name)[kind - 2])
    elif kind in (4, 5, 6, 7):
        path.write_bytes((b"", b"[" * 200_000, b"\xff\xfe" + data, data + data)[kind - 4])


def change_file(path: pathlib.Path, draws: random.Random) -> None:
    """Damage one file of a model."""
    data, length = path.read_bytes(), 0
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
    if draws.random() < 0.1:
        misplace(path, draws)
    elif draws.random() < 0.25 or path.suffix not in (".json", ".safetensors"):
        path.write_bytes(change_bytes(data, draws, 8 + length if length else 4096))
    else:
        text = json.dumps(change_json(json.loads(data[8 : 8 + length] if length else data), draws)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] if length else text)


def make_folders(top: pathlib.Path) -> None:
    """A small folder of each of some families, in one file or several."""
    from maxtrain.checkpoint import huggingface
    from maxtrain.config import load

    for index, name in enumerate(FAMILIES):
        section = load(ROOT / "configs" / "models" / f"{name}-tiny.yml").config.model
        small = section.model_copy(update={"vocab_size": 64, "max_length": 64})
        (top / name).mkdir()
        huggingface.write(top / name, small, arrays_of(small), shard_bytes=60_000 if index % 2 else 10**9)


def arrays_of(model: Any) -> Callable[[str], Any]:
    """The parameters of a model by name, all with the same numbers."""
    import numpy as np

    from maxtrain.checkpoint import weights

    shapes = weights.parameter_shapes(model)
    return lambda name: np.full(shapes[name], 0.25, np.float32)


def read_all(found: Any) -> None:
    """Check a model against its table and read every tensor of it."""
    from maxtrain.checkpoint import weights

    for row, form in weights.check(found):
        form.transform.load([found.read(name) for name in form.names])
        for name in row.copies:
            if name in found.shapes:
                found.equal(name, form.names[0])


def attack_folder(top: pathlib.Path, draws: random.Random) -> str:
    """Damage a folder and read all of it."""
    from maxtrain.checkpoint import huggingface

    folder = top / "item"
    shutil.copytree(top / draws.choice(FAMILIES), folder)
    file = folder / "config.json" if draws.random() < 0.5 else draws.choice(sorted(folder.iterdir()))
    change_file(file, draws)
    read_all(huggingface.Folder(folder))
    return file.name


def make_gguf(top: pathlib.Path) -> None:
    """Small GGUF files, plain and with experts."""
    sys.path.insert(0, str(ROOT / "tests" / "checkpoint"))
    import folders

    for name, model, kind in (("dense", folders.MODEL, "Q8_0"), ("mixture", folders.MIXTURE, "F32")):
        folders.make_gguf(top / f"{name}.gguf", model, kind=kind)


def attack_gguf(top: pathlib.Path, draws: random.Random) -> str:
    """Damage a GGUF file, its bytes or the values of its keys, and read all of it."""
    from maxtrain.checkpoint import gguf, gguf_header

    source, path = top / draws.choice(("dense.gguf", "mixture.gguf")), top / "item"
    if draws.random() < 0.5:
        shutil.copyfile(source, path)
        if draws.random() < 0.05:
            misplace(path, draws)
        else:
            data = path.read_bytes()
            path.write_bytes(change_bytes(data, draws, 4096))
    else:
        import gguf as library

        values, tensors = gguf_header.read(str(source), library)
        changed = [packed_text(name) + pack for name, value in change_json(values, draws).items() if (pack := packed(value)) is not None]
        start = min(tensor.start for tensor in tensors.values())
        infos = b"".join(
            packed_text(name)
            + struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape[::-1], tensor.kind, tensor.start - start)
            for name, tensor in tensors.items()
        )
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(changed)) + b"".join(changed) + infos
        path.write_bytes(header + bytes(-len(header) % 32) + source.read_bytes()[start:])
    read_all(gguf.File(path))
    return source.name


def packed_text(text: str) -> bytes:
    """A string of GGUF."""
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def packed(value: Any) -> bytes | None:
    """A value of GGUF and its type before it; None for what the format has no type for."""
    if isinstance(value, str):
        kind, data = 8, packed_text(value)
    elif isinstance(value, list) and value and all(type(item) is type(value[0]) for item in value):
        parts = [packed(item) for item in value]
        if None in parts or isinstance(value[0], list):
            return None
        kind, data = 9, parts[0][:4] + struct.pack("<Q", len(value)) + b"".join(part[4:] for part in parts)
    elif isinstance(value, bool):
        kind, data = 7, struct.pack("<?", value)
    elif isinstance(value, int) and -(2**63) <= value < 2**64:
        kind, data = (11, struct.pack("<q", value)) if value < 0 else (10, struct.pack("<Q", value))
    elif isinstance(value, float):
        kind, data = 12, struct.pack("<d", value)
    else:
        return None
    return struct.pack("<I", kind) + data


def attack_config(top: pathlib.Path, draws: random.Random) -> str:
    """Damage the config.json of a published model and read it."""
    from maxtrain.config.json_file import parse_object
    from maxtrain.models import families

    files = (ROOT / "tests" / "models" / "configs.jsonl").read_text().splitlines()
    file = json.loads(draws.choice(files))
    if draws.random() < 0.3:
        file["config"] = {"model_type": "mistral3", "text_config": file["config"], "vision_config": {}}
    data = json.dumps(change_json(file["config"], draws)).encode()
    families.read(parse_object(change_bytes(data, draws, len(data)) if draws.random() < 0.2 else data, "config.json"), "config.json")
    return file["name"]


PARTS = {  # what is made once, what makes an item, seconds that an item may take
    "folders": (make_folders, attack_folder, 30.0),
    "gguf": (make_gguf, attack_gguf, 30.0),
    "configs": (lambda top: None, attack_config, 30.0),
}
