"""Every preset has its published number of parameters, and needs no flag besides its file."""

import pathlib

import pytest

from maxtrain.config import load, schema
from maxtrain.models.decoder import Decoder
from maxtrain.parallel.sharding import parameter_table

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"
PUBLISHED = {  # from the models' own configurations and cards
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


def count(path):
    cfg = load(path).config.model.model_copy(update={"layers": "scan"})
    table = parameter_table(Decoder(cfg, schema.Precision(compute="bfloat16"), schema.Remat()))
    return sum(parameter.size for parameter in table.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    assert count(FOLDER / f"{name}.yml") == PUBLISHED[name]


def test_every_preset_is_checked():
    assert {path.stem for path in FOLDER.glob("*.yml") if not path.stem.endswith("-tiny")} == set(PUBLISHED)
