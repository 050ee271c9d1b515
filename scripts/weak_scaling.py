"""What a device sends in a step as slices grow, read from compiled programs, beside what theory says of the layout.

`python scripts/weak_scaling.py [section.key=value ...]` compiles Llama 3.2 1B with two sequences of 2,048 tokens a device for slices of
8 to 1,024 chips: fsdp within a slice, replicas across slices. Nothing is executed. A markdown table comes out, a row as soon as
it is known.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable

from maxtrain.config import load
from maxtrain.training import compilation, estimate
from maxtrain.training.collectives import Collective
from maxtrain.training.estimate import Work
from maxtrain.training.topology import devices_of

CASES = [  # topology, slices, words
    ("v5e:2x4", 1, ()),
    ("v5e:4x4", 1, ()),
    ("v5e:8x8", 1, ()),
    ("v5e:16x16", 1, ()),
    ("v5e:16x16", 2, ("mesh.dcn.data=2",)),
    ("v5e:16x16", 4, ("mesh.dcn.data=4",)),
    ("v5e:16x16", 1, ("mesh.tensor=4",)),
    ("v5p:4x4x4", 1, ()),
    ("v5p:8x8x8", 1, ()),
    ("v5p:8x8x16", 1, ()),
    ("v5p:8x8x8", 2, ("mesh.dcn.data=2",)),
]
MODEL, LENGTH, ROWS = "configs/models/llama3.2-1b.yml", 2048, 2


def sums(traffic: Iterable[Collective]) -> dict[str, float]:
    """MiB that a device sends over each network, and how much of it in all-reduces within the slice."""
    found: dict[str, float] = defaultdict(float)
    for item in traffic:
        found[item.network] += item.sent * item.runs / 2**20
        found["all-reduced"] += item.sent * item.runs / 2**20 if (item.network, item.kind) == ("ICI", "all-reduce") else 0.0
    return found


def main(words: list[str]) -> None:
    """Compile the cases one after the other."""
    columns = ["chips", "slices of", "mesh", "ICI, MiB", "of it all-reduced", "DCN, MiB", "compile, s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for topology, slices, own in CASES:
        devices, start = devices_of(topology, slices), time.perf_counter()
        basic = [f"data.length={LENGTH}", f"data.batch_size={ROWS * len(devices)}", "remat.policy=full"]
        made = compilation.program(load(MODEL, [*basic, *own, *words]).config, devices)
        done = compilation.compiled(made.lower_step(), made.layout.mesh)
        across = {"data": slices} if slices > 1 else {}
        real, theory = sums(done.traffic), sums(estimate.traffic(Work.of(made.config), made.layout, across))
        cells = [f"{real[what]:,.0f} / {theory[what]:,.0f}" for what in ("ICI", "all-reduced", "DCN")]
        mesh = ", ".join(f"{axis}={size}" for axis, size in made.layout.mesh.shape.items() if size > 1)
        row = [f"{len(devices):,}", f"{slices} x {topology}", mesh, *cells, f"{time.perf_counter() - start:.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
