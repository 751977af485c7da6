"""What a network repeats, traced once for all places of one shape.

Tracing costs Python's time for every operation, and a start with kept programs is half tracing. The operations that run
are the same with and without.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

traced_once = partial(jax.jit, inline=True)  # decorates functions of arrays, and of what `static_argnames` names


def trace_blocks_once(
    apply: Callable[[nn.Module, jax.Array], jax.Array],
) -> Callable[[nn.Module, jax.Array], jax.Array]:
    """Let `apply(block, x)` be traced once for all blocks of one kind and shape; XLA writes the calls out again.

    While initialising each block is traced by itself, for initialization.py reads the draws of the weights from the
    outermost function. Not around `remat`, whose custom gradient can't leave a traced call.
    """
    jitted = nn.jit(apply)
    return lambda block, x: (apply if block.is_initializing() else jitted)(block, x)
