"""One training step against its parts written out, and what masks, NaN and the evaluation step do."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from quick import jit, jit_as_users

from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.evidence import class_activation_map, linearized_activation_map, linearized_evidence
from cxa_jax.losses import weighted_binary_cross_entropy
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.optimizer import create_optimizer
from cxa_jax.steps import is_finite, make_eval_step, make_train_step, mean_of_valid, update_if
from cxa_jax.train_state import TrainState, create_train_state

WEIGHTS = (0.6, 2.0)


@pytest.fixture(scope="module")
def parts():
    config = tiny.make_config(**{"augment.enabled": False})
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), dropout=0.0)
    tx = create_optimizer(0.1, 0.9)
    state = create_train_state(jax.random.key(1), model, tx, tiny.SIZE)
    step = jit_as_users(make_train_step(model, tx, jax.random.key(0), WEIGHTS, "min_max", config.augment))
    rng = np.random.default_rng(5)
    batch = {
        "image": rng.integers(0, 256, (6, tiny.SIZE, tiny.SIZE, 1)).astype(np.uint8),
        "label": rng.integers(0, 2, 6).astype(np.int32),
        "mask": np.array([True, True, False, True, True, True]),
    }
    return model, state, step, batch


def test_step_is_loss_gradient_and_sgd(parts):
    model, state, step, batch = parts
    new_state, metrics = step(state, batch, np.float32(0.3))
    images = to_rgb(normalize_images(batch["image"], "min_max"), "min_max")

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (logits, _), updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = weighted_binary_cross_entropy(logits, batch["label"], WEIGHTS)
        return losses[batch["mask"]].sum() / 5, updated["batch_stats"]

    value, batch_stats = jit(loss)(state.params)
    gradient = jit(jax.grad(loss, has_aux=True))(state.params)[0]
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, new_state.batch_stats, batch_stats)
    expected = jax.tree.map(lambda p, g: p - 0.1 * 0.3 * g, state.params, gradient)
    jax.tree.map(close, new_state.params, expected)
    assert int(new_state.step) == 1 and bool(new_state.healthy)


def test_penalty_on_the_attention_of_negatives(parts):
    model, state, step, batch = parts
    tx, config = create_optimizer(0.1, 0.9), tiny.make_config(**{"augment.enabled": False})
    penalized = make_train_step(
        model, tx, jax.random.key(0), WEIGHTS, "min_max", config.augment, attention_negative_weight=3.0
    )
    new_state, metrics = jit(penalized)(state, batch, np.float32(1))
    images = to_rgb(normalize_images(batch["image"], "min_max"), "min_max")
    (_, out), _ = jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(state.variables, images)
    plain_state, plain = step(state, batch, np.float32(1))
    negatives = batch["mask"] & (batch["label"] == 0)
    darkness = np.asarray(out["attention"])[negatives].mean()
    assert float(metrics["loss"]) - float(plain["loss"]) == pytest.approx(3 * darkness, rel=1e-3)
    # W of a negative falls faster than without the term: the last bias of the branch moves down by more
    bias = lambda state: float(state.params["amm"]["conv4"]["bias"][0])  # noqa: E731
    assert bias(new_state) < bias(plain_state)
    flipped = batch | {"label": np.where(batch["mask"], batch["label"], 1 - batch["label"])}
    jax.tree.map(np.testing.assert_array_equal, jit(penalized)(state, flipped, np.float32(1))[0], new_state)


def test_masked_row_has_no_say_in_the_loss(parts):
    _, state, step, batch = parts
    flipped = batch | {"label": np.where(batch["mask"], batch["label"], 1 - batch["label"])}
    one, other = step(state, batch, np.float32(1)), step(state, flipped, np.float32(1))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    valid = batch | {"mask": np.ones(6, bool)}
    assert float(step(state, valid, np.float32(1))[1]["loss"]) != float(one[1]["loss"])


def test_unhealthy_step_freezes_the_state_for_good(parts):
    _, state, step, batch = parts
    broken = state.replace(params=jax.tree.map(lambda x: x.at[...].set(jnp.nan), state.params))
    frozen, metrics = step(broken, batch, np.float32(1))
    assert not bool(metrics["healthy"])
    assert int(frozen.step) == 0
    jax.tree.map(np.testing.assert_array_equal, frozen.batch_stats, state.batch_stats)
    healed = frozen.replace(params=state.params)
    again, metrics = step(healed, batch, np.float32(1))
    assert not bool(metrics["healthy"]) and int(again.step) == 0


def test_same_keys_same_step_other_step_other_augmentation():
    config = tiny.make_config()
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"]())
    tx = create_optimizer(0.1, 0.9)
    state = create_train_state(jax.random.key(1), model, tx, tiny.SIZE)
    step = jit(make_train_step(model, tx, jax.random.key(0), WEIGHTS, "min_max", config.augment))
    image = np.random.default_rng(0).integers(0, 256, (4, tiny.SIZE, tiny.SIZE, 1)).astype(np.uint8)
    batch = {"image": image, "label": np.array([0, 1, 0, 1], np.int32), "mask": np.ones(4, bool)}
    losses = [float(step(state.replace(step=jnp.int32(n)), batch, np.float32(1))[1]["loss"]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


class Least(nn.Module):
    """The least network of the right shape: no dropout, and batch norm only if asked."""

    has_statistics: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.elu(nn.Conv(4, (5, 5), strides=4, param_dtype=images.dtype)(images))
        if self.has_statistics:
            features = nn.BatchNorm(use_running_average=not train)(features)
        attention = nn.sigmoid(nn.Conv(1, (1, 1), param_dtype=images.dtype)(features))
        logits = nn.Dense(1, param_dtype=images.dtype)(jnp.mean(attention * features, axis=(1, 2)))[:, 0]
        return logits, {"attention": attention}


def draw_batch(rng, batch_size):
    return {
        "image": rng.integers(0, 256, (batch_size, 16, 16, 1)).astype(np.uint8),
        "label": rng.integers(0, 2, batch_size).astype(np.int32),
        "mask": rng.random(batch_size) < 0.7,
    }


@pytest.mark.parametrize("num_parts", [2, 6])
def test_a_batch_in_parts_is_the_batch_without_batch_statistics(num_parts):
    """In float64, where only rounding may differ: loss, class weights and both means are over the whole batch."""
    with jax.enable_x64(True):
        model, tx, config = Least(), create_optimizer(0.1, 0.9), tiny.make_config(**{"augment.shift": 0.2})
        params = model.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3), jnp.float64))["params"]
        state = TrainState(jnp.int32(4), jnp.bool_(True), params, {}, tx.init(params))
        options = {"attention_negative_weight": 3.0}
        make = partial(make_train_step, model, tx, jax.random.key(0), WEIGHTS, "min_max", config.augment, **options)
        batch = draw_batch(np.random.default_rng(), 12)
        whole, metrics = jit(make())(state, batch, np.float64(0.3))
        parts, metrics_of_parts = jit(make(accumulate_steps=num_parts))(state, batch, np.float64(0.3))
    assert float(metrics["loss"]) == pytest.approx(float(metrics_of_parts["loss"]), rel=1e-12)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, parts, whole)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), whole.params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-7


def test_parts_have_their_own_batch_statistics():
    """What batch norm makes of two parts: the loss of each with its own moments, averages moved part by part."""
    model, tx = Least(has_statistics=True), create_optimizer(0.1, 0.9)
    state = create_train_state(jax.random.key(1), model, tx, 16)
    batch = draw_batch(np.random.default_rng(), 6)
    batch["mask"] = np.array([True, True, False, True, True, True])
    augmentation = ConfigDict({"enabled": False})
    step = make_train_step(model, tx, jax.random.key(0), WEIGHTS, "min_max", augmentation, accumulate_steps=2)
    new_state, metrics = jit(step)(state, batch, np.float32(1))
    apply = jit(lambda variables, images: model.apply(variables, images, train=True, mutable=["batch_stats"]))
    variables, total = state.variables, 0.0
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        images = to_rgb(normalize_images(batch["image"][rows], "min_max"), "min_max")
        (logits, _), updated = apply(variables, images)
        losses = weighted_binary_cross_entropy(logits, batch["label"][rows], WEIGHTS)
        total += float(losses[batch["mask"][rows]].sum()) / 5
        variables = variables | updated
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, new_state.batch_stats, variables["batch_stats"])


def test_eval_step_gives_logits_attention_and_evidence(parts):
    model, state, _, batch = parts
    out = jit(make_eval_step(model, "min_max"))(state.variables, batch["image"])
    images = to_rgb(normalize_images(batch["image"], "min_max"), "min_max")
    logits, parts_ = jit(lambda v, x: model.apply(v, x, train=False))(state.variables, images)
    np.testing.assert_allclose(out["logit"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["attention"], parts_["attention"][..., 0], rtol=1e-5)
    head = lambda pooled: model.apply(state.variables, pooled, method="classify")  # noqa: E731
    evidence = linearized_evidence(head, parts_["features"], parts_["weights"])
    np.testing.assert_allclose(out["evidence"], evidence, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(out["weights"], parts_["weights"][..., 0], rtol=1e-5)
    cam = linearized_activation_map(head, parts_["features"], parts_["pooled"])  # whatever the head
    np.testing.assert_allclose(out["cam"], cam, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(out["weights"] * out["cam"], out["evidence"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(out["attention_logits"]), out["attention"], rtol=1e-4)


def test_the_class_activation_map_of_an_average_adds_up_to_the_logit(parts):
    _, _, _, batch = parts
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling="gap", head="linear")
    state = create_train_state(jax.random.key(2), model, create_optimizer(0.1, 0.9), tiny.SIZE)
    out = jit(make_eval_step(model, "min_max"))(state.variables, batch["image"])
    bias = state.params["classifier"]["logit"]["bias"][0]
    np.testing.assert_allclose(jnp.mean(out["cam"], axis=(1, 2)) + bias, out["logit"], rtol=1e-3, atol=1e-5)
    kernel = state.params["classifier"]["logit"]["kernel"][:, 0]
    images = to_rgb(normalize_images(batch["image"], "min_max"), "min_max")
    _, seen = jit(lambda v, x: model.apply(v, x, train=False))(state.variables, images)
    np.testing.assert_allclose(out["cam"], class_activation_map(seen["features"], kernel), rtol=1e-3, atol=1e-5)
    assert "attention_logits" not in out  # of a pooling that reads features alone
    np.testing.assert_allclose(out["cam"] / out["cam"][0].size, out["evidence"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(jnp.maximum(out["evidence"], 0), out["grad_cam"], rtol=1e-3, atol=1e-6)


def test_mean_of_valid():
    values, mask = jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True])
    assert float(mean_of_valid(values, mask, 2)) == 2.5
    assert float(mean_of_valid(values, mask, 5)) == 1
    assert float(mean_of_valid(values, jnp.zeros(3, bool), 0)) == 0


@pytest.mark.parametrize("leaf", ["kernel", "bias", "scalar"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(leaf, value):
    rng = np.random.default_rng(8)
    grads = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=5), "scalar": np.array(1.5)}
    assert bool(is_finite(grads)) and bool(is_finite({"kernel": grads["kernel"]}))
    grads[leaf].flat[-1] = value
    assert not bool(is_finite(grads)) and not bool(jit_as_users(is_finite)(grads))


def test_numbers_are_as_good_as_infinite_once_the_sum_of_their_squares_is():
    large = jnp.float32(1.5e19)
    assert bool(is_finite({"a": large})) and not bool(is_finite({"a": large, "b": large[None]}))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("condition", [True, False])
def test_an_update_happens_where_its_condition_holds(monkeypatch, platform, condition):
    """By a conditional and by selections; what the update made is not a number where it does not hold."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    old, new = ({"a": jnp.full(3, 1.0 * value), "n": jnp.int32(value)} for value in (1, 2))
    bad = {"a": jnp.full(3, jnp.nan), "n": jnp.int32(7)}

    made = new if condition else bad
    found = jit_as_users(lambda condition: update_if(condition, lambda: made, old))(condition)
    jax.tree.map(np.testing.assert_array_equal, found, new if condition else old)
    used = str(jax.make_jaxpr(lambda condition: update_if(condition, lambda: made, old))(condition))
    assert ("cond[" in used) == (platform == "cpu")
