"""Configs that cannot be meant are refused before any work, by the field's name."""

import pytest

from configs import dense121, incepres2
from cxa_jax.config_checks import CHOICES, RANGES, check_config
from cxa_jax.errors import UserError


def test_the_defaults_and_every_variant_pass():
    presets = ("phantom_quick", "phantom_hour", "research", "nih_128", "nih_128,torch_recipe,gap")
    for variant in ("", "gap", "gap_mlp", *presets):
        check_config(dense121.get_config(variant), min_size=32)


@pytest.mark.parametrize("name", CHOICES)
def test_misspelt_choices(name):
    config = dense121.get_config()
    config.update_from_flattened_dict({name: "balnced"})
    with pytest.raises(UserError, match=f"config.{name}='balnced' is not one of"):
        check_config(config, min_size=32)


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range(name):
    low, high = RANGES[name]
    for value in [low - 1, *([] if high is None else [high + max(1, high / 10)])]:
        config = dense121.get_config()
        section, _, field = name.rpartition(".")
        node = config[section] if section else config
        node[field] = type(node[field])(value)
        with pytest.raises(UserError, match=f"config.{name}="):
            check_config(config, min_size=32)


def test_reading_in_the_main_thread_is_no_mistake():
    config = dense121.get_config()
    config.data.num_threads = 0
    check_config(config, min_size=32)


def test_nan_rate():
    config = dense121.get_config()
    config.optimizer.learning_rate = float("nan")
    with pytest.raises(UserError, match="learning_rate=nan"):
        check_config(config, min_size=32)


def test_images_too_small_for_the_backbone():
    config = incepres2.get_config()
    config.data.image_size = 64
    with pytest.raises(UserError, match="config.data.image_size=64: inception_resnet_v2 needs at least 75 px"):
        check_config(config, min_size=75)
    config = dense121.get_config()
    config.eval.image_size = 16
    with pytest.raises(UserError, match="config.eval.image_size=16"):
        check_config(config, min_size=32)


def test_a_penalty_on_attention_needs_attention():
    config = dense121.get_config("gap")
    config.train.attention_negative_weight = 0.1
    with pytest.raises(UserError, match="attention_negative_weight=0.1 needs attention.*pooling='gap' has none"):
        check_config(config, min_size=32)
    config.model.pooling = "amm"
    check_config(config, min_size=32)


@pytest.mark.parametrize(("field", "value"), [("strata", "view"), ("num_negatives", 9), ("positives_repeated", 2)])
def test_what_belongs_to_balanced_epochs_is_not_ignored_in_others(field, value):
    config = dense121.get_config()
    config.data[field] = value
    with pytest.raises(UserError, match=f"config.data.{field}={value!r} needs --config.data.sampling=balanced"):
        check_config(config, min_size=32)
    config.data.sampling = "balanced"
    check_config(config, min_size=32)
