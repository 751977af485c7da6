"""How far a cell of a feature map sees: every window of a traced network added up, for make_models_page.py."""

from typing import Any, NamedTuple

from jax.extend import core

WINDOWS = ("reduce_window_max", "reduce_window_sum", "reduce_window")


class Field(NamedTuple):
    """Where cell 0 looks along one axis: pixels low to high, and the px to the next cell."""

    stride: int
    low: int
    high: int

    @property
    def size(self) -> int:
        """Px, whatever of them lies beyond the image."""
        return self.high - self.low + 1


def find_field(jaxpr: core.Jaxpr, images: int) -> list[Field | None]:
    """Follow the images, the input of this number, through a jaxpr; None for outputs that do not depend on them.

    A window of k cells d apart, with `low` lines of padding before it, makes of pixels a ... b those from a - s low to
    b + s ((k - 1) d - low), s px a cell; where branches meet, the field reaches as far as any of them does.
    """
    return _walk(jaxpr, [Field(1, 0, 0) if i == images else None for i in range(len(jaxpr.invars))])


def _walk(jaxpr: core.Jaxpr, inputs: list[Field | None]) -> list[Field | None]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def look_up(variables: list[Any]) -> list[Field | None]:
        return [None if isinstance(variable, core.Literal) else known.get(variable) for variable in variables]

    for equation in jaxpr.eqns:
        sources = look_up(equation.invars)
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None and equation.primitive.name not in WINDOWS:
            outputs = _walk(getattr(inner, "jaxpr", inner), sources)
        else:
            outputs = [_step(equation, sources)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return look_up(jaxpr.outvars)


def _step(equation: Any, sources: list[Field | None]) -> Field | None:
    met = [source for source in sources if source is not None]
    if not met:
        return None
    stride, low, high = met[0].stride, min(field.low for field in met), max(field.high for field in met)
    params = equation.params
    if equation.primitive.name == "conv_general_dilated":
        size = equation.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[2]]
        strides, dilation, before = params["window_strides"][0], params["rhs_dilation"][0], params["padding"][0][0]
    elif equation.primitive.name in WINDOWS:
        size, strides, dilation = (params[f"window_{name}"][1] for name in ("dimensions", "strides", "dilation"))
        before = params["padding"][1][0]
    else:
        return Field(stride, low, high)
    return Field(stride * strides, low - stride * before, high + stride * ((size - 1) * dilation - before))
