"""Folders in Hugging Face's format: config.json, safetensors in one file or several with an index, the tokenizer's files."""

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maxtrain.checkpoint import safetensors, weights
from maxtrain.checkpoint.safetensors import Tensor
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.json_file import read_object
from maxtrain.data import tokenizer_files
from maxtrain.data.tokenizer import load_saved
from maxtrain.models import families
from maxtrain.models.families import Family, wrapper
from maxtrain.models.families.family import function
from maxtrain.models.families.rows import EMBEDDING, HEAD

LOG = logging.getLogger("maxtrain")
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5_000_000_000
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of images and sound in wrappers


# ------------------------------------------------------------------------------------------------------ quantised


def _block_fp8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """DeepSeek-V3: float8 [out, in], and a factor for every block of 128 x 128."""
    width = weight.shape[1]
    values = weight.astype(np.float32)
    for row in range(scale.shape[0]):  # in place: the whole table of factors would be as large as the weight
        lines = values[128 * row : 128 * (row + 1)]
        lines *= np.repeat(scale[row].astype(np.float32), 128)[:width]
    return values


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """GPT-OSS: [expert, out, in / 32, 16] bytes of two numbers, low half first, and an exponent for each 32; -> [expert, in, out]."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., 0::2] = FP4[blocks & 15]
    values[..., 1::2] = FP4[blocks >> 4]
    np.ldexp(values, scales.astype(np.int32)[..., None] - 127, out=values)
    return values.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


class Quantisation(NamedTuple):
    """How one method keeps a tensor: as several, told by their endings; what they stand for."""

    endings: tuple[str, ...]
    """Added to the tensor's own name, first the ending of the tensor with the numbers."""
    formats: tuple[Collection[str], Collection[str]]
    """What the numbers and their factors may be kept as."""
    num_dims: int
    """Least dims of the numbers."""
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of the tensor from the shape of the one with the numbers."""
    scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of the factors from the same."""
    dequantise: Callable[..., np.ndarray]


FLOATS, FLOAT8 = ("float64", "float32", "bfloat16", "float16"), ("float8_e4m3fn", "float8_e5m2")
QUANTISATIONS: Mapping[str, Quantisation] = {
    "fp8": Quantisation(("", "_scale_inv"), (FLOAT8, FLOATS), 2, lambda s: s, lambda s: tuple(math.ceil(n / 128) for n in s), _block_fp8),
    "mxfp4": Quantisation(
        ("_blocks", "_scales"), (("uint8",), ("uint8",)), 4, lambda s: (*s[:-3], 32 * s[-2], s[-3]), lambda s: s[:-1], _mxfp4
    ),
}


def _quantisation(config: Mapping[str, Any], place: str) -> Quantisation | None:
    """How a folder's weights are quantised; None if they are not; `Refused` for a way that is not supported, with what the file says."""
    section, remedy = config.get("quantization_config"), "take the model's unquantised weights"
    if section is None or section == {}:
        return None
    if not isinstance(section, dict) or not isinstance(section.get("quant_method"), str):
        raise Refused(f"{place}: quantization_config = {section!r:.300}: it names no quant_method, so the weights cannot be read; {remedy}")
    method, block = section["quant_method"], section.get("weight_block_size")
    if method not in QUANTISATIONS:
        allowed = ", ".join(QUANTISATIONS)
        raise Refused(f"{place}: quantization_config.quant_method = {method!r:.100} is not supported: allowed are {allowed}; {remedy}")
    if method == "fp8" and block != [128, 128]:
        kind = "one factor for each tensor" if block is None else "only [128, 128]"
        raise Refused(
            f"{place}: quantization_config.weight_block_size = {block!r:.100}: {kind} is {'not ' * (block is None)}supported; {remedy}"
        )
    return QUANTISATIONS[method]


# --------------------------------------------------------------------------------------------------------- reading


class Folder:
    """A folder to import from (see `weights.Weights`). Opening it reads headers only."""

    def __init__(self, path: str | os.PathLike[str], ignore: Collection[str] = ()) -> None:
        """
        Args:
            path: the folder.
            ignore: fields of its config.json to take as absent (`model.ignore_fields`).

        Raises:
            Refused: a file is missing, damaged, pickled or points outside the folder; the model is not supported.
        """
        self.path, self.place = Path(path), os.fspath(path)
        cited = str(self.path / "config.json")
        self.config = read_object(cited)
        self.family, self.model = families.read(self.config, cited, ignore)
        self._files = _tensors(self.path)
        self._tell_other_weights()
        self.names: wrapper.Names | None = None  # of the language model's tensors in a wrapper
        self.others: dict[str, Tensor] = {}
        weights.check_counts(self.model, [tensor.shape for tensor in self._files.values()], self.place)
        if wrapper.section_of(self.config) is not None:
            self._unwrap()
        if self.model.mtp and not any(name in self._files for name in _ahead(self.family, self.model)):
            self.model = self.model.model_copy(update={"mtp": None})  # transformers saves its field without the weights
        if self.model.mtp is None:
            self._leave_out_predictors()
        self._parts: dict[str, tuple[Quantisation, list[Tensor]]] = {}
        quantisation = _quantisation(wrapper.language_model(self.config, cited), cited)
        if quantisation is not None:
            self._pair(quantisation)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **{name: tensor.shape for name, tensor in self._files.items()},
            **{name: found.shape(parts[0].shape) for name, (found, parts) in self._parts.items()},
        }
        odd = [name for name, tensor in self._files.items() if tensor.dtype.name not in FLOATS]
        if odd:
            raise Refused(
                f"{self.place}: {odd[0]} is of the format {self._files[odd[0]].dtype.name}, which its config.json does not explain"
            )
        if weights.untied(self):
            LOG.warning(f"{self.place}: {HEAD} is not {EMBEDDING}, as tie_word_embeddings says: it is taken as a head of its own")
            self.model = self.model.model_copy(update={"tie_embeddings": False})

    def _tell_other_weights(self) -> None:
        """Refuse an adapter, which changes what the model computes, and tell weights that are not read."""
        if (self.path / ADAPTER).exists():
            raise Refused(f"{self.path / ADAPTER}: an adapter (LoRA) belongs to this model: merge it into the weights, or remove its files")
        read = {os.path.basename(tensor.path) for tensor in self._files.values()}
        kinds = ("*.safetensors", "*.gguf", *PICKLES)
        others = sorted({path.name for kind in kinds for path in self.path.glob(kind)} - read)
        if others:
            LOG.warning(f"{self.place}: weights that are not read: {', '.join(others)}")

    def _unwrap(self) -> None:
        """Take the language model's tensors alone, and tell which others there are."""
        self.names = wrapper.names_among(self._files, self.place)
        inner = {name: self.names.inner(name) for name in self._files}
        self.others = {name: tensor for name, tensor in self._files.items() if inner[name] is None}
        self._files = {own: self._files[name] for name, own in inner.items() if own is not None}
        if self.others:
            parts = Counter(map(_beginning, self.others))
            told = ", ".join(f"{count} of {name}" for name, count in sorted(parts.items()))
            LOG.warning(
                f"{self.place}: of this {self.config.get('model_type')} the language model is read; left out are the tensors {told}"
            )

    def check_inside(self, model: schema.Model) -> wrapper.Names:
        """What this wrapper calls the tensors of its language model; `Refused` if there is none, or it is not of the kind of `model`."""
        if self.names is None:
            raise Refused(f"{self.place}: it is no wrapper around a language model: there is nothing to write the model into")
        here, given = function(self.model), function(model)
        wrong = [key for key in here | given if here.get(key) != given.get(key) and key not in ("max_length", "tie_embeddings")]
        if wrong:
            lines = [f"  {key}: {given.get(key)!r:.100} in the model, {here.get(key)!r:.100} here" for key in wrong]
            raise Refused(f"{self.place}: the language model in it is another one:\n" + "\n".join(lines))
        return self.names

    def _leave_out_predictors(self) -> None:
        """Leave out, and tell, layers of multi-token prediction behind the last where the config says that there are none."""
        behind = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in self._files}
        layers = {int(found[1]) for found in behind.values() if found and int(found[1]) >= self.model.num_layers}
        layers = {layer for layer in layers if f"model.layers.{layer}.enorm.weight" in self._files}  # which other layers do not have
        others = [name for name, found in behind.items() if found and int(found[1]) in layers]
        for name in others:
            del self._files[name]
        if others:
            LOG.warning(f"{self.place}: {len(others)} tensors of multi-token prediction ({others[0]} ...) are left out, as the config says")

    def _pair(self, quantisation: Quantisation) -> None:
        """Take the parts of quantised tensors together."""
        main, scale = quantisation.endings
        for name in [name.removesuffix(scale) for name in self._files if name.endswith(scale)]:
            if name + main not in self._files:
                raise Refused(f"{self.place}: {name + scale} is there without {name + main}")
            parts = [self._files.pop(name + ending) for ending in quantisation.endings]
            odd = [part for part, kinds in zip(parts, quantisation.formats, strict=True) if part.dtype.name not in kinds]
            if odd or len(parts[0].shape) < quantisation.num_dims:
                told = ", ".join(f"{part.dtype.name} {list(part.shape)}" for part in parts)
                raise Refused(f"{self.place}: {name} is quantised in another way than its config says: {told}")
            if parts[1].shape != quantisation.scale_shape(parts[0].shape):
                raise Refused(f"{self.place}: {name + scale} is {list(parts[1].shape)}, which does not go with {list(parts[0].shape)}")
            self._parts[name] = quantisation, parts

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32 if it is quantised."""
        if name in self._parts:
            quantisation, parts = self._parts[name]
            return quantisation.dequantise(*(part.read() for part in parts))
        return self._files[name].read()

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers."""
        if name in self._parts or other in self._parts:
            return np.array_equal(self.read(name), self.read(other), equal_nan=True)
        return self._files[name].equal(self._files[other])

    def save_tokenizer(self, folder: str) -> bool:
        """Copy the tokenizer's files."""
        return copy_tokenizer(self.path, folder)


def _beginning(name: str) -> str:
    """The part of a wrapper that a tensor belongs to, by its name (`vision_tower`)."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == "model" else first


def _ahead(family: Family, model: schema.Model) -> Iterator[str]:
    """The tensors of multi-token prediction."""
    return (name for row in family.rows(model) if row.ours[0].startswith("mtp/") for form in row.forms for name in form.names)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    if not os.path.lexists(folder / INDEX):
        if os.path.lexists(folder / SINGLE):
            return safetensors.read_header(folder / SINGLE)
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise Refused(
                f"{folder / pickles[0]}: pickled weights can run code when they are read and are not opened: "
                f"take the model's safetensors, or load it in transformers and save_pretrained"
            )
        raise Refused(f"{folder}: no weights are here: {SINGLE} or {INDEX} is expected")
    where = read_object(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Refused(f"{folder / INDEX}: weight_map, the file of every tensor, is missing or malformed")
    headers = dict[str, dict[str, Tensor]]()
    for file in sorted(set(where.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise Refused(f"{folder / INDEX}: it points to {file!r}, outside its folder: files are named without a path")
        if not file.endswith(".safetensors"):
            raise Refused(f"{folder / INDEX}: it points to {file!r}, which is no safetensors file: pickled weights are not opened")
        headers[file] = safetensors.read_header(folder / file)
    lost = [name for name, file in where.items() if name not in headers[file]]
    if lost:
        raise Refused(f"{folder / where[lost[0]]}: {lost[0]} is not in it, though {INDEX} says so: download the file again")
    if (folder / SINGLE).exists() and SINGLE not in headers:
        raise Refused(f"{folder}: {SINGLE} and {INDEX} are both here, for two sets of weights: remove the one that does not count")
    found = {name: headers[file][name] for name, file in where.items()}
    for file, tensors in headers.items():
        for name, tensor in tensors.items():  # those too that the index does not name
            first = found.setdefault(name, tensor)
            if first is not tensor and (first.shape != tensor.shape or not first.equal(tensor)):
                raise Refused(f"{folder / file}: {name} is in {os.path.basename(first.path)} too, with other numbers: remove one of them")
    return found


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
    """Write the tokenizer of one folder into another, with its chat template and the end tokens that config.json names.

    SentencePiece's form is converted. Returns False where there is none.

    Raises:
        Refused: it must be converted, and the packages for that are not installed.
    """
    files = [name for name in ("tokenizer.json", *tokenizer_files.BESIDE) if os.path.isfile(os.path.join(source, name))]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(files):
        return False
    if "tokenizer.json" in files:
        load_saved(source).save(target)
        return True
    with tempfile.TemporaryDirectory() as folder:
        for name in {*files, "config.json"} & set(os.listdir(source)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
        try:
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(os.fspath(source)).backend_tokenizer
        except Exception as error:  # whatever is missing or unknown there
            raise Refused(
                f"{source}: its tokenizer is not in tokenizer.json and could not be converted ({type(error).__name__}: {error}): "
                "pip install 'maxtrain[hf]', or save it with transformers as a fast tokenizer"
            ) from None
        backend.save(os.path.join(folder, "tokenizer.json"))
        load_saved(folder).save(target)
    return True


# --------------------------------------------------------------------------------------------------------- writing


def write(
    folder: str | os.PathLike[str],
    model: schema.Model,
    read: Callable[[str], Any],
    *,
    dtype: str = "float32",
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    around: Folder | None = None,
) -> dict[str, Any]:
    """Write config.json and weights, a tensor at a time, into a folder that exists; returns the config.

    Args:
        folder: where to.
        model: the model's section.
        read: gives the array of a parameter by its unrolled name.
        dtype: format of the weights.
        family: model type of the config; the first that fits when None.
        shard_bytes: most bytes of a file, but for a single tensor that is larger.
        around: a wrapper whose language model this one replaces; all else that is in it is written too, as it is.

    Raises:
        Refused: no family of Hugging Face describes this model; or it is not the one that the wrapper holds.
    """
    chosen, config = families.of_model(model, family if around is None else around.family.model_type)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    shapes, tensors = weights.saved_shapes(model, chosen), weights.save(model, chosen, read)
    kinds = dict.fromkeys(shapes, kind)
    config = {**config, "dtype": dtype}
    if around is not None:
        names = around.check_inside(model)
        shapes = {names.outer(name): shape for name, shape in shapes.items()} | {name: t.shape for name, t in around.others.items()}
        kinds = dict.fromkeys(shapes, kind) | {name: tensor.dtype for name, tensor in around.others.items()}
        inner, others = tensors, around.others
        tensors = chain(((names.outer(name), array) for name, array in inner), ((name, tensor.read()) for name, tensor in others.items()))
        config = wrapper.wrapped(around.config, config)
        for name in PROCESSORS:
            if (around.path / name).is_file():
                shutil.copyfile(around.path / name, os.path.join(folder, name))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kinds[name].itemsize
        if files[-1] and filled + size > shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    paths = [SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, part in zip(paths, files, strict=True):
        safetensors.write(os.path.join(folder, name), part, kinds, (next(tensors) for _ in part))
    if len(files) > 1:
        where = {tensor: name for name, part in zip(paths, files, strict=True) for tensor in part}
        total = sum(math.prod(shape) * kinds[name].itemsize for name, shape in shapes.items())
        Path(folder, INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))
    return config
