"""Every preset has its published number of parameters, and needs no flag besides its file."""

import pathlib

import pytest

from maxtrain.config import load, schema
from maxtrain.models import families
from maxtrain.models.decoder import Decoder
from maxtrain.models.families.family import function
from maxtrain.parallel.sharding import parameter_table

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"
PUBLISHED = {  # from the models' own configurations and cards
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
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
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "glm4.5": 352_797_829_024,
    "glm4.5-air": 106_852_251_264,
    "glm4.7-flash": 29_943_393_920,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "olmoe-1b-7b": 6_919_161_856,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "phi3-mini-4k": 3_821_079_552,
    "phi3.5-mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi4-mini": 3_836_021_760,
    "glm4-9b": 9_400_279_040,
    "glm4-32b": 32_566_081_536,
    "granite3.3-2b": 2_533_525_504,
    "granite3.3-8b": 8_170_835_968,
    "command-r": 34_980_831_232,
    "command-r-plus": 103_810_674_688,
    "command-r7b": 8_028_033_024,
    "smollm3-3b": 3_075_098_624,
}

AHEAD = {  # parameters of multi-token prediction, without copies of embedding and head
    "deepseek-v3": 11_610_068_224,
    "glm4.5": 358_337_791_296 - 352_797_829_024 - 2 * 151552 * 5120,  # the files hold all of it
    "glm4.5-air": 110_468_824_832 - 106_852_251_264 - 2 * 151552 * 4096,
    "glm4.7-flash": 643_706_176,
}


def count(path):
    cfg = load(path).config.model.model_copy(update={"layers": "scan"})
    table = parameter_table(Decoder(cfg, schema.Precision(compute="bfloat16"), schema.Remat()))
    ahead = sum(parameter.size for name, parameter in table.items() if name.startswith("mtp/"))
    return sum(parameter.size for parameter in table.values()) - ahead, ahead


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    """Multi-token prediction is counted apart: DeepSeek-V3's weights are given as 671B and 11.5B more for its module."""
    assert count(FOLDER / f"{name}.yml") == (PUBLISHED[name], AHEAD.get(name, 0))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yml")), ids=lambda path: path.stem)
def test_preset_is_of_a_family(path):
    """So it can be exported, the miniatures too."""
    model = load(path).config.model
    family, config = families.of_model(model)
    assert function(family.model(config)) == function(model)


def test_every_preset_is_checked():
    assert {path.stem for path in FOLDER.glob("*.yml") if not path.stem.endswith("-tiny")} == set(PUBLISHED)
