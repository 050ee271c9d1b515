"""Run tasks of EleutherAI's lm-evaluation-harness in process: `python -m maxtrain.harness MODEL --tasks NAME` (extra `[eval]`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maxtrain.config import cli
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand

if TYPE_CHECKING:
    from maxtrain.data.tokenizer import Tokenizer
    from maxtrain.serving.api import LLM

USAGE = """python -m maxtrain.harness MODEL --tasks NAME[,NAME ...] [--include FOLDER] [--limit N] [--out FILE] [section.key=value ...]

MODEL as for maxtrain.decode; keys of the sections serve, mesh and precision may be set."""
OPTIONS = {
    "tasks": "Names of tasks, with commas between them; may be given several times.",
    "include": "A folder with task files (YAML) of your own.",
    "shots": "Examples before each question; what the task says, if it is not given.",
    "limit": "Most questions of each task; all, if it is not given.",
    "out": "A file for the results as JSON.",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def harness_model(llm: LLM) -> Any:
    """The model as lm-evaluation-harness takes it: `lm_eval.simple_evaluate(model=harness_model(llm), tasks=[...])`.

    Raises:
        Refused: the package lm-eval is not installed, or the model has no tokenizer.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise Refused(f"lm-evaluation-harness is not installed ({error}): pip install 'maxtrain[eval]'") from None
    from maxtrain.config.serving import SamplingParams

    if llm.tokenizer is None:
        raise Refused("tasks are texts, but the model has no tokenizer")
    tokenizer: Tokenizer = llm.tokenizer

    class HarnessModel(TemplateLM):
        """The three questions of the harness, each answered for all requests at once."""

        tokenizer_name, eot_token_id, prefix_token_id = tokenizer.fingerprint, tokenizer.eos_id, tokenizer.bos_id
        max_length = llm.engine.max_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [int(i) for i in tokenizer.encode(string)] if add_special_tokens is False else tokenizer.encode_prompt(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return llm.pair(context, continuation)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            scores = llm.score([context for _, context, _ in requests], [rest for _, _, rest in requests], progress=not disable_tqdm)
            for score in scores:
                if score.error is not None:
                    raise Refused(score.error)
            return [(score.logprob, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = []
            for index, request in enumerate(requests):
                tokens = [int(i) for i in tokenizer.encode(request.args[0])]
                cut = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
                windows += [(index, *utils.make_disjoint_window(pair)) for pair in cut]
            sums = [0.0] * len(requests)
            found = self._loglikelihood_tokens([(("", ""), context, rest) for _, context, rest in windows], disable_tqdm)
            for (index, _, _), (value, _) in zip(windows, found, strict=True):
                sums[index] += value
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            prompts, params = [], []
            for request in requests:
                context, asked = request.args
                until, most = asked.get("until") or (), int(asked.get("max_gen_toks", 256))
                most = min(most, self.max_length - 1)
                prompts.append(self.tok_encode(context)[-(self.max_length - most) :])
                sampled = bool(asked.get("do_sample", asked.get("temperature", 0) > 0))
                chosen = {name: asked[name] for name in SAMPLING if name in asked} if sampled else {"temperature": 0.0}
                params.append(SamplingParams(stop=until, max_tokens=most, **chosen))
            return [output.text for output in llm.generate(prompts, params, progress=not disable_tqdm)]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            raise Refused("tasks are asked as plain text: leave apply_chat_template out")

    return HarnessModel()


def main(argv: Sequence[str]) -> int:
    """Print the results of the tasks, and write them if asked."""
    arguments = cli.parse(argv, usage=USAGE, options=OPTIONS, positional="MODEL", overrides=False, assignments=True)
    tasks = [name for names in arguments.options["tasks"] for name in names.split(",") if name]
    limit, shots = (cli.number(arguments, name, int, minimum=0) for name in ("limit", "shots"))
    out, include = cli.one(arguments, "out"), cli.one(arguments, "include")
    include = None if include is None else expand(include, "--include")
    if not tasks:
        raise Refused(f"no --tasks are given\nusage: {USAGE}")
    file = None if out is None else cli.open_output(out, "a")
    from maxtrain.llm import LLM

    model = harness_model(LLM(arguments.config, overrides=arguments.overrides))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise Refused(f"--tasks {unknown[0]}: no such task; --include FOLDER adds your own")
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=shots)
    print(make_table(results))
    if file is not None:
        file.truncate(0)
        json.dump(results["results"], file, indent=2, default=str)
        file.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
