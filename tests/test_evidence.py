"""Evidence maps: their sums, their signs, and what they become for simple heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxa_jax.evidence import (
    class_activation_map,
    complete_evidence,
    grad_cam,
    linearized_activation_map,
    linearized_evidence,
)
from cxa_jax.pooling import NOT_AVERAGES, NOT_SUMS, POOLINGS, gwap, pool

B, H, W, C = 3, 4, 5, 6
COMPLETE = sorted(set(POOLINGS) - NOT_AVERAGES)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, H, W, C))), jnp.asarray(rng.normal(scale=3, size=(B, H, W, 1))), rng


def make_mlp(rng, activation=jax.nn.elu):
    """Return a head as in Table 3, dense 128 (here 16) ELU and dense 1, with random parameters."""
    hidden, bias, out = (jnp.asarray(rng.normal(size=size)) for size in ((C, 16), (1, 16), (16, 1)))
    return lambda pooled: (activation(pooled @ hidden + bias) @ out)[:, 0] + 0.3


def head_gradient(head, pooled):
    return jax.grad(lambda f: jnp.sum(head(f)))(pooled)


@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_linearized_evidence_sums_to_the_linear_part(x64, name):
    features, logits, rng = draw(0)
    features = jnp.abs(features)  # the domain of gem
    pooled, p = POOLINGS[name](features, logits)
    head = make_mlp(rng)
    evidence = linearized_evidence(head, features, p, pooled)
    assert evidence.shape == (B, H, W)
    average = jnp.sum(p * features, axis=(1, 2))  # f itself, save for NOT_SUMS
    expected = jnp.sum(head_gradient(head, pooled) * average, axis=1)
    np.testing.assert_allclose(jnp.sum(evidence, axis=(1, 2)), expected, rtol=1e-11)
    if name not in NOT_SUMS:
        np.testing.assert_allclose(linearized_evidence(head, features, p), evidence, rtol=1e-8, atol=1e-10)


def test_linearized_evidence_is_the_derivative_with_respect_to_the_strength_of_a_cell(x64):
    features, logits, rng = draw(1)
    p = POOLINGS["amm"](features, logits)[1]
    head = make_mlp(rng)
    strength = jnp.ones((B, H, W, 1))
    expected = jax.grad(lambda s: jnp.sum(head(pool(s * features, p))))(strength)
    np.testing.assert_allclose(linearized_evidence(head, features, p), expected[..., 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_evidence_sums_to_the_difference_of_logits(x64, name):
    features, logits, rng = draw(2)
    pooled, p = POOLINGS[name](features, logits)
    baseline = jnp.asarray(rng.normal(size=(B, C)))

    def head(f):  # a polynomial of degree 5: 16 points integrate its gradient without error
        return jnp.sum(f, axis=1) ** 5 + f[:, 0] * f[:, 1] ** 2 - f[:, 2]

    evidence = complete_evidence(head, features, p, baseline)
    np.testing.assert_allclose(jnp.sum(evidence, axis=(1, 2)), head(pooled) - head(baseline), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["amm", "gap", "gmp"])
def test_complete_evidence_of_the_head_of_the_paper(name):
    with jax.enable_x64(True):
        features, logits, rng = draw(3)
        head64, baseline = make_mlp(rng), jnp.zeros((1, C))
        pooled, p = POOLINGS[name](features, logits)
        evidence = complete_evidence(head64, features, p, baseline)
        np.testing.assert_allclose(
            jnp.sum(evidence, axis=(1, 2)), head64(pooled) - head64(jnp.zeros((B, C))), rtol=1e-3, atol=1e-2
        )
        one_row = complete_evidence(head64, features[:1], p[:1], baseline)
        np.testing.assert_allclose(one_row, evidence[:1], rtol=1e-10, atol=1e-12)


@functools.partial(jax.jit, static_argnames="name")
def evidence_and_sums(name, features, logits, kernels, baseline):
    """Return pairs that must be equal, for an MLP head and for a linear one."""

    def mlp(f):  # a polynomial again, which 16 points integrate without error
        hidden = f @ kernels[0]
        return ((hidden + hidden**2 / 3 - hidden**3 / 9) @ kernels[1])[:, 0]

    def linear(f):
        return (f @ kernels[2])[:, 0] + 0.7

    pooled, p = POOLINGS[name](features, logits)
    baselines = jnp.broadcast_to(baseline, pooled.shape)
    shares = jnp.sum(p, axis=-1) if p.shape[-1] == 1 else None
    cam = class_activation_map(features, kernels[2][:, 0])
    total = lambda c: jnp.sum(c, axis=(1, 2))  # noqa: E731
    pairs = {
        "linearised": (
            total(linearized_evidence(mlp, features, p, pooled)),
            jnp.sum(head_gradient(mlp, pooled) * pooled, axis=1),
        ),
        "complete": (total(complete_evidence(mlp, features, p, baseline)), mlp(pooled) - mlp(baselines)),
        "linear": (total(complete_evidence(linear, features, p, baseline)), linear(pooled) - linear(baselines)),
    }
    if shares is not None:
        pairs["cam"] = (linearized_evidence(linear, features, p), shares * cam)
    return pairs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["amm", "gap", "gmp"])
@settings(max_examples=5, deadline=None, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_evidence_adds_up_in_every_type(name, dtype, seed):
    with jax.enable_x64(True):
        features, logits, rng = draw(seed)
        features = features / 4  # sums of terms of size 1
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        kernels = [jnp.asarray(rng.normal(scale=0.3, size=size), wide) for size in ((C, 16), (16, 1), (C, 1))]
        baseline = jnp.asarray(rng.normal(scale=0.3, size=(1, C)), wide)
        pairs = evidence_and_sums(name, features.astype(dtype), logits.astype(dtype), kernels, baseline)
        for title, (got, expected) in pairs.items():
            assert got.dtype == wide
            tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-6}
            np.testing.assert_allclose(got, expected, err_msg=title, **tolerance)


def test_gem_is_complete_from_zero_and_lse_is_not(x64):
    features, _, _ = draw(4)
    features = jnp.abs(features)
    totals = {}
    for name in ("gem", "lse"):
        pooled, p = POOLINGS[name](features, None)
        totals[name] = jnp.sum(complete_evidence(lambda f: jnp.sum(f, axis=1) ** 2, features, p, jnp.zeros((1, C))))
        totals[name] -= jnp.sum(jnp.sum(pooled, axis=1) ** 2)
    assert abs(totals["gem"]) < 1e-9 and abs(totals["lse"]) > 1


def test_a_linear_head_gives_the_class_activation_map(x64):
    features, logits, rng = draw(5)
    kernel = jnp.asarray(rng.normal(size=C))
    cam = class_activation_map(features, kernel)
    np.testing.assert_allclose(cam, np.asarray(features) @ np.asarray(kernel), rtol=1e-12, atol=1e-12)

    def head(f):
        return f @ kernel + 0.7

    average, p = POOLINGS["gap"](features, None)
    np.testing.assert_allclose(jnp.mean(cam, axis=(1, 2)) + 0.7, head(average), rtol=1e-12)
    np.testing.assert_allclose(linearized_evidence(head, features, p), cam / (H * W), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        complete_evidence(head, features, p, jnp.zeros((1, C))), cam / (H * W), rtol=1e-12, atol=1e-12
    )
    attended = POOLINGS["amm"](features, logits)[1]
    np.testing.assert_allclose(
        linearized_evidence(head, features, attended), attended[..., 0] * cam, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["amm", "gap", "gmp"])
def test_the_map_of_any_head_is_what_a_cell_does_to_the_logit_at_the_pooled_features(x64, name):
    features, logits, rng = draw(12)
    head, (pooled, p) = make_mlp(rng), POOLINGS[name](features, logits)
    found = np.asarray(linearized_activation_map(head, features, pooled))
    gradient = jax.grad(lambda f: jnp.sum(head(f)))(pooled)
    expected = np.zeros((B, H, W))
    for image, row, column in np.ndindex(B, H, W):
        cell = features[image, row, column]
        expected[image, row, column] = sum(float(g) * float(f) for g, f in zip(gradient[image], cell, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    # as a derivative: of the logit, while f moves towards a cell's features; forwards, and by differences
    moved = features.transpose(1, 2, 0, 3).reshape(H * W, B, C)
    forwards = jax.vmap(lambda cell: jax.jvp(head, (pooled,), (cell,))[1])(moved)
    np.testing.assert_allclose(found.reshape(B, -1).T, forwards, rtol=1e-10, atol=1e-12)
    step = 1e-6
    differences = (jax.vmap(head)(pooled + step * moved) - jax.vmap(head)(pooled - step * moved)) / (2 * step)
    np.testing.assert_allclose(found.reshape(B, -1).T, differences, rtol=1e-5, atol=1e-6)
    if p.shape[-1] == 1:  # the evidence without p, where it is the same of all channels
        share = linearized_evidence(head, features, p, pooled)
        np.testing.assert_allclose(p[..., 0] * found, share, rtol=1e-10, atol=1e-12)


def test_the_map_of_a_linear_head_is_the_classic_one_wherever_it_is_linearised(x64):
    features, _, rng = draw(13)
    kernel = jnp.asarray(rng.normal(size=C))
    for pooled in (jnp.mean(features, axis=(1, 2)), jnp.asarray(rng.normal(size=(B, C)))):
        found = linearized_activation_map(lambda f: f @ kernel + 0.7, features, pooled)
        np.testing.assert_allclose(found, class_activation_map(features, kernel), rtol=1e-12, atol=1e-12)


def test_the_map_of_any_head_is_float32_inside_and_treats_each_image_alone():
    features, _, rng = draw(14)
    head, pooled = make_mlp(rng), jnp.mean(features, axis=(1, 2))
    rounded = features.astype(jnp.bfloat16), pooled.astype(jnp.bfloat16)
    found = linearized_activation_map(head, *rounded)
    wide = [array.astype(jnp.float32) for array in rounded]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, linearized_activation_map(head, *wide), rtol=1e-5, atol=1e-5)
    alone = linearized_activation_map(head, wide[0][1:2], wide[1][1:2])
    np.testing.assert_allclose(found[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["amm", "gap"])
def test_the_sign_says_what_a_cell_does_to_the_logit(x64, name):
    features, logits, rng = draw(6)
    head, baseline = make_mlp(rng, jnp.tanh), jnp.zeros((1, C))
    features = features.at[:, 1, 2].set(4 * head_gradient(head, jnp.zeros((B, C))))  # this cell pushes the logit up
    features = features.at[:, 2, 3].set(-features[:, 1, 2])  # and this one down
    p = POOLINGS[name](features, logits)[1]
    for evidence in (
        linearized_evidence(lambda f: head(0.01 * f), features, p),
        complete_evidence(lambda f: head(0.01 * f), features, p, baseline),
    ):
        assert (evidence[:, 1, 2] > 0).all() and (evidence[:, 2, 3] < 0).all()
    silenced = features.at[:, 1, 2].set(0.0)
    assert (head(0.01 * pool(silenced, p)) < head(0.01 * pool(features, p))).all()


def test_grad_cam_drops_the_attention(x64):
    features, logits, rng = draw(7)
    head = make_mlp(rng)
    pooled, p = POOLINGS["amm"](features, logits)
    cam = grad_cam(lambda features: head(pool(features, p)), features, rectify=False)
    expected = jnp.sum(features * head_gradient(head, pooled)[:, None, None, :], axis=3) / (H * W)
    np.testing.assert_allclose(cam, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(p[..., 0] * cam * (H * W), linearized_evidence(head, features, p), rtol=1e-9, atol=1e-12)
    rectified = grad_cam(lambda features: head(pool(features, p)), features)
    np.testing.assert_allclose(rectified, np.maximum(cam, 0))


def test_grad_cam_through_the_attention_branch_is_the_textbook_formula(x64):
    features, _, rng = draw(8)
    head, kernel = make_mlp(rng), jnp.asarray(rng.normal(size=(C, 1)))

    def feature_head(features):
        return head(gwap(features, features @ kernel))

    gradient = jax.jacrev(feature_head)(features)[np.arange(B), np.arange(B)]
    expected = np.maximum(np.einsum("bhwk,bk->bhw", features, np.mean(gradient, axis=(1, 2))), 0)
    np.testing.assert_allclose(grad_cam(feature_head, features), expected, rtol=1e-10, atol=1e-12)


def test_masked_cells_have_no_evidence(x64):
    features, logits, rng = draw(9)
    mask = jnp.ones((B, H, W), bool).at[:, 0].set(False)
    p = POOLINGS["amm"](features, logits, mask=mask)[1]
    assert not complete_evidence(make_mlp(rng), features, p, jnp.zeros((1, C)))[:, 0].any()


def test_float32_inside_and_under_jit():
    features, logits, rng = draw(10)
    head = make_mlp(rng)
    p = POOLINGS["amm"](features, logits)[1]
    rounded = features.astype(jnp.bfloat16)
    evidence = jax.jit(lambda x, p: complete_evidence(head, x, p, jnp.zeros((1, C))))(rounded, p)
    assert evidence.dtype == jnp.float32
    expected = complete_evidence(head, rounded.astype(jnp.float32), p, jnp.zeros((1, C)))
    np.testing.assert_allclose(evidence, expected, rtol=1e-4, atol=1e-5)


def test_maps_of_several_classes_go_one_at_a_time():
    features, _, rng = draw(11)
    with pytest.raises(ValueError, match=r"one class's map at a time"):
        linearized_evidence(make_mlp(rng), features, jnp.ones((B, H, W, 2)))
