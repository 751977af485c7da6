"""Configs: the paper's settings, variants, and types that survive an override."""

import ast
import pathlib

import pytest

from configs import common, dense121

CONFIGS = pathlib.Path(common.__file__).parent


def test_defaults_are_the_papers():
    config = dense121.get_config()
    assert config.data.image_size == 224
    assert (config.train.batch_size, config.train.num_epochs) == (16, 200)
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (1e-4, 0.9)
    assert (config.optimizer.plateau_factor, config.optimizer.plateau_patience) == (0.3, 15)
    assert config.optimizer.early_stop_patience == 40
    assert (config.model.backbone, config.model.pooling, config.model.head) == ("densenet121", "amm", "mlp")
    assert not config.augment.horizontal_flip


@pytest.mark.parametrize("variant", sorted(common.VARIANTS))
def test_each_variant_changes_something_known(variant):
    plain, changed = dense121.get_config(), dense121.get_config(variant)
    assert changed.name == f"dense121-{variant}"
    assert changed != plain
    assert field_types(changed) == field_types(plain)


def field_types(config, prefix=""):
    types = {}
    for name, value in config.items():
        types |= field_types(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: type(value)}
    return types


def test_variants_combine():
    config = dense121.get_config("gap,phantom_quick")
    assert config.model.pooling == "gap" and config.data.name == "chest_phantom"


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'gab'.*gap_mlp"):
        dense121.get_config("gab")


def test_lock_refuses_unknown_fields_and_other_types():
    config = dense121.get_config().lock()
    with pytest.raises(AttributeError, match="batch_size"):
        config.train.bach_size = 3
    with pytest.raises(TypeError):
        config.train.batch_size = "many"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_configs_import_nothing_heavy(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules <= {"ml_collections", "configs"}


def test_every_field_of_the_defaults_has_a_comment():
    for line in (CONFIGS / "common.py").read_text().splitlines():
        if line.startswith(" " * 12 + '"') and not line.rstrip().endswith("{"):
            assert "#" in line, line
