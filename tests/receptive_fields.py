"""Two independent ways to the receptive-field centres of a backbone's cells, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
from backbone_variables import constant_variables

WINDOWS = {"reduce_window_max", "reduce_window_sum", "reduce_window"}


def chain_geometry(module, size):
    """Follow every layer of the traced graph: centre' = centre + (kernel - 1) / 2 - padding, in strides so far.

    Returns:
      (stride, offset) in px of the feature map; branches that meet must agree on both.
    """
    images = jnp.zeros((1, size, size, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    closed = jax.make_jaxpr(module.apply)(variables, images)
    num_leaves = len(jax.tree.leaves(variables))
    (geometry,) = _walk(closed.jaxpr, [None] * num_leaves + [(1, 0.0)])
    return geometry


def _walk(jaxpr, inputs):
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        sources = [known.get(v) if not hasattr(v, "val") else None for v in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None and equation.primitive.name not in WINDOWS:
            outputs = _walk(getattr(inner, "jaxpr", inner), sources)
        else:
            outputs = [_step(equation, sources)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [known.get(v) if not hasattr(v, "val") else None for v in jaxpr.outvars]


def _step(equation, sources):
    met = {source for source in sources if source is not None}
    if not met:
        return None
    assert len(met) == 1, f"branches of different geometry meet in {equation}"
    (stride, offset) = met.pop()
    params = equation.params
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[2]]
        kernel = (kernel - 1) * params["rhs_dilation"][0] + 1
        strides, (low, _) = params["window_strides"][0], params["padding"][0]
    elif equation.primitive.name in WINDOWS:
        kernel, strides, (low, _) = (params[k][1] for k in ("window_dimensions", "window_strides", "padding"))
        kernel = (kernel - 1) * params["window_dilation"][1] + 1
    else:
        return stride, offset
    return stride * strides, offset + stride * ((kernel - 1) / 2 - low)


def gradient_centre(module, size, cells, num_images=3):
    """Return the (y, x) offset in px that interior cells' image gradient shows: centre of mass less stride * cell.

    The images are noise: in a constant one every maximum is a tie, and a tie goes to the first, not to the middle. Late
    maxima pick single cells, which scatters the centre by pixels, hence the mean over `cells` x `cells` and images.
    """
    images = np.random.default_rng(0).uniform(0, 1, (num_images, size, size, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x, v: module.apply(v, x)[:, cells, cells].sum()))
    mass = np.asarray(gradient(images, constant_variables(module)), np.float64).sum((0, 3))
    assert mass.min() >= 0
    positions = np.arange(size) - module.stride * (cells.start + cells.stop - 1) / 2
    return mass.sum(1) @ positions / mass.sum(), mass.sum(0) @ positions / mass.sum()
