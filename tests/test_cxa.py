"""The assembled network: shapes, named intermediates, heads, that every parameter learns, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import initialize, jit

from configs import dense121
from cxa_jax import pooling
from cxa_jax.data.augment import NORMALIZATIONS, find_value_range, to_rgb
from cxa_jax.errors import UserError
from cxa_jax.models import BACKBONES, CardioXAttentionNet, create_model
from cxa_jax.models.cxa import check_value_range


def abstract_variables(model, size=224):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


@pytest.mark.parametrize("size, cells", [(32, 1), (100, 3), (224, 7), (1024, 32)])
def test_feature_maps_at_any_size(size, cells):
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"]())  # DenseNet-121's strides and paddings, fewer layers
    variables = abstract_variables(model, size)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, out = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    assert logits.shape == (2,)
    assert out["features"].shape == (2, cells, cells, model.backbone.num_features)
    assert out["attention"].shape == out["attention_logits"].shape == (2, cells, cells, 1)
    assert out["pooled"].shape == (2, model.backbone.num_features)


@pytest.fixture(scope="module")
def tiny_model():
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"]())
    images = jax.random.uniform(jax.random.key(1), (3, 96, 64, 3))
    variables = initialize(model, jax.random.key(0), images)
    return model, variables, images


def test_intermediates_are_what_they_say(tiny_model):
    model, variables, images = tiny_model
    logits, out = jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(out["attention"], jax.nn.sigmoid(out["attention_logits"]), rtol=1e-6)
    np.testing.assert_allclose(
        out["pooled"], pooling.gwap(out["features"], out["attention_logits"]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(model.apply(variables, out["pooled"], method="classify"), logits, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient(tiny_model):
    model, variables, images = tiny_model

    def loss(params):
        apply = {"params": params, "batch_stats": variables["batch_stats"]}
        (logits, _), _ = model.apply(
            apply, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
        )
        return jnp.sum(logits * jnp.array([1.0, -2.0, 0.5]))

    gradients = jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_keeps_parameters_pooling_and_logits_in_float32(tiny_model):
    _, variables, images = tiny_model
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](dtype=jnp.bfloat16))
    (logits, out), updated = jit(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    )(variables, images)
    assert logits.dtype == out["pooled"].dtype == out["attention"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(updated["batch_stats"])} == {jnp.dtype("float32")}
    reference, half = (jit(m.apply)(variables, images)[0] for m in (tiny_model[0], model))
    np.testing.assert_allclose(half, reference, atol=0.1)


def test_gap_is_gwap_with_constant_attention(tiny_model):
    _, _, images = tiny_model
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling="gap")
    variables = initialize(model, jax.random.key(0), images)
    _, out = jit(model.apply)(variables, images)
    assert "amm" not in variables["params"]
    np.testing.assert_allclose(out["pooled"], out["features"].mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        out["pooled"], pooling.gwap(out["features"], out["attention_logits"]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("pooled, head", [("softmax", "mlp"), ("gated", "mlp"), ("pcam", "linear"), ("lse", "linear")])
def test_other_poolings_run(pooled, head, tiny_model):
    _, _, images = tiny_model
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling=pooled, head=head)
    logits, _ = model.init_with_output(jax.random.key(0), images, train=False)[0]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("pooled", "head"), [("gap", "mlp"), ("pcam", "linear"), ("amm", "mlp")])
def test_every_pooling_can_read_the_normalised_features_of_the_attention(pooled, head, tiny_model):
    _, _, images = tiny_model
    fields = {"pooling": pooled, "head": head}
    models = [
        CardioXAttentionNet(tiny.BACKBONES["tiny"](), attended=attended, **fields)
        for attended in ("normalized", "all_normalized")
    ]
    variables = [jax.eval_shape(lambda m=model: m.init(jax.random.key(0), images)) for model in models]
    if pooled == "amm":  # it reads them anyway
        assert jax.tree.structure(variables[0]) == jax.tree.structure(variables[1])
        return
    assert "feature_norm" not in variables[0]["params"]

    @jit
    def apply(key):
        drawn = models[1].init(key, images)
        (_, out), updated = models[1].apply(
            drawn, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
        )
        return out, updated["batch_stats"]["feature_norm"]

    out, statistics = apply(jax.random.key(0))
    moments = [np.asarray(moment(out["features"], (0, 1, 2))) for moment in (jnp.mean, jnp.std)]
    np.testing.assert_allclose(moments[0], 0, atol=1e-5)
    assert moments[1].max() == pytest.approx(1, abs=0.1) and statistics["mean"].any()
    expected = pooling.POOLINGS[pooled](out["features"], out["attention_logits"])[0]
    np.testing.assert_allclose(out["pooled"], expected, rtol=1e-5, atol=1e-6)


def test_pcam_weighs_cells_by_their_own_logit(tiny_model):
    _, _, images = tiny_model
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling="pcam", head="linear")
    variables = initialize(model, jax.random.key(0), images)
    _, out = jit(model.apply)(variables, images)
    cells = out["features"].reshape(-1, out["features"].shape[-1])
    logits = model.apply(variables, cells, method="classify").reshape(out["attention_logits"].shape)
    np.testing.assert_allclose(out["attention_logits"], logits, rtol=1e-4, atol=1e-5)


def test_pcam_refuses_an_mlp_head():
    config = dense121.get_config().model
    config.pooling = "pcam"
    with pytest.raises(UserError, match="config.model.head=linear"):
        create_model(config)


@pytest.mark.parametrize(
    "field, value", [("backbone", "vgg"), ("pooling", "mean"), ("head", "big"), ("dropout", 1.0), ("dtype", "int8")]
)
def test_wrong_fields_are_named(field, value):
    config = dense121.get_config().model
    config[field] = value
    with pytest.raises(UserError, match=f"config.model.{field}="):
        create_model(config)


@pytest.mark.parametrize("backend", [np, jnp])
def test_values_outside_0_to_1_are_refused(backend):
    images = backend.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32))
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


class Cells(nn.Module):
    """The least backbone: means of 4x4 pixels, three channels."""

    @nn.compact
    def __call__(self, images, *, train=False):
        return nn.avg_pool(images, (4, 4), (4, 4))


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_the_network_refuses_values_that_its_normalisation_does_not_give(method):
    model = CardioXAttentionNet(Cells(), pooling="gap", value_range=find_value_range(method))
    grey = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)
    grey[0, :2, 0] = [[0.0], [1.0]]  # black and white are just allowed
    images = np.asarray(to_rgb(grey, method))
    variables = model.init(jax.random.key(0), images)
    model.apply(variables, images)
    with pytest.raises(UserError, match=r"images must be finite and in \[.*\], got values from"):
        model.apply(variables, images * 1.01 + 0.005)
    with pytest.raises(UserError, match="to nan"):
        model.apply(variables, np.where(grey == 1, np.nan, images))


@pytest.mark.parametrize(("field", "known"), [("backbone", BACKBONES), ("pooling", pooling.POOLINGS)])
def test_unknown_names_are_answered_with_the_known(field, known):
    config = dense121.get_config().model
    config[field] = "vgg"
    with pytest.raises(UserError, match=f"config.model.{field}='vgg'") as refused:
        create_model(config)
    assert all(name in str(refused.value) for name in known)
