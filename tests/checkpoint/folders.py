"""Tiny models in Hugging Face's format and as GGUF, with random weights, made without torch."""

import json

import numpy as np

from maxtrain.checkpoint import huggingface, weights
from maxtrain.config import schema

MODEL = schema.Model(vocab_size=259, embed=32, mlp=48, num_layers=3, num_heads=4, num_kv_heads=2, max_length=64, norm_eps=1e-5)
MIXTURE = schema.Model(
    vocab_size=259,
    embed=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_length=64,
    tie_embeddings=False,
    moe=schema.Moe(num_experts=4, experts_per_token=2, mlp=16),
    slots={"layer": schema.Slot(feed_forward="moe")},
)


def parameters(model, seed=0):
    """Random arrays by unrolled name."""
    draws = np.random.default_rng(seed)
    return {name: draws.normal(size=shape).astype(np.float32) for name, shape in weights.parameter_shapes(model).items()}


def make_folder(folder, model=MODEL, seed=0, **options):
    """A folder of Hugging Face's; returns the parameters in it."""
    folder.mkdir(parents=True)
    arrays = parameters(model, seed)
    huggingface.write(folder, model, arrays.__getitem__, **options)
    return arrays


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path, change):
    """Rewrite a safetensors header in place, its data untouched."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


SCALES = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}  # where a block keeps its float16 factors


def random_blocks(kind, shape, draws):
    """Random blocks of a K-quantisation, which the library cannot make: bytes for an array of this shape."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = draws.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        factors = draws.uniform(1e-4, 1e-3, raw.shape[:-1]).astype(np.float16)
        raw[..., [place, place + 1]] = factors[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def make_gguf(path, model=MODEL, seed=0, kind="F32", arrays=None):
    """A GGUF file of llama.cpp's `llama` architecture with the given parameters or random ones, which are returned."""
    import gguf

    from maxtrain.models import families

    arrays = parameters(model, seed) if arrays is None else arrays
    family, _ = families.of_model(model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(model.vocab_size)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_length)
    writer.add_embedding_length(model.embed)
    writer.add_feed_forward_length(model.mlp if model.moe is None else model.moe.mlp)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope.theta)
    writer.add_rope_dimension_count(model.head_width)
    if model.moe is not None:
        writer.add_expert_count(model.moe.num_experts)
        writer.add_expert_used_count(model.moe.experts_per_token)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.num_layers)
    kinds = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}
    stacks = {}
    for name, array in weights.save(model, family, arrays.__getitem__):
        heads = kinds.get(name.split(".")[-2])
        if heads:  # as llama.cpp's converter does: halves of a head become neighbours
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        before, expert, after = name.partition(".experts.")
        if expert:
            stacks.setdefault(before + ".experts" + after[after.index(".") :], []).append(array)
        else:
            stacks[name] = array
    for name, array in stacks.items():
        array = np.ascontiguousarray(np.stack(array) if isinstance(array, list) else array)
        chosen = kind if array.ndim > 1 and array.shape[-1] % 32 == 0 else "F32"
        type_ = gguf.GGMLQuantizationType[chosen]
        if chosen in SCALES:
            packed = random_blocks(chosen, array.shape, np.random.default_rng(len(name)))
        else:
            packed = array if chosen == "F32" else gguf.quantize(array, type_)
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
