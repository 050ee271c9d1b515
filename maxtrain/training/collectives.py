"""What devices send each other in a step, read from the text of a compiled program.

The text is XLA's, for TPU with its own forms: a reduce-scatter is a fusion named `all-reduce-scatter`, an asynchronous collective is
repeated in each fusion that it runs beside, and loops do not say how often they turn. Bytes are those a device sends in a ring.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

SENT = {  # part of the whole array that a device of a group of n sends
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}  # bytes of formats whose name does not say
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which it moves data."""
    network: str
    """`ICI` within a slice, `DCN` between slices."""
    size: float
    """Bytes of the whole array: gathered, or before it is scattered."""
    sent: float
    """Bytes that a device sends each time."""
    runs: int
    """How often it runs in a step."""
    group: int
    """Devices that take part together."""
    rings: int = 1
    """Axes of the torus along which those lie."""


class _Instruction(NamedTuple):
    name: str
    result: str
    opcode: str
    rest: str


def read(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """The collectives of a compiled program for a mesh."""
    computations = _computations(text)
    runs = _runs(computations)
    slices = np.array([getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat])
    apart = tuple(axis for dim, axis in enumerate(mesh.axis_names) if np.any(np.diff(slices.reshape(mesh.devices.shape), axis=dim)))
    found, seen = [], set()
    for name, count in runs.items():
        for item in computations[name][1]:
            between, several = _between_slices(item), int(slices.max()) + 1
            if between is not None and several > 1:
                size = _size(item, between, 1)
                found.append(Collective(between, apart, "DCN", size, size * SENT[between](several), count, several))
            kind = item.opcode.removesuffix("-start")
            if kind not in SENT:
                continue
            chain, channel = re.search(r'chain_id="(\d+)"', item.rest), re.search(r"channel_id=(\d+)", item.rest)
            key = (kind, item.result.split("{")[0], chain[1], channel and channel[1]) if chain else (name, item.name)
            if key in seen:
                continue
            seen.add(key)
            group = _group(item.rest, mesh.size)
            if len(group) > 1:
                scattered = name.startswith("all-reduce-scatter")
                size = _size(item, kind, len(group))
                if kind == "ragged-all-to-all":  # one side has room for more than comes
                    rows = item.rest.partition(",")[0].lstrip("%")
                    size = min(size, *(_size(given, kind, len(group)) for given in computations[name][1] if given.name == rows))
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                network = "DCN" if len(set(slices[group])) > 1 else "ICI"
                sent, rings = size * SENT[kind](len(group)), _rings(mesh.devices.reshape(-1), group)
                found.append(Collective(kind, _axes(group, mesh), network, size, sent, count, len(group), rings))
    return found


def _rings(devices: np.ndarray, group: Sequence[int]) -> int:
    """Along how many axes of the torus the devices of a group lie."""
    places = [getattr(devices[place], "coords", None) or (0,) for place in group]
    return max(1, sum(len(set(along)) > 1 for along in zip(*places, strict=True)))


def _between_slices(item: _Instruction) -> str | None:
    """The kind of a collective that hosts carry between slices, told by its sending half."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', item.rest) if item.opcode == "send" else None
    kind = found[1].lower().replace("_", "-") if found else None
    return kind if kind in SENT else None


def total(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...], str], tuple[int, float]]:
    """By kind, mesh axes and network: how many run in a step, and the bytes that a device sends."""
    sums: dict[tuple[str, tuple[str, ...], str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for item in collectives:
        key = item.kind, item.axes, item.network
        sums[key] = sums[key][0] + item.runs, sums[key][1] + item.sent * item.runs
    return dict(sorted(sums.items(), key=lambda pair: -pair[1][1]))


# ---------------------------------------------------------------------------------------------------- the text


def _computations(text: str) -> dict[str, tuple[bool, list[_Instruction]]]:
    """By name: whether it is the entry, and its instructions."""
    found: dict[str, tuple[bool, list[_Instruction]]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = []
            found[header[1]] = line.startswith("ENTRY"), current
        elif match := INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return found


def _called(item: _Instruction) -> Iterator[str]:
    for names in CALLED.findall(item.rest):
        yield from re.findall(r"[\w.\-]+", names)


def _runs(computations: dict[str, tuple[bool, list[_Instruction]]]) -> dict[str, int]:
    """How often each computation runs in a step; every branch of a condition counts as taken."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for item in computations[name][1]:
            turns = _turns(item, computations) if item.opcode == "while" else 1
            for called in _called(item):
                if called in computations:
                    visit(called, times * turns)

    visit(next(name for name, (entry, _) in computations.items() if entry), 1)
    return dict(runs)


def _turns(loop: _Instruction, computations: dict[str, tuple[bool, list[_Instruction]]]) -> int:
    """How often a loop turns: what XLA knows, else the number that its condition compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    pending, numbers = [condition[1]] if condition else [], [1]
    while pending:
        for item in computations[pending.pop()][1]:
            number = re.match(r"(\d+)\)", item.rest)
            if item.opcode == "constant" and item.result.startswith(("s32[]", "u32[]", "s64[]")) and number:
                numbers.append(int(number[1]))
            pending += [called for called in _called(item) if called in computations]
    return -(-max(numbers) // _step(loop, computations))


def _step(loop: _Instruction, computations: dict[str, tuple[bool, list[_Instruction]]]) -> int:
    """How much a loop's counter grows in a turn: a product that is unrolled by two counts by two."""
    condition, body = (computations[name][1] for name in re.findall(r"(?:condition|body)=%?([\w.\-]+)", loop.rest)[:2])
    compared = next((item for item in condition if item.opcode == "compare"), None)
    counter = re.search(r"index=(\d+)", _named(compared, 0, condition).rest) if compared else None
    grown = _named(body[-1], int(counter[1]), body) if counter else None
    found = re.match(r"(\d+)\)", _named(grown, 1, body).rest) if grown and grown.opcode == "add" else None
    return int(found[1]) if found else 1


def _named(item: _Instruction, operand: int, instructions: Sequence[_Instruction]) -> _Instruction:
    """The instruction that makes an operand of another; the other itself if it is not among them."""
    names = re.findall(r"%([\w.\-]+)", item.rest)
    return next((made for made in instructions if names[operand : operand + 1] == [made.name]), item)


def _size(item: _Instruction, kind: str, group: int) -> float:
    """Bytes of the whole array, from the type of the result."""
    arrays = [(WIDTHS.get(f) or int(re.findall(r"\d+", f)[0]) / 8, [int(n) for n in dims.split(",") if n]) for f, dims in _arrays(item)]
    size = float(sum(width * np.prod(dims, dtype=float) for width, dims in arrays))
    if item.opcode == "all-gather-start":  # operands and results
        return size * group / (group + 1)
    if item.opcode == "collective-permute-start":
        return size / 2
    return size * group if kind == "reduce-scatter" else size


def _arrays(item: _Instruction) -> list[tuple[str, str]]:
    counters = item.opcode.endswith("-start") or item.opcode == "send"  # u32[] beside the arrays
    return [found for found in ARRAY.findall(item.result) if not (counters and found == ("u32", ""))]


def _group(rest: str, num_devices: int) -> list[int]:
    """The devices of the first group, as places in the flat mesh; two neighbours for a permutation."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?[,\s]", rest)
    if pairs:
        moves = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", pairs[1])]
        return list(next((move for move in moves if move[0] != move[1]), moves[0][:1]))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if tiled:
        return _iota(tiled[2], tiled[3]).reshape(_numbers(tiled[1]))[0].tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", rest)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = (_iota(named[2], named[3]) if named[2] else np.arange(num_devices)).reshape([int(n) for n in axes.values()])
        chosen = re.findall(r"'(\w+)'", named[4])
        return ids[tuple(slice(None) if axis in chosen else 0 for axis in axes)].reshape(-1).tolist()
    return list(range(num_devices))  # no groups: all


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _axes(group: Sequence[int], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(list(group), mesh.devices.shape))
    return tuple(axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1)
