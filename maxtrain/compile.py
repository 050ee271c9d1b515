"""Compile a config for TPUs that are not here: `python -m maxtrain.compile config.yml topology=v5p:4x4x8 section.key=value ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config import Refused, cli

USAGE = "python -m maxtrain.compile [CONFIG.yml] topology=GENERATION:CHIPS [slices=N] [decode=true] [--plan] [section.key=value ...]"
OPTIONS = {
    "topology": "The slice to compile for: generation and chips along each axis of its torus, such as v5e:4x4 or v5p:4x4x8.",
    "slices": "How many such slices there are, joined by the data-centre network; 1 if not given.",
    "decode": "`true` compiles the step that generates tokens instead of the one that trains.",
}
FLAGS = {"plan": "Search mesh, rematerialisation and microbatches for the fastest that fit, and compile the best."}


def main(argv: Sequence[str]) -> int:
    """Print a report; 0 if the program fits the devices, 1 if it does not."""
    words = [f"--{word}" if word.partition("=")[0] in OPTIONS and "=" in word else word for word in argv]
    arguments = cli.parse(words, usage=USAGE, flags=FLAGS, options=OPTIONS)
    topology, slices, decode = _options(arguments.options)
    config = cli.load_config(arguments)
    from maxtrain.training import compilation, planner, pretrained  # jax only from here on
    from maxtrain.training.topology import GENERATIONS, OPEN_RINGS, devices_of

    devices = devices_of(topology, slices)
    name = topology if slices == 1 else f"{slices} x {topology}"
    config, _ = pretrained.settle(config, save=False)
    if decode or arguments.flags["plan"]:
        text, fits = (_decode if decode else planner.report)(config, devices, name)
        print(text)
        return 0 if fits else 1
    made = compilation.program(config, devices)
    done = compilation.compiled(made.lower_step(), made.layout.mesh)
    print(compilation.report(made, done, name))
    if slices > 1 and GENERATIONS[topology.partition(":")[0]].cubes:
        print(OPEN_RINGS)
    if done.missing is not None:
        print(planner.advice(config, devices))
    return 0 if done.missing is None else 1


def _decode(config: Any, devices: Sequence[Any], name: str) -> tuple[str, bool]:
    """The report on the step that gives every running request its next token, and whether it fits."""
    from maxtrain.models import flops
    from maxtrain.parallel import mesh as meshes
    from maxtrain.parallel.sharding import Layout
    from maxtrain.serving.programs import Programs
    from maxtrain.training import compilation
    from maxtrain.training.dry_run import bytes_per_device

    mesh = meshes.make_mesh(config.mesh, devices)
    chip, resolved = compilation.chip_of(devices[0]), meshes.resolve(config, mesh)
    if resolved.serve.memory_gib is None:
        memory = resolved.serve.model_copy(update={"memory_gib": chip.memory / 4})
        resolved = resolved.model_copy(update={"serve": memory})
    programs = Programs(resolved, Layout(mesh, resolved.mesh.rules), resolved.model.vocab_size)
    shape = max((shape for shape in programs.shapes if not shape.num_blocks), default=programs.shapes[-1])
    (lowered,) = programs.lower([shape])
    done = compilation.compiled(lowered, mesh)
    weights, cache = bytes_per_device(programs.weights), bytes_per_device((programs.spec.caches, programs.spec.ahead))
    pages = f"{programs.num_pages:,} pages of {programs.serve.page_size} tokens"
    head = f"{name}: {mesh.size} devices; {shape.num_rows} requests a step, {pages}; compiled in {done.seconds:.0f} s"
    parts: list[Any] = [head, compilation.memory_table({"weights": weights, "cache": cache}, done, chip)]
    if done.missing is not None:
        return compilation.text(*parts, f"It does not fit: {done.missing}"), False
    work = sum(flops.forward(resolved.model, programs.max_length).values()) * shape.num_rows / mesh.size / chip.tflops / 1e12
    seconds = {"products": work, "weights and a full cache from memory": (weights + cache) / chip.bandwidth / 1e9}
    seconds["collectives"] = sum(compilation.network_seconds(item, chip) for item in done.traffic)
    step = max(work, seconds["weights and a full cache from memory"]) + seconds["collectives"]
    table = compilation.table("Roofline of a step", "what", "figure")
    for what, value in seconds.items():
        table.add_row(f"{what}, ms", f"{1e3 * value:,.3f}")
    table.add_row("step at best, ms", f"{1e3 * step:,.3f}")
    table.add_row("tokens/s at most", f"{shape.num_rows / step:,.0f}")
    return compilation.text(*parts, compilation.traffic_table(done.traffic, chip), table, compilation.ASSUMED), True


def _options(options: Mapping[str, list[str]]) -> tuple[str, int, bool]:
    last = {name: values[-1] for name, values in options.items() if values}
    if "topology" not in last:
        raise Refused("topology is missing: name the slice to compile for, such as topology=v5e:4x4")
    if not last.get("slices", "1").isdecimal():
        raise Refused(f"slices={last['slices']}: a number is expected")
    if last.get("decode", "false") not in ("true", "false"):
        raise Refused(f"decode={last['decode']}: true or false is expected")
    return last["topology"], int(last.get("slices", "1")), last.get("decode") == "true"


if __name__ == "__main__":
    cli.run(main)
