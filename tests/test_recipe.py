"""The recipe: each optimiser against its formula in float64 numpy, schedules against theirs, who decays and who not."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from quick import jit

from configs import dense121
from cxa_jax.config_checks import check_config
from cxa_jax.errors import UserError
from cxa_jax.models import create_model
from cxa_jax.optimizer import (
    average_step_size,
    create_optimizer,
    create_schedule,
    find_attention,
    find_attention_kernels,
    find_kernels,
    rate_at,
)
from cxa_jax.run import OPTIMIZER_FIELDS
from cxa_jax.steps import make_train_step
from cxa_jax.train_state import create_train_state
from cxa_jax.workdir import check_same_run, flatten_config

SHAPES = {"amm": {"kernel": (3, 2), "bias": (2,)}, "backbone": {"kernel": (2, 2, 1, 3), "scale": (3,)}}
NUM_UPDATES = 7


def draw(rng):
    return jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def run_both(create, formula):
    """Return parameters after NUM_UPDATES random gradients, in float64, by the optimiser and by the formula."""
    rng = np.random.default_rng()
    start, gradients = draw(rng), [draw(rng) for _ in range(NUM_UPDATES)]
    with jax.enable_x64(True):
        tx = create()
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        update = jit(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        found = jax.tree.map(np.asarray, params)
    expected = {
        part: {
            kind: formula(part, kind, start[part][kind], [g[part][kind] for g in gradients], gradients)
            for kind in start[part]
        }
        for part in start
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected)


def global_norm(gradient):
    return np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))


@pytest.mark.parametrize(("nesterov", "clip_norm"), [(False, 0.0), (True, 0.0), (True, 2.5)])
def test_sgd_is_the_formula_of_pytorch(nesterov, clip_norm):
    """torch.optim.SGD: g += decay p; v = m v + g; step by g + m v if Nesterov's, else by v; kernels alone decay."""
    rate, momentum, decay, more, factor = 0.1, 0.9, 0.03, 0.2, 0.5

    def formula(part, kind, value, gradients, whole):
        velocity = np.zeros_like(value)
        for gradient, all_of_it in zip(gradients, whole, strict=True):
            if clip_norm:
                gradient = gradient * min(1, clip_norm / global_norm(all_of_it))
            if kind == "kernel":
                gradient = gradient + (decay + more * (part == "amm")) * value
            velocity = momentum * velocity + gradient
            step = gradient + momentum * velocity if nesterov else velocity
            value = value - rate * (factor if part == "amm" else 1) * step
        return value

    run_both(
        lambda: create_optimizer(
            rate,
            momentum,
            nesterov=nesterov,
            weight_decay=decay,
            clip_norm=clip_norm,
            attention_rate_factor=factor,
            attention_weight_decay=more,
        ),
        formula,
    )


def test_adamw_is_the_formula():
    """Loshchilov & Hutter 2019, algorithm 2: decay beside the quotient, both times the rate."""
    rate, beta, decay, more, factor = 0.01, 0.8, 0.1, 0.4, 3.0

    def formula(part, kind, value, gradients, whole):
        first, second = np.zeros_like(value), np.zeros_like(value)
        for count, gradient in enumerate(gradients, start=1):
            first = beta * first + (1 - beta) * gradient
            second = 0.999 * second + 0.001 * gradient**2
            step = first / (1 - beta**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            if kind == "kernel":
                step = step + (decay + more * (part == "amm")) * value
            value = value - rate * (factor if part == "amm" else 1) * step
        return value

    run_both(
        lambda: create_optimizer(
            rate,
            beta,
            name="adamw",
            weight_decay=decay,
            attention_rate_factor=factor,
            attention_weight_decay=more,
        ),
        formula,
    )


def test_defaults_are_the_sgd_they_were():
    """The same state and the same graph as optax.sgd alone; the config's defaults are the function's."""
    config, params = dense121.get_config().optimizer, {"amm": {"kernel": jnp.ones((2, 3))}, "norm": jnp.ones(4)}
    tx, plain = create_optimizer(0.1, 0.9), optax.sgd(0.1, momentum=0.9)
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(plain.init(params))
    graphs = [str(jax.make_jaxpr(one.update)(params, one.init(params), params)) for one in (tx, plain)]
    assert graphs[0] == graphs[1]
    defaults = inspect.signature(create_optimizer).parameters
    for field in set(OPTIMIZER_FIELDS) - {"momentum"}:
        assert config[field] == defaults[field].default, field
    assert create_schedule(config, 100) == config.learning_rate


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_is_one_whatever_decays_or_clips(name):
    """So a run can be resumed with another decay, another clipping, other factors."""
    params = jax.tree.map(jnp.asarray, draw(np.random.default_rng(1)))
    structures = {
        jax.tree.structure(
            create_optimizer(
                0.1, 0.9, name=name, weight_decay=a, clip_norm=b, attention_rate_factor=1 + c, attention_weight_decay=d
            ).init(params)
        )
        for a, b, c, d in itertools.product((0, 0.5), repeat=4)
    }
    assert len(structures) == 1


def test_kernels_decay_and_norms_and_biases_do_not():
    config = tiny.make_config().model
    for pooling, branch in (("amm", "amm"), ("gated", "gate"), ("gap", None)):
        with config.unlocked():
            config.pooling = pooling
        params = jax.eval_shape(create_model(config).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
        kernels, attention = find_kernels(params), find_attention(params)
        for path, decays in jax.tree_util.tree_flatten_with_path(kernels)[0]:
            assert decays == ("kernel" in path[-1].key), path
        for path, inside in jax.tree_util.tree_flatten_with_path(attention)[0]:
            assert inside == (path[0].key == branch and path[1].key != "norm"), path
        assert ("norm" in params.get("amm", {})) == (branch == "amm")
        assert any(jax.tree.leaves(attention)) == (branch is not None)
        both = jax.tree.map(lambda a, b: a and b, kernels, attention)
        assert both == find_attention_kernels(params)


def make_schedule(**fields):
    config = dense121.get_config().optimizer
    config.update({"learning_rate": 0.3, **fields})
    return create_schedule(config, 50)


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("name", ["plateau", "constant", "cosine"])
def test_schedules_are_their_formulas(name, warmup):
    schedule = make_schedule(schedule=name, warmup_steps=warmup)
    for step in range(51):
        if step < warmup:
            expected = 0.3 * step / warmup
        elif name == "cosine":
            expected = 0.3 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (50 - warmup)))
        else:
            expected = 0.3
        assert rate_at(schedule, step) == pytest.approx(expected, rel=1e-5, abs=1e-7), step
    tx = create_optimizer(schedule, 0.0)  # the rate that is applied is the one that is told, and the count is kept
    params = jnp.zeros(1)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jnp.ones(1), state, params)
        assert float(-updates[0]) == pytest.approx(rate_at(schedule, step), rel=1e-6)


@pytest.mark.parametrize("name", ["plateau", "constant", "cosine"])
def test_a_warm_up_that_leaves_nothing_is_refused(name):
    for steps in (50, 51):
        with pytest.raises(UserError, match=f"warmup_steps={steps} leaves nothing of the run's 50 .*train.num_epochs"):
            make_schedule(schedule=name, warmup_steps=steps)
    make_schedule(schedule=name, warmup_steps=49)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_the_average_is_that_of_optax_without_its_bias_and_of_a_slow_twin(decay):
    rng = np.random.default_rng()
    values = rng.normal(size=(40, 3)) + np.linspace(0, 5, 40)[:, None]
    ema = optax.ema(decay, debias=True, accumulator_dtype=jnp.float32)
    state = ema.init(jnp.zeros(3))
    average = jnp.asarray(rng.normal(size=3), jnp.float32)  # has no share
    for number, value in enumerate(values, start=1):
        value = jnp.asarray(value, jnp.float32)
        average = optax.incremental_update(value, average, average_step_size(decay, jnp.int32(number)))
        theirs, state = ema.update(value, state)
        shares = decay ** np.arange(number)[::-1].astype(np.float64)
        slow = (shares[:, None] * values[:number]).sum(0) / shares.sum()
        np.testing.assert_allclose(average, slow, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(theirs, slow, rtol=2e-3, atol=2e-3)  # 1 - decay^n in float32


def test_the_step_averages_what_it_makes_and_trains_as_if_it_did_not():
    config, model = tiny.make_config(**{"augment.enabled": False}), create_model(tiny.make_config().model)
    tx = create_optimizer(0.1, 0.9)
    plain = create_train_state(jax.random.key(1), model, tx, tiny.SIZE)
    averaging = plain.replace(averaged_params=jax.tree.map(jnp.zeros_like, plain.params))
    rng = np.random.default_rng(5)
    batch = {
        "image": rng.integers(0, 256, (4, tiny.SIZE, tiny.SIZE, 1)).astype(np.uint8),
        "label": np.array([0, 1, 1, 0], np.int32),
        "mask": np.ones(4, bool),
    }
    arguments = (model, tx, jax.random.key(0), (1.0, 1.0), "min_max", config.augment)
    step, averaging_step = jit(make_train_step(*arguments)), jit(make_train_step(*arguments, ema_decay=0.5))
    history = []
    for _ in range(2):
        plain, _ = step(plain, batch, np.float32(1))
        averaging, _ = averaging_step(averaging, batch, np.float32(1))
        history.append(plain.params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, averaging.replace(averaged_params={}), plain)
    jax.tree.map(close, averaging.averaged_params, jax.tree.map(lambda a, b: (a + 2 * b) / 3, *history))
    assert not plain.averaged_params
    broken = averaging.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, averaging.params))
    frozen, _ = averaging_step(broken, batch, np.float32(1))
    jax.tree.map(np.testing.assert_array_equal, frozen.averaged_params, averaging.averaged_params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer.name": "adamw", "optimizer.momentum": 1.0},
            "momentum=1.0 must be from 0 to 0.999999 with .*adamw",
        ),
        ({"optimizer.clip_norm": float("inf")}, "clip_norm=inf must be from 0 to"),
        ({"optimizer.ema_decay": 0.9}, "ema_decay=0.9 .*--config.train.recompute_moments=24"),
        ({"optimizer.attention_rate_factor": 2.0, "model.pooling": "gap"}, "attention_rate_factor=2.0 needs an attent"),
        ({"optimizer.attention_weight_decay": 0.1, "model.pooling": "pcam"}, "attention_weight_decay=0.1 needs an att"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    config = dense121.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        check_config(config, min_size=32)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer.name": "adamw"}, "state of another optimiser.*init.run"),
        ({}, {"optimizer.schedule": "cosine"}, "state of another optimiser"),
        ({"optimizer.warmup_steps": 3}, {"optimizer.warmup_steps": 0}, "state of another optimiser"),
        ({"optimizer.schedule": "cosine"}, {"optimizer.schedule": "cosine", "train.num_epochs": 3}, None),
        ({}, {"optimizer.weight_decay": 0.1}, None),
        ({"optimizer.ema_decay": 0.9}, {}, None),
        ({}, {"train.recompute_moments": 3}, None),
    ],
)
def test_resuming_with_another_recipe(before, after, message, tmp_path):
    old, new = dense121.get_config(), dense121.get_config()
    old.update_from_flattened_dict(before)
    new.update_from_flattened_dict(after)
    meta = {"config": flatten_config(old), "fingerprint": "f"}
    with pytest.raises(UserError, match="(?s)other settings|another optimiser"):
        check_same_run(meta, new, "f", tmp_path)
    new.train.resume_changed = True
    if message is None:
        assert len(check_same_run(meta, new, "f", tmp_path)) == 1
    else:
        with pytest.raises(UserError, match=f"(?s){message}"):
            check_same_run(meta, new, "f", tmp_path)
