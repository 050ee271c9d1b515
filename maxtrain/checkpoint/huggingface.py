"""Folders in Hugging Face's format: config.json, safetensors in one file or several with an index, the tokenizer's files."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maxtrain.checkpoint import safetensors, weights
from maxtrain.checkpoint.safetensors import Tensor
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data import tokenizer_files
from maxtrain.data.tokenizer import load_saved
from maxtrain.models import families
from maxtrain.models.families import Family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5_000_000_000


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
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of the tensor from the shape of the one with the numbers."""
    scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of the factors from the same."""
    dequantise: Callable[..., np.ndarray]


QUANTISATIONS: Mapping[str, Quantisation] = {
    "fp8": Quantisation(("", "_scale_inv"), lambda s: s, lambda s: tuple(math.ceil(n / 128) for n in s), _block_fp8),
    "mxfp4": Quantisation(("_blocks", "_scales"), lambda s: (*s[:-3], 32 * s[-2], s[-3]), lambda s: s[:-1], _mxfp4),
}


def _quantisation(config: Mapping[str, Any], place: str) -> Quantisation | None:
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else section
    if not isinstance(method, str) or method not in QUANTISATIONS:
        raise Refused(
            f"{place}: quantization_config.quant_method = {method!r} is not supported: allowed are {', '.join(QUANTISATIONS)}; "
            "take the model's unquantised weights"
        )
    if method == "fp8" and list(section.get("weight_block_size") or ()) != [128, 128]:
        raise Refused(
            f"{place}: quantization_config.weight_block_size = {section.get('weight_block_size')!r}: only [128, 128] is supported"
        )
    return QUANTISATIONS[method]


# --------------------------------------------------------------------------------------------------------- reading


class Folder:
    """A folder to import from (see `weights.Weights`). Opening it reads headers only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            Refused: a file is missing, damaged, pickled or points outside the folder; the model is not supported.
        """
        self.path, self.place = Path(path), os.fspath(path)
        self.config = read_json(self.path / "config.json")
        cited = str(self.path / "config.json")
        self.family: Family = families.of_config(self.config, cited)
        self.model: schema.Model = self.family.model(self.config, cited)
        self._files = _tensors(self.path)
        if self.model.mtp and not any(name in self._files for name in _ahead(self.family, self.model)):
            self.model = self.model.model_copy(update={"mtp": None})  # transformers saves its field without the weights
        self._parts: dict[str, tuple[Quantisation, list[Tensor]]] = {}
        quantisation = _quantisation(self.config, cited)
        if quantisation is not None:
            self._pair(quantisation)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **{name: tensor.shape for name, tensor in self._files.items()},
            **{name: found.shape(parts[0].shape) for name, (found, parts) in self._parts.items()},
        }
        odd = [name for name, tensor in self._files.items() if tensor.dtype.name not in ("float64", "float32", "bfloat16", "float16")]
        if odd:
            raise Refused(
                f"{self.place}: {odd[0]} is of the format {self._files[odd[0]].dtype.name}, which its config.json does not explain"
            )

    def _pair(self, quantisation: Quantisation) -> None:
        """Take the parts of quantised tensors together."""
        main, scale = quantisation.endings
        for name in [name.removesuffix(scale) for name in self._files if name.endswith(scale)]:
            if name + main not in self._files:
                raise Refused(f"{self.place}: {name + scale} is there without {name + main}")
            parts = [self._files.pop(name + ending) for ending in quantisation.endings]
            if parts[1].shape != quantisation.scale_shape(parts[0].shape):
                raise Refused(f"{self.place}: {name + scale} is {list(parts[1].shape)}, which does not go with {list(parts[0].shape)}")
            self._parts[name] = quantisation, parts

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32 if it is quantised."""
        if name in self._parts:
            quantisation, parts = self._parts[name]
            return quantisation.dequantise(*(part.read() for part in parts))
        return self._files[name].read()

    def save_tokenizer(self, folder: str) -> bool:
        """Copy the tokenizer's files."""
        return copy_tokenizer(self.path, folder)


def _ahead(family: Family, model: schema.Model) -> Iterator[str]:
    """The tensors of multi-token prediction."""
    return (name for row in family.rows(model) if row.ours[0].startswith("mtp/") for form in row.forms for name in form.names)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `Refused` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error}): download or export it again") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: an object is expected, not {type(value).__name__}")
    return value


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return safetensors.read_header(folder / SINGLE)
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise Refused(
                f"{folder / pickles[0]}: pickled weights can run code when they are read and are not opened: "
                f"take the model's safetensors, or load it in transformers and save_pretrained"
            )
        raise Refused(f"{folder}: no weights are here: {SINGLE} or {INDEX} is expected")
    where = read_json(folder / INDEX).get("weight_map")
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
    return {name: headers[file][name] for name, file in where.items()}


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
) -> dict[str, Any]:
    """Write config.json and weights, a tensor at a time, into a folder that exists; returns the config.

    Args:
        folder: where to.
        model: the model's section.
        read: gives the array of a parameter by its unrolled name.
        dtype: format of the weights.
        family: model type of the config; the first that fits when None.
        shard_bytes: most bytes of a file, but for a single tensor that is larger.

    Raises:
        Refused: no family of Hugging Face describes this model.
    """
    chosen, config = families.of_model(model, family)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    shapes = weights.saved_shapes(model, chosen)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        if files[-1] and filled + size > shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    names = [SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    tensors = weights.save(model, chosen, read)
    for name, part in zip(names, files, strict=True):
        safetensors.write(os.path.join(folder, name), part, kind, (next(tensors) for _ in part))
    if len(files) > 1:
        where = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
        total = sum(math.prod(shape) for shape in shapes.values()) * kind.itemsize
        Path(folder, INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    config = {**config, "dtype": dtype}
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))
    return config
