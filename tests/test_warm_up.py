import jax
import numpy as np
import tiny

from cxa_jax.measurements import make_step_batch
from cxa_jax.run import create_run
from cxa_jax.sharding import replicated
from cxa_jax.warm_up import compiling_train_step

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_the_first_step_finds_itself_compiled():
    run = create_run(tiny.make_config(), tiny.make_dataset())
    with compiling_train_step(run) as program:
        state = run.create_state()
    batch, rate_scale = make_step_batch(run), jax.device_put(np.float32(1), replicated(run.mesh))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    jax.jit(lambda x: x + 1)(np.ones(7))
    assert COMPILED in compiled  # the listener hears of compilations
    compiled.clear()
    state, metrics = run.train_step(state, batch, rate_scale, run.root_key)
    assert np.isfinite(metrics["loss"]) and int(state.step) == 1
    assert COMPILED not in compiled
    assert program.result().compile_s > 0
