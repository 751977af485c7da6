"""Arithmetic of a traced function. XLA does not tell it: a GPU's libraries are closed, a scan counts as one turn."""

import math
from typing import Any

import jax
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> int:
    """Return the multiplications and additions of all matrix products and convolutions, two for each pair.

    A convolution counts as if every cell of its kernel met a pixel (edges do not), an input spread out by zeros (the
    gradient of a stride) as if it were not. What is elementwise does not count.
    """
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    if equation.primitive.name == "dot_general":
        return _count_product(equation)
    if equation.primitive.name == "conv_general_dilated":
        return _count_convolution(equation)
    times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    return times * sum(count_flops(inner) for inner in _find_inner(list(equation.params.values())))


def _count_product(equation: core.JaxprEqn) -> int:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _count_convolution(equation: core.JaxprEqn) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    num_out = kernel[equation.params["dimension_numbers"].rhs_spec[0]]  # the rest: what each output sums over
    spread = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(out) * math.prod(kernel) // num_out // spread


def _find_inner(values: Any) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    leaves = jax.tree.leaves(values, is_leaf=lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr))
    closed = [leaf.jaxpr for leaf in leaves if isinstance(leaf, core.ClosedJaxpr)]
    return closed + [leaf for leaf in leaves if isinstance(leaf, core.Jaxpr)]
