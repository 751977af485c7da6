"""What is done to a batch on the device: train_step, eval_step, and the pixels' way in. Pure; jitted by the caller."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cxa_jax.array_types import Batch, Images, PyTree
from cxa_jax.data.augment import augment, image_keys, normalize_images, to_rgb
from cxa_jax.evidence import class_activation_map, grad_cam, linearized_evidence
from cxa_jax.losses import Loss, mean_loss_of_others, weighted_binary_cross_entropy
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.train_state import TrainState

# What the root key is folded with first: one number for each purpose, so that no two share a stream.
INIT, AUGMENT, DROPOUT, CONTROL = range(4)

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def augment_batch(root_key: jax.Array, step: jax.Array, batch: Batch, normalization: str, config: ConfigDict) -> Images:
    """Turn grey bytes [B, H, W, 1] into augmented training images [B, H, W, 3]; keys by (root, step, row)."""
    images = normalize_images(batch["image"], normalization)
    if config.enabled:
        keys = image_keys(jax.random.fold_in(root_key, AUGMENT), step, images.shape[0])
        images = augment(keys, images, config)
    return to_rgb(images, normalization)


def make_train_step(
    model: CardioXAttentionNet,
    tx: optax.GradientTransformation,
    root_key: jax.Array,
    class_weights: tuple[float, float],
    normalization: str,
    augment_config: ConfigDict,
    *,
    loss: Loss = weighted_binary_cross_entropy,
    attention_negative_weight: float = 0.0,
) -> TrainStep:
    """Return train_step(state, batch, rate_scale) -> (state, metrics): augment, forward, weighted loss, SGD.

    The loss is the mean of Eq. (1), or of another `loss`, class-weighted, over the rows whose mask is True; plus
    `attention_negative_weight` times the mean of W over the cells of the negatives among them. A network with a map for
    each finding adds the mean loss of the thirteen others (`batch["findings"]`). `metrics` holds `loss`, the sum of
    all, and `healthy`; see `TrainState.healthy` for what a loss or gradient that is not finite does.
    """

    def train_step(state: TrainState, batch: Batch, rate_scale: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        images = augment_batch(root_key, state.step, batch, normalization, augment_config)
        dropout_key = jax.random.fold_in(jax.random.fold_in(root_key, DROPOUT), state.step)

        def compute_loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            (logits, out), updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            value = mean_of_valid(loss(logits, batch["label"], class_weights), batch["mask"])
            if "finding_logits" in out:
                others = mean_loss_of_others(loss, out["finding_logits"], batch["findings"])
                value += mean_of_valid(others, batch["mask"])
            if attention_negative_weight:  # Eq. (9) does not see the level of W, so the loss alone asks nothing of it
                negative = batch["mask"] & (batch["label"] == 0)
                value += attention_negative_weight * mean_of_valid(jnp.mean(out["attention"], axis=(1, 2, 3)), negative)
            return value, updated["batch_stats"]

        (value, batch_stats), grads = jax.value_and_grad(compute_loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: rate_scale * update, updates)
        new_state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        healthy = state.healthy & jnp.isfinite(value) & jnp.isfinite(optax.global_norm(grads))
        new_state = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new_state, state)
        return new_state.replace(healthy=healthy), {"loss": value, "healthy": healthy}

    return train_step


def mean_of_valid(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of values [B] over rows whose mask [B] is True; 0 if there is none."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def make_eval_step(model: CardioXAttentionNet, normalization: str) -> Callable[[PyTree, Any], dict[str, jax.Array]]:
    """Return eval_step(variables, images uint8 [B, H, W, 1]) -> {'logit' [B], maps [B, h, w]}.

    The maps: `attention`, W in [0, 1]; `weights`, p of the pooling, its mean over channels where each has its own;
    `evidence`, the linearised class evidence of each cell, in logits; `grad_cam`, through pooling and head with p held
    fixed; with a linear head also `cam`, the class-activation map.
    """

    def eval_step(variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        logits, out = model.apply(
            variables, to_rgb(normalize_images(images, normalization), normalization), train=False
        )
        features, weights, pooled = out["features"], out["weights"], out["pooled"]
        head = partial(model.apply, variables, method="classify")
        maps = {
            "attention": out["attention"][..., 0],
            "weights": jnp.mean(weights, axis=-1),
            "evidence": linearized_evidence(head, features, weights, pooled),
            "grad_cam": grad_cam(lambda features: head(jnp.sum(weights * features, axis=(1, 2))), features),
        }
        if model.head == "linear":  # whose gradient is its kernel, at any pooled features
            maps["cam"] = class_activation_map(features, jax.grad(lambda row: head(row[None])[0])(pooled[0]))
        finding_logits = {name: out[name] for name in ("finding_logits",) if name in out}
        return {"logit": logits} | maps | finding_logits

    return eval_step
