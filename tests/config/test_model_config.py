import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from v4_ascend.config.model import DERIVED, NAMES, ModelConfig
from v4_ascend.config.presets import preset_names, preset_path
from v4_ascend.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"
FLASH = json.loads((DATA / "v4_flash_config.json").read_text())
SPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro", "v4_flash_0731"])
def test_published_configs_are_read_whole_and_written_back(name):
    config = ModelConfig.read(DATA / f"{name}_config.json")
    assert config.unknown_keys == ()
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(("name", "kinds"), [("v4_flash", (2, 21, 20)), ("v4_pro", (0, 30, 31))])
def test_layer_kinds(name, kinds):
    config = ModelConfig.read(DATA / f"{name}_config.json")
    of = [config.kind(n) for n in range(config.n_layers)]
    assert (of.count("swa"), of.count("csa"), of.count("hca")) == kinds


def test_trap_t48_trailing_mtp_entries_of_later_configs_are_one_per_layer():
    config = ModelConfig.read(DATA / "v4_flash_0731_config.json")
    assert len(config.compress_ratios) == 46
    assert (config.n_mtp_layers, config.n_draft_layers) == (1, 3)
    assert config.dspark.target_layer_ids == (40, 41, 42)


@pytest.mark.parametrize("n_listed", [43, 44, 46, 50])
def test_dsparks_stages_are_swa_however_many_entries_there_are(n_listed):
    raw = json.loads((DATA / "v4_flash_0731_config.json").read_text())
    raw["compress_ratios"] = [*raw["compress_ratios"][:43], *[0] * (n_listed - 43)]
    config = ModelConfig.from_hf(raw)
    assert config.compress_ratios[43:] == (0, 0, 0)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_trap_t59_ratio_4_is_csa_and_128_is_hca():
    config = ModelConfig.from_hf(FLASH)
    assert [config.kind(n) for n in range(4)] == ["swa", "swa", "csa", "hca"]


def test_experts_are_fp4_where_the_april_config_does_not_say():
    assert "expert_dtype" not in FLASH
    assert ModelConfig.from_hf(FLASH).expert_dtype == "fp4"


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_models(name):
    assert ModelConfig.read(preset_path(name)).unknown_keys == ()


def without(key):
    return {k: v for k, v in FLASH.items() if k != key}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (FLASH | {"model_type": "deepseek_v41"}, "'deepseek_v41'; supported: 'deepseek_v4'"),
        (without("model_type"), "model_type is None"),
        (FLASH | {"compress_ratios": [0, 4]}, r"has 2 entries, must have one per layer: 44"),
        (FLASH | {"compress_ratios": [0, 2] + [4] * 41 + [0]}, r"has \[2\], must be 0, 4 or 128"),
        (FLASH | {"compress_ratios": [4] * 44}, "layers that draft must be 0"),
        (without("compress_ratios"), "no compress_ratios"),
        (without("hidden_size"), "hidden_size is missing"),
        (FLASH | {"o_groups": 7}, r"o_groups \(7\) must divide n_heads \(64\)"),
        (FLASH | {"qk_rope_head_dim": 63}, r"rope_head_dim \(63\) must be even"),
        (FLASH | {"num_experts_per_tok": 300}, r"\(300\) must not exceed n_routed_experts \(256\)"),
        (FLASH | {"hidden_size": "big"}, "hidden_size must be a valid integer.* got 'big'"),
        (FLASH | {"hidden_size": 0}, "hidden_size must be greater than .* 1, got 0"),
        (FLASH | {"rms_norm_eps": -1.0}, "rms_norm_eps must be greater than 0, got -1.0"),
        (FLASH | {"num_hidden_layers": "x"}, "num_hidden_layers must be a valid integer"),
        (FLASH | {"num_nextn_predict_layers": None}, "num_nextn_predict_layers must be"),
        (FLASH | {"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        (FLASH | {"quantization_config": "fp8"}, "quantization_config must be an object"),
        (FLASH | {"moe_intermediate_size": 96}, r"moe_inter_dim \(96\) must be a multiple of 128"),
        (FLASH | {"dspark_block_size": 5}, "dspark_noise_token_id is missing"),
        (FLASH | {"dspark_size": 5}, "dspark_.* is missing"),
        (FLASH | SPARK | {"dspark_target_layer_ids": [42, 41]}, r"\[42, 41\] must be ascending"),
        (
            FLASH | SPARK | {"dspark_target_layer_ids": [43]},
            r"\[43\] must be below n_layers",
        ),
        (FLASH | SPARK | {"dspark_noise_token_id": 129280}, r"\(129280\) must be below vocab_size"),
        (FLASH | {"tie_word_embeddings": True}, "tie_word_embeddings is True, V4 has False"),
        (FLASH | {"scoring_func": "softmax"}, "scoring_func must be .* got 'softmax'"),
        (FLASH | {"torch_dtype": "float16"}, "torch_dtype is 'float16'"),
        (FLASH | {"quantization_config": {"quant_method": "gptq"}}, "'gptq' in blocks of None"),
        (FLASH | {"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear'"),
    ],
)
def test_a_wrong_config_is_refused_with_the_numbers(raw, says):
    with pytest.raises(ConfigError, match=says):
        ModelConfig.from_hf(raw)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.sampled_from(sorted(NAMES.keys() | DERIVED)), ANYTHING)
def test_any_value_of_any_key_is_read_or_refused(key, value):
    with suppress(ConfigError):
        ModelConfig.from_hf(FLASH | {key: value})


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    """What AutoConfig writes after reading the published Flash config."""
    folder = tmp_path_factory.mktemp("saved")
    AutoConfig.from_pretrained(DATA / "v4_flash_config.json").save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_a_config_saved_by_transformers_is_the_same_model(saved_by_transformers):
    assert "compress_ratios" not in saved_by_transformers
    assert ModelConfig.from_hf(saved_by_transformers) == ModelConfig.from_hf(FLASH)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of sliding_attention"),
        ({"layer_types": None}, "layer_types must be a list of sliding_attention"),
        ({"mlp_layer_types": ["moe", "hash_moe"]}, "every hash_moe before every moe"),
        ({"mlp_layer_types": 3}, "mlp_layer_types must be a list"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_parameters must have main and compress"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be"),
        ({"layer_types": ["sliding_attention"]}, r"has 2 entries, must have one per layer: 44"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_saved_config_is_refused(saved_by_transformers, changes, says):
    with pytest.raises(ConfigError, match=says):
        ModelConfig.from_hf(saved_by_transformers | changes)


def test_v41_is_refused_by_name():
    with pytest.raises(ConfigError, match="supported: 'deepseek_v4'"):
        ModelConfig.read(DATA / "v41_flash_config.json")


def test_unknown_keys_are_kept_to_be_reported():
    assert ModelConfig.from_hf(FLASH | {"n_heads": 3}).unknown_keys == ("n_heads",)


def test_a_missing_file_says_which(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.read(tmp_path)
