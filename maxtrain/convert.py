"""Exchange models with others: `python -m maxtrain.convert from-hf DIR OUT`, `to-hf RUN DIR`, `from-gguf FILE OUT`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from maxtrain.config import cli
from maxtrain.config.cli import Arguments
from maxtrain.config.errors import Refused
from maxtrain.config.keys import did_you_mean
from maxtrain.config.paths import expand

USAGE = """python -m maxtrain.convert VERB FROM OUT [section.key=value ...]
       from-hf DIR OUT     a folder of Hugging Face's (config.json, safetensors) to a run that train, evaluate and decode open
       from-gguf FILE OUT  a GGUF file to such a run
       to-hf RUN DIR       the newest checkpoint of a run, or <run>/checkpoints/<step>, to a folder of Hugging Face's"""
OPTIONS = {
    "family": "to-hf: the model_type to write; by default the first that describes the model.",
    "around": "to-hf: a folder with images or sound around the same language model (Gemma 3, Mistral 3): all else in it is written too.",
    "dtype": "to-hf: format of the weights, float32, bfloat16 or float16; by default the one they are kept in.",
}


def _one(arguments: Arguments, name: str, allowed: Sequence[str] = ()) -> str | None:
    given = cli.one(arguments, name)
    if given is not None and allowed and given not in allowed:
        raise Refused(f"--{name} {given}: write one of {', '.join(allowed)}")
    return given


def _import(opener: str) -> Callable[[str, str, Arguments, Sequence[str]], str]:
    def run(source: str, out: str, arguments: Arguments, overrides: Sequence[str]) -> str:
        if any(arguments.options.values()):
            raise Refused(
                "--family, --around and --dtype are for to-hf; the format of an imported model is set by precision.params=bfloat16"
            )
        from maxtrain.checkpoint import gguf, huggingface
        from maxtrain.training import pretrained

        ignore, overrides = pretrained.ignored_fields(overrides)
        found = huggingface.Folder(source, ignore) if opener == "from-hf" else gguf.File(source, ignore)
        pretrained.import_model(found, out, overrides)
        count = sum(math.prod(shape) for shape in found.shapes.values())
        return f"{out}: {found.family.model_type}, {count:,} numbers in {len(found.shapes)} tensors"

    return run


def _export(source: str, out: str, arguments: Arguments, overrides: Sequence[str]) -> str:
    from maxtrain.checkpoint import huggingface
    from maxtrain.training import pretrained

    ignore, overrides = pretrained.ignored_fields(overrides)
    if overrides:
        raise Refused(f"{overrides[0]}: to-hf takes no config keys: the model is written as it is")
    dtype = _one(arguments, "dtype", ("float32", "bfloat16", "float16"))
    family, around = _one(arguments, "family"), _one(arguments, "around")
    outer = None if around is None else huggingface.Folder(expand(around, "--around"), ignore)
    config = pretrained.export_model(source, out, family=family, dtype=dtype, around=outer)
    return f"{out}: {config['model_type']} in {config['dtype']}"


VERBS = {"from-hf": _import("from-hf"), "from-gguf": _import("from-gguf"), "to-hf": _export}


def main(argv: Sequence[str]) -> int:
    """Do what the verb says; the output appears complete or not at all."""
    arguments = cli.parse(
        argv, usage=USAGE, options=OPTIONS, positional="VERB with its two paths", overrides=False, assignments=True, positionals=3
    )
    verb, named = arguments.words[0], arguments.words
    if verb not in VERBS:
        raise Refused(f"{verb!r} is no verb{did_you_mean(verb, list(VERBS))}: allowed are {', '.join(VERBS)}")
    if len(named) < 3:
        raise Refused(f"{verb} needs two paths, FROM and OUT\nusage: {USAGE}")
    print(VERBS[verb](named[1], named[2], arguments, arguments.overrides))
    return 0


if __name__ == "__main__":
    cli.run(main)
