"""What XLA made of the train step: facts that hold on a busy machine too, where a clock says little."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_pooling import literal_graph

from cxa_jax.data.fake_xrays import make_fake_dataset
from cxa_jax.hlo import ANALYSIS_ONLY, analyze_memory, count_collectives, count_traffic, parse_instructions
from cxa_jax.measurements import lower_train_step, make_step_batch
from cxa_jax.pooling import gwap
from cxa_jax.run import create_run
from cxa_jax.sharding import replicated

BATCH = 8
IMPLEMENTATIONS = ["fused", pytest.param("plain", marks=pytest.mark.slow)]
SHARDED = pathlib.Path(__file__).with_name("sharded_hlo.py")
TEXT = """
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %start = (f32[4,8]{1,0}, bf16[3]{0}) all-reduce-start(%p, %q), replica_groups={}
  %done = (f32[4,8]{1,0}, bf16[3]{0}) all-reduce-done(%start)
  %gather = s32[16]{0} all-gather(%r), dimensions={0}
  %flag = pred[] constant(false)
  ROOT %out = f32[4,8]{1,0:T(8,128)} add(%p, %p)
}
"""


def lower(backbone="tiny", **fields):
    config = tiny.make_config(**{"train.batch_size": BATCH, "model.backbone": backbone, **fields})
    run = create_run(config, make_fake_dataset(config.data.image_size, 8))
    return run, lower_train_step(run, BATCH)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def step(request):
    run, lowered = lower(**{"model.implementation": request.param})
    compiled = lowered.compile(ANALYSIS_ONLY)
    return run, lowered, compiled, parse_instructions(compiled.as_text())


def test_text_is_parsed():
    instructions = parse_instructions(TEXT)
    assert [i.op for i in instructions] == [
        "parameter", "all-reduce-start", "all-reduce-done", "all-gather", "constant", "add"
    ]  # fmt: skip
    assert instructions[1].arrays == (("f32", (4, 8)), ("bf16", (3,)))
    assert [i.num_bytes for i in instructions] == [128, 134, 134, 64, 1, 128]
    assert count_collectives(TEXT) == {
        "all-reduce": {"count": 1, "arrays": 2, "bytes": 134},
        "all-gather": {"count": 1, "arrays": 1, "bytes": 64},
    }


LOOPS = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%p), to_apply=%add
}

%nothing (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

%outer (p: f32[4]) -> f32[4] {
  %while.1 = f32[4]{0} while(%p), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %choice = f32[4]{0} conditional(%i, %p, %p), branch_computations={%body.1, %nothing}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %often = f32[4]{0} while(%p), condition=%c, body=%outer, backend_config={"a":{"b":"1"},"known_trip_count":{"n":"5"}}
  ROOT %who_knows = f32[4]{0} while(%often), condition=%c, body=%body.1
}
"""


def test_what_is_exchanged_in_loops_counts_as_often_as_it_runs():
    """3 turns inside each of 5, the branch in each of 5, and the loop whose turns XLA does not know."""
    assert count_collectives(LOOPS)["all-reduce"] == {"count": 21, "arrays": 21, "bytes": 21 * 16}


def test_traffic_of_a_matrix_product():
    a, b = jnp.ones((64, 32)), jnp.ones((32, 16))
    compiled = jax.jit(jnp.dot).lower(a, b).compile()
    assert count_traffic(compiled, num_devices=1) == 4 * (64 * 32 + 32 * 16 + 64 * 16)


@pytest.mark.parametrize("turn", [lambda x: x @ x, jnp.tanh])
def test_traffic_of_loops_is_unknown(turn):
    """XLA counts a loop's body once, and of some loops not even how many turns they take."""
    a = jnp.ones((128, 128))

    def repeat(a, n=7):
        return jax.lax.fori_loop(0, n, lambda _, x: turn(x), a)

    assert count_traffic(jax.jit(repeat).lower(a).compile(), num_devices=1) is None
    assert count_traffic(jax.jit(repeat).lower(a, 7).compile(), num_devices=1) is None


def test_text_of_something_else_is_refused():
    """Nothing exchanged and nothing understood are not the same."""
    with pytest.raises(ValueError, match="ENTRY"):
        count_collectives("HloModule m")


def test_nothing_is_computed_in_float64(step):
    assert not {type_ for i in step[3] for type_, _ in i.arrays} & {"f64", "c128"}


def test_grey_bytes_cross_and_nothing_larger(step):
    batch = jax.tree.leaves(step[2].in_avals[0][1])
    assert sorted((str(aval.dtype), aval.shape) for aval in batch) == [
        ("bool", (BATCH,)), ("int32", (BATCH,)), ("uint8", (BATCH, tiny.SIZE, tiny.SIZE, 1))
    ]  # fmt: skip


def test_the_state_is_updated_in_place(step):
    run, _, compiled, _ = step
    memory = analyze_memory(compiled)
    assert memory["aliased"] >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
    assert memory["all"] == memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temp"]


SPREADS = {  # ways to give all channels a copy of p
    "multiply": lambda features, p: jnp.sum(p * features, axis=(1, 2)),
    "repeat": lambda features, p: jnp.einsum("bhwc,bhwc->bc", features, jnp.repeat(p, features.shape[3], axis=3)),
    "tile": lambda features, p: jnp.sum(features * jnp.tile(p, (1, 1, 1, features.shape[3])), axis=(1, 2)),
    "ones": lambda features, p: jnp.sum(features * (p @ jnp.ones((1, features.shape[3]))), axis=(1, 2)),
}


def find_spreads(lowered, num_cells, num_channels):
    """Return the operations that make an array of all cells and channels from one that has the cells alone.

    The gradient of the features, p times that of f, is such an array too, but f's gradient has rows and channels.
    """
    found = []
    for operands, result in re.findall(r": \((.*)\) -> (tensor<\S+>)", lowered.as_text()):
        *sizes, size = (int(np.prod([int(side) for side in shape.split("x")[:-1]]))
                        for shape in re.findall(r"tensor<([^>]*)>", operands + result))  # fmt: skip
        if size == num_cells * num_channels and num_cells in sizes and max(sizes) <= max(num_cells, num_channels):
            found.append((operands, result))
    return found


@pytest.mark.parametrize("spread", [literal_graph, *SPREADS.values()], ids=["convolution", *SPREADS])
def test_every_way_to_spread_the_attention_is_found(spread):
    features, logits = jnp.ones((BATCH, 2, 2, 192)), jnp.ones((BATCH, 2, 2, 1))
    assert find_spreads(jax.jit(spread).lower(features, logits), BATCH * 4, 192)

    def loss(features, logits):
        return jnp.sum(gwap(features, logits) ** 2)

    assert not find_spreads(jax.jit(jax.grad(loss, (0, 1))).lower(features, logits), BATCH * 4, 192)


def test_attention_is_never_spread_over_the_channels(step):
    """The paper's convolution of ones makes W [B, h, w, C]; here the pooling contracts instead."""
    run, lowered, *_ = step
    assert find_spreads(lowered, BATCH * 4, run.model.backbone.num_features) == []


def test_no_transposes_of_feature_maps(step):
    """A layout change of an image-sized array costs as much as a layer; weights may be turned, they are small."""
    run, _, _, instructions = step
    largest_kernel = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state.params))
    large = [i.arrays for i in instructions if i.op == "transpose" and i.num_bytes > largest_kernel]
    # XLA:CPU turns both operands of each 3x3 and 7x7 kernel's gradient in the plain graph.
    assert len(large) <= (0 if run.model.backbone.implementation == "fused" else 2 * 12)


def test_steps_compile_once():
    run = create_run(tiny.make_config(), make_fake_dataset(tiny.SIZE, 16))
    state, batch = run.create_state(), make_step_batch(run)
    for scale in (1.0, 1.0, 0.3, 0.09):  # the plateau's scale is an argument, no constant
        rate_scale = jax.device_put(np.float32(scale), replicated(run.mesh))
        state, _ = run.train_step(state, batch, rate_scale, run.root_key)
    assert run.train_step._cache_size() == 1


def temp_bytes(backbone, implementation, **fields):
    _, lowered = lower(backbone, **{"model.implementation": implementation}, **fields)
    return analyze_memory(lowered.compile(ANALYSIS_ONLY))["temp"]


@pytest.mark.slow
def test_fused_densenet121_needs_three_quarters_of_the_memory():
    fields = {"data.image_size": 128}
    assert temp_bytes("densenet121", "fused", **fields) <= 0.75 * temp_bytes("densenet121", "plain", **fields)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_devices_exchange_sums_alone(implementation):
    """Gradients once, and each batch norm's moments: no activation, no parameter is gathered or moved."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SHARDED), implementation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["devices"] == 4
    assert found["replicated"]  # the next step's input, as it is
    sums = found["collectives"].pop("all-reduce")
    # Forward two moments, backward two sums of each channel of a norm; statistics hold two numbers for each.
    assert found["params"] <= sums["bytes"] <= found["params"] + 2 * found["statistics"] + 4096
    assert sums["count"] <= 2 * found["norms"] + 2  # all gradients at once, the loss, and each norm's sums
    assert not found["collectives"]
