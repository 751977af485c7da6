"""AMM, pooling and head against Table 3's literal graph in Keras: frozen convolution of ones, two averages, ratio."""

import keras_reference as reference  # first: it chooses Keras' backend

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from literal_graph import as_ours, attention_and_head

from cxa_jax.models.cxa import CardioXAttentionNet

TOLERANCE = 1e-11  # float64 on both sides


class GivenFeatures(nn.Module):
    """A backbone whose images are the features."""

    @nn.compact
    def __call__(self, images, *, train):
        return images


def literal_model(num_features, rng):
    features = keras.Input((None, None, num_features))
    model = keras.Model(features, attention_and_head(features))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(1 if "gamma" in variable.path else 0, 0.3, variable.shape))
    for variable in model.get_layer("norm").non_trainable_variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


@pytest.fixture(scope="module", autouse=True)
def double():
    with reference.double_precision():
        yield


@pytest.fixture(scope="module")
def case(double):
    rng = np.random.default_rng(0)
    model = literal_model(24, rng)
    variables = as_ours([v.path for v in model.variables], [v.value for v in model.variables])
    network = CardioXAttentionNet(GivenFeatures(), dropout=0.0, value_range=(-np.inf, np.inf))  # features, not pixels
    return model, network, variables, rng.normal(size=(3, 5, 7, 24))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_inference(case):
    model, network, variables, features = case
    (score, attention, pooled), _ = model.stateless_call(*reference.values(model), features, training=False)
    logits, out = network.apply(variables, features)
    close(jax.nn.sigmoid(logits), score[:, 0])
    close(out["attention"], attention)
    close(out["pooled"], pooled)


def test_variables_are_the_same_set(case):
    model, network, variables, features = case
    expected = jax.eval_shape(network.init, jax.random.key(0), features)
    assert jax.tree.structure(expected) == jax.tree.structure(variables)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), expected, variables)
    assert sum(w.size for w in jax.tree.leaves(variables["params"])) == 258 * 24 + 5058


def test_training_statistics_and_gradients(case):
    model, network, variables, features = case
    labels = np.array([1.0, 0.0, 1.0])

    def our_loss(params, x):
        state = variables | {"params": params}
        logits, new = network.apply(state, x, train=True, mutable=["batch_stats"])
        return -(labels * jax.nn.log_sigmoid(logits[0]) + (1 - labels) * jax.nn.log_sigmoid(-logits[0])).sum(), new

    def their_loss(trainable, x):
        (score, _, _), fixed = model.stateless_call(trainable, reference.values(model)[1], x, training=True)
        p = score[:, 0]
        return -(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p)).sum(), fixed

    our_grad = jax.jit(jax.grad(our_loss, argnums=(0, 1), has_aux=True))
    their_grad = jax.jit(jax.grad(their_loss, argnums=(0, 1), has_aux=True))
    (ours, our_features), new = our_grad(variables["params"], features)
    (theirs, their_features), fixed = their_grad(reference.values(model)[0], features)
    expected = as_ours([v.path for v in model.trainable_variables], theirs)["params"]
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(close, ours, expected)
    close(our_features, their_features)
    statistics = as_ours([v.path for v in model.non_trainable_variables], fixed)["batch_stats"]
    jax.tree.map(close, new["batch_stats"], statistics)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(ours))
