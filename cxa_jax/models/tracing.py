"""Operations that a network repeats, traced once for all places of one shape.

Tracing costs Python's time for every operation, and a start with kept programs is half tracing. The traced operations
are written where the call stands, so the program is the same with and without.
"""

from functools import partial

import jax

traced_once = partial(jax.jit, inline=True)  # decorates functions of arrays, and of what `static_argnames` names
