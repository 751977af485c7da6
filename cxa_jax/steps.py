"""What is done to a batch on the device: train_step, moments_step, eval_step, and the pixels' way in.

Pure; jitted by the caller.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cxa_jax.array_types import Batch, Images, PyTree
from cxa_jax.averaged_copies import average_copies, choose_copies
from cxa_jax.data.augment import augment, image_keys, normalize_images, to_rgb
from cxa_jax.evidence import grad_cam, linearized_activation_map, linearized_evidence
from cxa_jax.losses import Loss, mean_loss_of_others, weighted_binary_cross_entropy
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.optimizer import average_step_size
from cxa_jax.pooling import FEATURES_ONLY
from cxa_jax.train_state import TrainState

# What the root key is folded with first: one number for each purpose, so that no two share a stream.
INIT, AUGMENT, DROPOUT, CONTROL = range(4)

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
MomentsStep = Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]


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
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Return train_step(state, batch, rate_scale) -> (state, metrics): augment, forward, weighted loss, update.

    The loss is the mean of Eq. (1), or of another `loss`, class-weighted, over the rows whose mask is True; plus
    `attention_negative_weight` times the mean of W over the cells of the negatives among them. A network with a map for
    each finding adds the mean loss of the thirteen others (`batch["findings"]`). `metrics` holds `loss`, the sum of
    all, and `healthy`; see `TrainState.healthy` for what a loss or gradient that is not finite does.

    With `ema_decay` > 0 the state's averaged parameters follow the new ones; see `average_step_size`.

    With `accumulate_steps` k > 1 the batch passes through the network in k parts, one by one, in the memory of one.
    Loss and gradient are still those of the whole batch: every mean is over its rows. Two things differ from k = 1:
    batch norm normalises with the moments of a part and moves its running averages k times, and dropout draws for each
    part anew.
    """

    def train_step(state: TrainState, batch: Batch, rate_scale: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        images = augment_batch(root_key, state.step, batch, normalization, augment_config)
        dropout_key = jax.random.fold_in(jax.random.fold_in(root_key, DROPOUT), state.step)

        num_valid = jnp.sum(batch["mask"])
        num_negative = jnp.sum(batch["mask"] & (batch["label"] == 0))

        def compute_loss(params: PyTree, batch_stats: PyTree, part: Batch, dropout_key: jax.Array):
            (logits, out), updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                part["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            value = mean_of_valid(loss(logits, part["label"], class_weights), part["mask"], num_valid)
            if "finding_logits" in out:
                others = mean_loss_of_others(loss, out["finding_logits"], part["findings"])
                value += mean_of_valid(others, part["mask"], num_valid)
            if attention_negative_weight:  # Eq. (9) does not see the level of W, so the loss alone asks nothing of it
                negative, darkness = part["mask"] & (part["label"] == 0), jnp.mean(out["attention"], axis=(1, 2, 3))
                value += attention_negative_weight * mean_of_valid(darkness, negative, num_negative)
            return value, updated.get("batch_stats", {})

        compute_grads = jax.value_and_grad(compute_loss, has_aux=True)
        inputs = batch | {"image": images}
        if accumulate_steps == 1:
            (value, batch_stats), grads = compute_grads(state.params, state.batch_stats, inputs, dropout_key)
        else:
            keys = jax.random.split(dropout_key, accumulate_steps)
            parts = split_batch(inputs, accumulate_steps), keys
            value, batch_stats, grads = _accumulate(compute_grads, state.params, state.batch_stats, parts)
        healthy = state.healthy & jnp.isfinite(value) & is_finite(grads)

        def update() -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda update: rate_scale * update, updates)
            params, averaged, step = optax.apply_updates(state.params, updates), {}, state.step + 1
            if ema_decay:
                averaged = optax.incremental_update(params, state.averaged_params, average_step_size(ema_decay, step))
            return state.replace(
                step=step, params=params, batch_stats=batch_stats, opt_state=opt_state, averaged_params=averaged
            )

        new_state = update_if(healthy, update, state)
        return new_state.replace(healthy=healthy), {"loss": value, "healthy": healthy}

    return train_step


def _accumulate(
    compute_grads: Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]],
    params: PyTree,
    batch_stats: PyTree,
    parts: tuple[Batch, jax.Array],
) -> tuple[jax.Array, PyTree, PyTree]:
    """Return the sum of the parts' losses, the running averages after the last, and the sum of the gradients."""

    def add(carry: tuple[PyTree, PyTree], part: tuple[Batch, jax.Array]) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        batch_stats, grads = carry
        (value, batch_stats), new = compute_grads(params, batch_stats, *part)
        return (batch_stats, jax.tree.map(jnp.add, grads, new)), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    (batch_stats, grads), values = jax.lax.scan(add, (batch_stats, zeros), parts)
    return jnp.sum(values), batch_stats, grads


def update_if(condition: jax.Array, update: Callable[[], PyTree], old: PyTree) -> PyTree:
    """Return update() where the condition holds, else `old`, of the same types and shapes.

    On a processor by a conditional, which is less to compile than a selection for each array. On an accelerator by
    selections: it would have to wait for its host to read the condition.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, update, lambda: old)
    return jax.tree.map(lambda new, old: jax.lax.select(condition, new, old), update(), old)


def is_finite(tree: PyTree) -> jax.Array:
    """Tell whether every number of a tree of float arrays is finite, and so small that the sum of all squares is.

    All of them are looked at as one array, since XLA makes a program, or two, of each that is reduced. A product is
    summed in one go on a processor; truth values would be written, and reduced in steps.
    """
    numbers = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return jnp.isfinite(jnp.vdot(numbers, numbers))


def split_batch(batch: Batch, num_parts: int) -> Batch:
    """Return arrays [B, ...] as [num_parts, B / num_parts, ...], part i holding rows i, i + num_parts, ...

    So every device, which holds neighbouring rows, keeps its share of every part.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_parts, *x.shape[1:]), 0, 1), batch)


def mean_of_valid(values: jax.Array, mask: jax.Array, num_valid: jax.Array) -> jax.Array:
    """Return the sum of values [B] over rows whose mask [B] is True, divided by `num_valid`; 0 if that is 0.

    `num_valid` is the number of such rows, in the whole batch if this is a part of it.
    """
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(num_valid, 1)


def with_momentum(model: CardioXAttentionNet, momentum: float) -> CardioXAttentionNet:
    """Return the network with this momentum in each batch norm; with 0 a pass leaves its batch's own moments behind."""
    return model.clone(batch_norm_momentum=momentum, backbone=model.backbone.clone(batch_norm_momentum=momentum))


def make_moments_step(model: CardioXAttentionNet, normalization: str) -> MomentsStep:
    """Return moments_step(params, moments, num_batches, images uint8 [B, H, W, 1]) -> moments of one batch more.

    `moments` is a tree as `batch_stats`, of the `num_batches` before: zeros where that is 0. The images pass through as
    in training, each batch normalised by its own moments, but neither augmented nor dropped out. Of K batches come out
    the mean of the batches' means, and the population variance: the mean of var + mean^2 over the batches, less the
    square of that mean ("precise BN", arXiv 2105.07576), added up without the cancellation (Chan et al. 1979).
    """
    passing = with_momentum(model, 0.0).clone(dropout=0.0)

    def moments_step(params: PyTree, moments: PyTree, num_batches: jax.Array, images: jax.Array) -> PyTree:
        inputs = to_rgb(normalize_images(images, normalization), normalization)
        variables = {"params": params, "batch_stats": moments}
        _, updated = passing.apply(variables, inputs, train=True, mutable=["batch_stats"])
        share = 1 / (num_batches + 1)

        def add(moments: PyTree, batch: PyTree) -> PyTree:
            if "mean" not in batch:
                return {name: add(moments[name], batch[name]) for name in batch}
            difference = batch["mean"] - moments["mean"]
            between = share * (1 - share) * jnp.square(difference)
            return {
                "mean": moments["mean"] + share * difference,
                "var": moments["var"] + share * (batch["var"] - moments["var"]) + between,
            }

        return add(moments, updated["batch_stats"])

    return moments_step


def make_eval_step(
    model: CardioXAttentionNet, normalization: str, num_copies: int = 1
) -> Callable[[PyTree, Any], dict[str, jax.Array]]:
    """Return eval_step(variables, images uint8 [B, H, W, 1]) -> {'logit' [B], maps [B, h, w]}.

    With an attention map that was learnt also `attention_logits`, its z [B, h, w].

    The maps: `attention`, W in [0, 1]; `weights`, p of the pooling, its mean over channels where each has its own;
    `evidence`, the linearised class evidence of each cell, in logits; `grad_cam`, through pooling and head with p held
    fixed; `cam`, the class-activation map of a linear head, of another one linearised at the pooled features.

    With more than one of `num_copies` logits and maps are averages over copies of each image
    (`cxa_jax.averaged_copies`); then no map adds up to the logit exactly.
    """

    def look(variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        logits, out = model.apply(variables, to_rgb(images, normalization), train=False)
        features, weights, pooled = out["features"], out["weights"], out["pooled"]
        head = partial(model.apply, variables, method="classify")
        maps = {
            "attention": out["attention"][..., 0],
            "weights": jnp.mean(weights, axis=-1),
            "evidence": linearized_evidence(head, features, weights, pooled),
            "cam": linearized_activation_map(head, features, pooled),
            "grad_cam": grad_cam(lambda features: head(jnp.sum(weights * features, axis=(1, 2))), features),
        }
        if model.pooling not in FEATURES_ONLY:
            maps["attention_logits"] = out["attention_logits"][..., 0]
        finding_logits = {name: out[name] for name in ("finding_logits",) if name in out}
        return {"logit": logits} | maps | finding_logits

    def eval_step(variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        images, stride, offset = normalize_images(images, normalization), model.backbone.stride, model.backbone.offset
        copies = choose_copies(num_copies, stride, images.shape[1:3])
        return average_copies(partial(look, variables), images, copies, stride, offset)

    return eval_step
