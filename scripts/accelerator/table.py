"""The result of a check as Markdown, for docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Line = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """Tables of what was checked and measured, the device named above them."""
    lines = [(process["part"], line) for process in result["processes"] for line in process["records"]]
    tables = [title(result, lines), checks(lines), training(lines), serving(lines), facts(lines, result)]
    return "\n".join("\n".join(each) + "\n" for each in tables if each)


def title(result: Mapping[str, Any], lines: list[tuple[str, Line]]) -> list[str]:
    """What ran, on what."""
    machine = result["machine"]
    jax = next((line for _, line in lines if line["name"] == "jax"), {})
    torch = next((line for _, line in lines if line["name"] == "torch"), None)
    size = " (toy sizes, which say nothing about speed)" if result["smoke"] else ""
    card = f"{jax.get('device', 'no device')}, {machine['nvidia'] or jax.get('platform', '')}"
    packages = f"Python {machine['python']}, jax {jax.get('jax')}, {jax.get('backend')}"
    packages += f", torch {torch['torch']} and transformers {torch['transformers']}" if torch else ""
    heading = [f"### {card}{size}", "", f"{packages}; {machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:12]}."]
    memory, product = (_measure(lines, name) for name in ("memory", "bfloat16 product"))
    if memory and product:
        heading.append(f"Measured: memory {memory['gb_per_s']:,.0f} GB/s, a bfloat16 product {product['tflops']:,.1f} TFLOP/s.")
    return heading


def checks(lines: list[tuple[str, Line]]) -> list[str]:
    """What was compared."""
    rows = [
        (line["name"], _short(line["difference"]), _short(line["most"]), "yes" if line["right"] else "**no**")
        for line in _of(lines, "check")
    ]
    return list(_table(("compared", "difference", "allowed", "right"), rows))


def training(lines: list[tuple[str, Line]]) -> list[str]:
    """What trains how fast."""
    rows = []
    for line in _of(lines, "measure"):
        if "step_seconds" in line:
            peak = line["peak_gib"] if line["peak_gib"] is not None else line.get("compiled_gib")
            batch = f"{line['batch']}, {line['remat']}" if "remat" in line else str(line["batch"])
            cells = (f"{line['tokens_per_s']:,.0f}", _short(line.get("tflops")), _share(line.get("mfu")), _short(peak))
            rows.append((line["name"], batch, *cells, _short(line.get("estimate_gib")), _short(line["compile_seconds"])))
    head = ("training", "batch, remat", "tokens/s", "TFLOP/s", "MFU", "peak, GiB", "estimate, GiB", "compile, s")
    return list(_table(head, rows))


def serving(lines: list[tuple[str, Line]]) -> list[str]:
    """What generates how fast, and the starts."""
    rows = []
    for line in _of(lines, "measure"):
        if "bandwidth_share" in line:
            cells = (f"{line['tokens_per_s']:,.0f}", _share(line["bandwidth_share"]), f"{line['first_token_seconds']:.3f}")
            rows.append((line["name"], *cells, f"{1000 * line['between_tokens_seconds']:.2f}"))
    found = list(_table(("generating", "tokens/s", "of the bandwidth", "first token, s", "between tokens, ms"), rows))
    starts = [f"{kind} start {line['seconds']:.1f} s" for kind in ("cold", "warm") if (line := _measure(lines, f"{kind} start"))]
    return [*found, "", f"Engine: {', '.join(starts)}."] if starts else found


def facts(lines: list[tuple[str, Line]], result: Mapping[str, Any]) -> list[str]:
    """What was not to be had, and what went wrong."""
    found = [f"* {part}: {line['name']}: {line['text']}" for part, line in lines if line["kind"] == "fact"]
    found += [f"* **wrong** in {each['where']}: {each['text'].strip().splitlines()[-1]}" for each in result["problems"]]
    return found


def _of(lines: list[tuple[str, Line]], kind: str) -> Iterator[Line]:
    return (line for _, line in lines if line["kind"] == kind)


def _measure(lines: list[tuple[str, Line]], name: str) -> Line | None:
    return next((line for line in _of(lines, "measure") if line["name"] == name), None)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if rows:
        yield from (f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
