"""The eight models: their sizes, that all of each learns, evaluation, bfloat16, what is refused, the page on them."""

import functools
import importlib
import importlib.util
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny  # noqa: F401  registers the backbone 'tiny', which is none of the eight models'
from backbone_variables import random_variables

from configs import dense121
from cxa_jax.errors import UserError
from cxa_jax.models import BACKBONES, create_model
from cxa_jax.models.cxa import check_value_range
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet
from cxa_jax.pooling import POOLINGS

ROOT = pathlib.Path(__file__).parents[1]

# Config: (trainable, statistics). Backbones as Keras counts them, plus what stands on C features.
SIZES = {
    "dense121": (6_953_856 + 269_250, 83_648 + 2_048),
    "dense121:gap": (6_953_856 + 1_025, 83_648),
    "dense201": (18_092_928 + 500_418, 229_056 + 3_840),
    "dense201:gap": (18_092_928 + 1_921, 229_056),
    "res50": (23_534_592 + 533_442, 53_120 + 4_096),
    "res50:gap": (23_534_592 + 2_049, 53_120),
    "incepres2": (54_276_192 + 401_346, 60_544 + 3_072),
    "incepres2:gap": (54_276_192 + 1_537, 60_544),
}
# Without top, trainable and statistics together, and the channels C.
KERAS_SIZES = {
    "densenet121": (7_037_504, 1024),
    "densenet201": (18_321_984, 1920),
    "resnet50": (23_587_712, 2048),
    "inception_resnet_v2": (54_336_736, 1536),
}
# Fewer layers of the same kinds, and images whose features have 2x2 cells: one cell has nothing to attend to.
REDUCED = {
    "dense121": ({"num_layers": (1, 1, 1, 1)}, 64),
    "res50": ({"num_blocks": (1, 1, 1, 1)}, 64),
    "incepres2": ({"num_blocks": (1, 1, 1)}, 107),
}
POOLED = ("amm", "gap")
BATCH = 4
# Greatest difference of a bfloat16 backbone from float32, over the greatest value; about 2.5 times what was seen.
BFLOAT16 = {
    "features": 0.03,
    "pooled": 0.03,
    "attention_logits": 0.1,
    "attention": 0.05,
    "weights": 0.05,
    "logits": 0.1,
}


def load_model_config(name):
    stem, _, variant = name.partition(":")
    return importlib.import_module(f"configs.{stem}").get_config(variant).model


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_variables(module, *shape):
    return jax.eval_shape(
        lambda x: module.init(jax.random.key(0), x, train=False), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    )


@functools.cache
def backbone_sizes(name):
    variables = abstract_variables(create_model(load_model_config(name)).backbone, 128, 128, 3)
    return count(variables["params"]), count(variables["batch_stats"])


class Given(nn.Module):
    """A backbone that returns its input, so that what stands on it is traced alone."""

    @nn.compact
    def __call__(self, images, *, train=False):
        return images


def test_no_model_is_missing():
    stems = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common"}
    assert set(SIZES) == {stem + variant for stem in stems for variant in ("", ":gap")}
    assert {load_model_config(name).backbone for name in SIZES} == set(KERAS_SIZES) == set(BACKBONES) - {"tiny"}
    reduced = {type(create_model(load_model_config(name)).backbone) for name in REDUCED}
    assert {type(BACKBONES[name]()) for name in KERAS_SIZES} == reduced


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    config = load_model_config(name)
    model = create_model(config)
    total, channels = KERAS_SIZES[config.backbone]
    params, statistics = backbone_sizes(name.partition(":")[0])
    assert (params + statistics, model.backbone.num_features) == (total, channels)
    rest = abstract_variables(model.clone(backbone=Given()), 2, 2, channels)
    assert count(rest["params"]) == (channels + 1 if name.endswith(":gap") else 258 * channels + 5_058)
    found = params + count(rest["params"]), statistics + count(rest.get("batch_stats", {}))
    assert found == SIZES[name]


class Reduced:
    """Both models of a reduced backbone: with the same backbone variables, so that one program serves both."""

    def __init__(self, name):
        fields, size = REDUCED[name]
        models = [create_model(load_model_config(name + variant)) for variant in ("", ":gap")]
        self.models = {m.pooling: m.clone(backbone=m.backbone.clone(**fields)) for m in models}
        drawn = {pooling: random_variables(model) for pooling, model in self.models.items()}
        for kind in ("params", "batch_stats"):
            drawn["gap"][kind]["backbone"] = drawn["amm"][kind]["backbone"]
        self.variables = drawn
        self.images = draw_images(size, BATCH)
        self.evaluate, self.evaluate_half = self.jit_evaluate(jnp.float32), self.jit_evaluate(jnp.bfloat16)

    @functools.cached_property
    def trained(self):
        """For each pooling the gradients of a training step and the statistics after it."""
        return jax.jit(lambda v, x: {p: differentiate(m, v[p], x, train=True) for p, m in self.models.items()})(
            self.variables, self.images
        )

    @functools.cached_property
    def evaluated(self):
        """For each pooling (logits, intermediates) and the statistics after an evaluation."""
        return self.evaluate(self.variables, self.images)

    def jit_evaluate(self, dtype):
        models = {p: m.clone(backbone=m.backbone.clone(dtype=dtype)) for p, m in self.models.items()}
        return jax.jit(
            lambda v, x: {p: m.apply(v[p], x, train=False, mutable=["batch_stats"]) for p, m in models.items()}
        )


def draw_images(size, num_images):
    return np.random.default_rng(1).uniform(size=(num_images, size, size, 3)).astype(np.float32)


def differentiate(model, variables, images, *, train):
    """Return the gradients of a weighted sum of logits, and the statistics after the step."""
    weights = jnp.resize(jnp.array([1.0, -2.0, 0.5]), len(images))

    def loss(params):
        (logits, _), updated = model.apply(
            variables | {"params": params},
            images,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)},
        )
        return jnp.sum(logits * weights), updated["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def is_normed_bias(path, backbone):
    """Tell biases whose next layers are linear up to a batch norm, which takes them out again in training."""
    if "backbone" not in path or not path.endswith("['bias']"):
        return False
    if isinstance(backbone, InceptionResNetV2):  # the last residual block has no ReLU
        return f"'block8_{backbone.num_blocks[-1]}']['conv']" in path
    return isinstance(backbone, ResNet) and "norm" not in path


def check_gradients(gradients, backbone):
    """Every array has a gradient above rounding, and normed biases one of rounding."""
    leaves = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(gradients)}
    assert np.isfinite(list(leaves.values())).all()
    rounding = 1e-5 * max(leaves.values())
    wrong = {path: size for path, size in leaves.items() if (size > rounding) == is_normed_bias(path, backbone)}
    assert not wrong, (rounding, wrong)


@pytest.fixture(scope="module", params=REDUCED)
def reduced(request):
    return Reduced(request.param)


@pytest.mark.parametrize("pooling", POOLED)
def test_every_parameter_gets_a_gradient(reduced, pooling):
    gradients, _ = reduced.trained[pooling]
    assert ("amm" in gradients) == (pooling == "amm")
    check_gradients(gradients, reduced.models[pooling].backbone)


def test_normed_biases_count_in_evaluation(reduced):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(reduced.variables["gap"])
    paths, values = zip(*((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), strict=True)
    backbone = reduced.models["gap"].backbone
    normed = [i for i, path in enumerate(paths) if is_normed_bias(path, backbone)]
    assert len(normed) == {DenseNet: 0, ResNet: 1 + 4 * 4, InceptionResNetV2: 1}[type(backbone)]
    (logits, _), _ = reduced.evaluated["gap"]
    for i in normed:
        moved = treedef.unflatten([*values[:i], values[i] + 1, *values[i + 1 :]])
        (moved_logits, _), _ = reduced.evaluate(reduced.variables | {"gap": moved}, reduced.images)["gap"]
        assert np.abs(moved_logits - logits).max() > 1e-3, paths[i]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_gets_a_gradient_at_full_depth(name):
    model = create_model(load_model_config(name))
    images = draw_images(107 if name.startswith("incep") else 64, BATCH)
    step = jax.jit(functools.partial(differentiate, model, train=True))
    check_gradients(step(random_variables(model), images)[0], model.backbone)


@pytest.mark.parametrize("pooling", POOLED)
def test_evaluation_leaves_the_statistics_alone(reduced, pooling):
    before = reduced.variables[pooling]["batch_stats"]
    _, evaluated = reduced.evaluated[pooling]
    jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], before)
    _, trained = reduced.trained[pooling]
    for path, moved in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: np.any(a != b), trained, before)):
        assert moved, path


@pytest.mark.parametrize("pooling", POOLED)
def test_a_row_does_not_depend_on_its_batch(reduced, pooling):
    (logits, out), _ = reduced.evaluated[pooling]
    (alone, out_alone), _ = reduced.evaluate(reduced.variables, reduced.images[2:3])[pooling]
    np.testing.assert_allclose(alone[0], logits[2], rtol=1e-4, atol=1e-5)
    for name in out:
        scale = np.abs(out[name][2]).max()
        np.testing.assert_allclose(out_alone[name][0], out[name][2], atol=1e-5 * max(scale, 1), err_msg=name)
    assert np.ptp(logits) > 1e-2  # another row would not do


@pytest.mark.parametrize("pooling", POOLED)
def test_bfloat16_is_close_to_float32(reduced, pooling):
    (logits, out), _ = reduced.evaluated[pooling]
    (half_logits, half_out), _ = reduced.evaluate_half(reduced.variables, reduced.images)[pooling]
    for name, bound in BFLOAT16.items():
        found, expected = (half_logits, logits) if name == "logits" else (half_out[name], out[name])
        assert found.dtype == expected.dtype == jnp.float32
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max(), name
    assert set(BFLOAT16) == {"logits", *out}
    difference = np.abs(half_out["features"] - out["features"]).max()
    assert difference > 1e-3 * np.abs(out["features"]).max()  # it was bfloat16


@pytest.mark.parametrize("create", [DenseNet, ResNet, InceptionResNetV2])
def test_images_are_refused_by_what_was_seen(create):
    backbone = create((1, 1, 1) if create is InceptionResNetV2 else (1, 1, 1, 1))
    least = backbone.min_size

    def look(*shape, dtype=jnp.float32):
        images = jax.ShapeDtypeStruct(shape, dtype)
        return jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x)[0], images)

    assert look(2, least, least, 3).shape == (2, 1, 1, backbone.num_features)
    for shape, words in (
        ((2, least - 1, 224, 3), f"at least {least} x {least} px"),
        ((2, 224, least - 1, 3), f"at least {least} x {least} px"),
        ((2, 224, 224, 1), "copy a grey channel"),
        ((224, 224, 3), r"\[B, H, W, 3\]"),
    ):
        with pytest.raises(UserError, match=f"{create.__name__} .*{words}.*") as refused:
            look(*shape)
        assert f"got float32 {list(shape)}" in str(refused.value)
    with pytest.raises(UserError, match="got uint8 .*normalise first"):
        look(2, 224, 224, 3, dtype=jnp.uint8)


@pytest.mark.parametrize("backend", [np, jnp])
def test_values_outside_0_to_1_are_refused(backend):
    images = backend.asarray(draw_images(8, 2))
    check_value_range(images)
    check_value_range(backend.array([0.0, 1.0]))
    for wrong, words in (
        (255 * images + 1, r"from 1\.\d* to 25[56]\b"),
        (images - 0.5, r"from -0\.\d+ to 0\.\d+"),
        (backend.array([0.5, backend.nan]), "nan"),
        (backend.array([0.5, backend.inf]), "from 0.5 to inf"),
    ):
        with pytest.raises(UserError, match=words):
            check_value_range(wrong)


@pytest.mark.parametrize(("field", "known"), [("backbone", BACKBONES), ("pooling", POOLINGS)])
def test_unknown_names_are_answered_with_the_known(field, known):
    config = dense121.get_config().model
    config[field] = "vgg"
    with pytest.raises(UserError, match=f"config.model.{field}='vgg'") as refused:
        create_model(config)
    assert all(name in str(refused.value) for name in known)


def load_page():
    spec = importlib.util.spec_from_file_location("make_models_page", ROOT / "docs/make_models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    page = load_page()
    text = page.PAGE.read_text()
    tables = page.find_tables(text)
    assert tables.keys() == page.TABLES.keys()
    for name, table in tables.items():
        assert table == page.TABLES[name](), f"run: PYTHONPATH=. python docs/make_models_page.py ({name})"
    assert set(re.findall(r"`([a-z0-9]+(?::gap)?)`", tables["models"])) >= set(SIZES)
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(globals())
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / "docs" / link).resolve().is_file(), link
