"""A scheduler's plan as the arrays of a step: which token stands where, what follows it, and how the next one is drawn."""

from collections.abc import Sequence

import numpy as np

from maxtrain.config.serving import SamplingParams
from maxtrain.serving.programs import Programs
from maxtrain.serving.sampling import Rows
from maxtrain.serving.scheduler import Chunk, Request
from maxtrain.serving.step import Inputs, Shape

COLD = 1e-30  # a temperature that takes the likeliest token, because logits divided by less are no longer numbers


def arrange(plan: Sequence[Chunk], programs: Programs) -> tuple[Shape, Inputs, list[int]]:
    """The shape and the inputs of the step that computes a plan, and the row or block that each chunk begins with."""
    size = programs.serve.block
    rows = sum(1 + len(chunk.drafts) for chunk in plan if chunk.in_rows)
    blocks = sum(-(-chunk.count // size) for chunk in plan if not chunk.in_rows)
    shape = programs.shape(rows, blocks)
    inputs, places, row, block = programs.inputs(shape), list[int](), 0, 0
    for chunk in plan:
        if chunk.in_rows:
            places.append(row)
            row = _fill_rows(inputs, chunk, row, programs.serve.page_size)
        else:
            block = _fill_blocks(inputs, chunk, block, shape, programs.serve.page_size)
            places.append(block - -(-chunk.count // size))
    return shape, inputs, places


def _fill_rows(inputs: Inputs, chunk: Chunk, row: int, page_size: int) -> int:
    """The next token of a request and its drafts; returns the next free row."""
    request = chunk.request
    known = request.tokens[chunk.start] if chunk.start < len(request.tokens) else -1
    for offset, token in enumerate((known, *chunk.drafts)):
        position = chunk.start + offset
        inputs.tokens[row], inputs.positions[row] = token, position
        inputs.slots[row] = request.pages[position // page_size] * page_size + position % page_size
        inputs.row_tables[row, : len(request.pages)] = request.pages
        inputs.guessed[row] = offset > 0
        if position + 1 < len(request.tokens):
            inputs.follows[row] = request.tokens[position + 1]
        _ask(inputs, row, request, position)
        row += 1
    return row


def _fill_blocks(inputs: Inputs, chunk: Chunk, block: int, shape: Shape, page_size: int) -> int:
    """A run of known tokens; returns the next free block."""
    request, progress, size = chunk.request, chunk.request.data, shape.block
    pages, stop = np.asarray(request.pages, np.int32), chunk.start + chunk.count
    for start in range(chunk.start, stop, size):
        positions = np.arange(start, min(start + size, stop))
        place = shape.num_rows + block * size
        here = slice(place, place + len(positions))
        inputs.tokens[here] = request.tokens[start : start + len(positions)]
        inputs.positions[here] = positions
        following = request.tokens[start + 1 : start + 1 + len(positions)]
        inputs.follows[place : place + len(following)] = following
        inputs.slots[here] = pages[positions // page_size] * page_size + positions % page_size
        inputs.block_tables[block, : len(pages)] = pages
        if progress.score_from is not None:
            first, last = max(start + 1, progress.score_from), min(positions[-1] + 2, len(progress.targets))
            if first < last:
                at = block * size - start - 1
                inputs.targets[at + first : at + last] = progress.targets[first:last]
                inputs.prompt_tops[...] |= bool(request.params.prompt_logprobs)
        inputs.ends[block] = len(positions) - 1
        block += 1
    if chunk.samples:
        _ask(inputs, shape.num_rows + block - 1, request, stop - 1)
    return block


def _ask(inputs: Inputs, output: int, request: Request, position: int) -> None:
    """What the token after `position` is to be drawn with."""
    params, progress, index = request.params, request.data, position + 1 - len(request.prompt)
    inputs.owners[output], inputs.sampled[output] = request.slot, True
    asked = Rows(
        params.temperature if params.temperature > COLD else 0.0,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        progress.seed,
        index,
        index < params.min_tokens,
        is_marked(params),
        bool(params.logprobs),
    )
    for array, value in zip(inputs.rows, asked, strict=True):
        array[output] = value


def is_marked(params: SamplingParams) -> bool:
    """Whether the device needs the rows of a slot: counts of tokens, or a bias."""
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    return bool(penalised or params.logit_bias or params.allowed_token_ids is not None or params.bad_words or params.min_tokens)
