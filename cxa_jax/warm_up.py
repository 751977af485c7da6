"""The train step, traced and compiled before there is anything to give it."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled, Lowered, Traced

from cxa_jax.data.pipeline import read_example
from cxa_jax.garbage import keeping_garbage
from cxa_jax.run import Run
from cxa_jax.sharding import replicated, split


class StepProgram(NamedTuple):
    """A compiled train step, and the seconds that tracing and compiling it took."""

    compiled: Compiled
    trace_s: float
    compile_s: float


def lower_train_step(run: Run, batch_size: int) -> Lowered:
    """Trace and lower training's own step for a batch size; nothing is put on a device."""
    return run.train_step.lower(*_describe_arguments(run, batch_size))


def trace_train_step(run: Run, batch_size: int) -> Traced:
    """Trace training's own step for a batch size."""
    return run.train_step.trace(*_describe_arguments(run, batch_size))


def _describe_arguments(run: Run, batch_size: int) -> tuple[Any, ...]:
    """The arguments of a train step, shapes in place of arrays."""
    sharding = split(run.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *values.shape[1:]), values.dtype, sharding=sharding)
        for name, values in run.select_inputs(read_example(run.dataset.splits["train"])).items()
    }
    rate_scale = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(run.mesh))
    return run.abstract_state, batch, rate_scale, run.root_key


@contextlib.contextmanager
def compiling_train_step(run: Run) -> Iterator[concurrent.futures.Future[StepProgram]]:
    """Trace the train step, compile it while the body runs, and wait for it: the first call then finds it compiled.

    XLA compiles without the interpreter's lock, so the body can draw the state's weights meanwhile.
    """
    start = time.perf_counter()
    with keeping_garbage():
        lowered = lower_train_step(run, run.config.train.batch_size)
    trace_s = time.perf_counter() - start
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        program = pool.submit(_compile, lowered, trace_s)
        yield program
        program.result()


def _compile(lowered: Lowered, trace_s: float) -> StepProgram:
    start = time.perf_counter()
    return StepProgram(lowered.compile(), trace_s, time.perf_counter() - start)
