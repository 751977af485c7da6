"""The eight models: their sizes, that all of each learns, evaluation, bfloat16, what they refuse, the page on them."""

import functools
import importlib
import importlib.util
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny  # noqa: F401  registers the backbone 'tiny', which is none of the eight models'
from backbone_variables import random_variables
from quick import QUICK

from cxa_jax.errors import UserError
from cxa_jax.models import BACKBONES, create_model
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet

ROOT = pathlib.Path(__file__).parents[1]


def load_page():
    sys.path.append(str(ROOT / "docs"))  # for what the page imports from beside it
    spec = importlib.util.spec_from_file_location("make_models_page", ROOT / "docs/make_models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load_page()

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
# Without top, trainable and statistics together, and the features of a 224 px image.
KERAS_SIZES = {
    "densenet121": (7_037_504, (7, 7, 1024)),
    "densenet201": (18_321_984, (7, 7, 1920)),
    "resnet50": (23_587_712, (7, 7, 2048)),
    "inception_resnet_v2": (54_336_736, (5, 5, 1536)),
}
# Fewer layers of the same kinds, and images whose features have 2x2 cells: one cell has nothing to attend to.
REDUCED = {
    "dense121": ({"num_layers": (1, 1, 1, 1)}, 64),
    "res50": ({"num_blocks": (1, 1, 1, 1)}, 64),
    "incepres2": ({"num_blocks": (1, 1, 1)}, 107),
}
POOLED = ("amm", "gap")
BATCH = 3
# Greatest difference of a bfloat16 backbone from float32, over the greatest value; two to three times what was seen.
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


def test_no_model_is_missing():
    stems = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common", "ablation"}  # no model of their own
    assert set(SIZES) == {stem + variant for stem in stems for variant in ("", ":gap")}
    assert {load_model_config(name).backbone for name in SIZES} == set(KERAS_SIZES) == set(BACKBONES) - {"tiny"}
    reduced = {type(create_model(load_model_config(name)).backbone) for name in REDUCED}
    assert {type(BACKBONES[name]()) for name in KERAS_SIZES} == reduced


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    config = load_model_config(name)
    backbone, rest = page.trace_backbone(config.backbone), page.trace_rest(config)
    total, shape = KERAS_SIZES[config.backbone]
    channels = shape[-1]
    assert backbone.count("params") + backbone.count("batch_stats") == total
    assert backbone.output.shape[1:] == shape
    assert create_model(config).backbone.num_features == channels
    assert rest.count("params") == (channels + 1 if name.endswith(":gap") else 258 * channels + 5_058)
    assert SIZES[name] == tuple(backbone.count(kind) + rest.count(kind) for kind in ("params", "batch_stats"))


class BothModels(nn.Module):
    """AMM and GAP on one backbone, so that one program serves the tests of two models."""

    backbone: nn.Module
    amm: nn.Module
    gap: nn.Module

    def __call__(self, images, *, train=False):
        features = self.backbone(images, train=train)
        return {"amm": self.amm(features, train=train), "gap": self.gap(features, train=train)}


class Reduced:
    """Both models on a reduced backbone, their variables, and what they answer; each program is compiled once."""

    def __init__(self, name):
        fields, size = REDUCED[name]
        amm, gap = (create_model(load_model_config(name + variant)) for variant in ("", ":gap"))
        self.backbone = amm.backbone.clone(**fields)
        self.models = BothModels(self.backbone, amm.clone(backbone=page.Given()), gap.clone(backbone=page.Given()))
        self.variables = draw_variables(self.models)
        self.images = draw_images(size, BATCH)
        self.evaluate = self.jit_evaluate(self.models)
        self.evaluate_half = self.jit_evaluate(self.models.clone(backbone=self.backbone.clone(dtype=jnp.bfloat16)))

    @staticmethod
    def jit_evaluate(models):
        return jax.jit(functools.partial(models.apply, train=False, mutable=["batch_stats"]), compiler_options=QUICK)

    @functools.cached_property
    def evaluated(self):
        """{pooling: (logits, intermediates)} and the statistics after an evaluation."""
        return self.evaluate(self.variables, self.images)

    @functools.cached_property
    def trained(self):
        """{pooling: gradients of its model} of a training step, and the statistics after it."""

        def loss(params, shares):
            answers, updated = apply_train(self.models, self.variables | {"params": params}, self.images)
            return sum(shares[p] * weigh(logits) for p, (logits, _) in answers.items()), updated["batch_stats"]

        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
        gradients = {}
        for pooling in POOLED:
            shares = {other: float(other == pooling) for other in POOLED}
            gradient, statistics = step(self.variables["params"], shares)
            gradients[pooling] = {name: gradient[name] for name in ("backbone", pooling)}
        return gradients, statistics


def apply_train(model, variables, images):
    return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})


def weigh(logits):
    return jnp.sum(logits * jnp.resize(jnp.array([1.0, -2.0, 0.5]), len(logits)))


def draw_variables(module):
    """Draw kernels; move the rest off 0 and 1, where a ReLU between two norms hides the first one's scale."""
    rng = np.random.default_rng(3)

    def move(path, leaf):
        return leaf if path[-1].key == "kernel" else leaf + rng.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(move, random_variables(module))


def draw_images(size, num_images):
    return np.random.default_rng(1).uniform(size=(num_images, size, size, 3)).astype(np.float32)


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
    gradients = reduced.trained[0][pooling]
    assert set(gradients[pooling]) == ({"amm", "classifier"} if pooling == "amm" else {"classifier"})
    check_gradients(gradients, reduced.backbone)


def test_normed_biases_count_in_evaluation(reduced):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(reduced.variables["params"])
    paths, values = zip(*((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), strict=True)
    normed = [i for i, path in enumerate(paths) if is_normed_bias(path, reduced.backbone)]
    assert len(normed) == {DenseNet: 0, ResNet: 1 + 4 * 4, InceptionResNetV2: 1}[type(reduced.backbone)]
    for i in normed[::8]:
        moved = treedef.unflatten([*values[:i], values[i] + 1, *values[i + 1 :]])
        answers, _ = reduced.evaluate(reduced.variables | {"params": moved}, reduced.images)
        for pooling, (logits, _) in answers.items():
            assert np.abs(logits - reduced.evaluated[0][pooling][0]).max() > 1e-3, (paths[i], pooling)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_gets_a_gradient_at_full_depth(name):
    model = create_model(load_model_config(name))
    images = draw_images(107 if name.startswith("incep") else 64, BATCH)
    variables = draw_variables(model)

    def loss(params):
        (logits, _), _ = apply_train(model, variables | {"params": params}, images)
        return weigh(logits)

    check_gradients(jax.jit(jax.grad(loss), compiler_options=QUICK)(variables["params"]), model.backbone)


def test_evaluation_leaves_the_statistics_alone(reduced):
    before = reduced.variables["batch_stats"]
    _, evaluated = reduced.evaluated
    jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], before)
    _, trained = reduced.trained
    moved = jax.tree.map(lambda a, b: np.any(a != b), trained, before)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize("pooling", POOLED)
def test_a_row_does_not_depend_on_its_batch(reduced, pooling):
    logits, out = reduced.evaluated[0][pooling]
    alone, out_alone = reduced.evaluate(reduced.variables, reduced.images[2:3])[0][pooling]
    np.testing.assert_allclose(alone[0], logits[2], rtol=1e-4, atol=1e-5)
    for name in out:
        scale = np.abs(out[name][2]).max()
        np.testing.assert_allclose(out_alone[name][0], out[name][2], atol=1e-5 * max(scale, 1), err_msg=name)
    assert np.ptp(logits) > 1e-2  # another row would not do


@pytest.mark.parametrize("pooling", POOLED)
def test_bfloat16_is_close_to_float32(reduced, pooling):
    logits, out = reduced.evaluated[0][pooling]
    half_logits, half_out = reduced.evaluate_half(reduced.variables, reduced.images)[0][pooling]
    for name, bound in BFLOAT16.items():
        found, expected = (half_logits, logits) if name == "logits" else (half_out[name], out[name])
        assert found.dtype == expected.dtype == jnp.float32
        scale = max(np.abs(expected).max(), 1.0 if "logits" in name else 0.0)  # logits may all be near 0
        assert np.abs(found - expected).max() <= bound * scale, name
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


def test_the_page_is_current():
    text = page.PAGE.read_text()
    tables = page.find_tables(text)
    assert tables.keys() == page.TABLES.keys()
    for name, table in tables.items():
        assert table == page.TABLES[name](), f"run: PYTHONPATH=. python docs/make_models_page.py ({name})"
    assert set(re.findall(r"`([a-z0-9]+(?::gap)?)`", tables["models"])) >= set(SIZES)
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(globals())
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / "docs" / link).resolve().is_file(), link
