"""Train a model: `python -m maxtrain.train config.yml section.key=value ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from maxtrain.parallel import peers
from maxtrain.training import signals

STOP = signals.StopSignal(leaves=True)
if __name__ == "__main__":
    STOP.__enter__()  # before the imports, which take seconds

from maxtrain.config import cli  # noqa: E402

USAGE = "python -m maxtrain.train [CONFIG.yml] [section.key=value ...]"
FLAGS = {"dry-run": "Print parameters, operations, bytes per device and the layout of every array; run no step."}


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; 0 when done, 75 when stopped by a signal and resumable, 1 when it diverged or could not be saved.

    The process ends by itself with 76 when another process of the run is lost, and with 130 at a second signal.
    """
    arguments = cli.parse(argv, usage=USAGE, flags=FLAGS)
    config = cli.load_config(arguments)
    from maxtrain.llm import probes  # jax only from here on
    from maxtrain.training import dry_run, loop

    if arguments.flags["dry-run"]:
        print(dry_run.report(config))
        return 0
    try:
        loop.Trainer(config, hooks=probes(config.eval)).fit(STOP if __name__ == "__main__" else None)
    except loop.Stopped:
        return signals.STOPPED
    except (loop.Diverged, OSError) as error:  # OSError: a full disk, a lost file system
        print(f"{config.run.folder}: the run cannot go on: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        cli.run(main)
    except BaseException as error:
        peers.leave_after(error)
        raise
