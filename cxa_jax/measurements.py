"""The single measurements of a benchmark. Each takes a Run, so what is timed is what training runs."""

import dataclasses
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jax.stages import Compiled
from tqdm import tqdm

from cxa_jax.array_types import Batch
from cxa_jax.data.fake_xrays import prepare_fake_split
from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.hlo import ANALYSIS_ONLY, analyze_memory
from cxa_jax.run import Run
from cxa_jax.sharding import create_mesh, put_batch, replicated
from cxa_jax.steps import augment_batch, make_eval_step
from cxa_jax.timing import summarize, time_calls
from cxa_jax.train_state import TrainState
from cxa_jax.warm_up import lower_train_step

log = logging.getLogger(__name__)

RECORD_BYTES = 128 << 20  # of fake images on disk
INFERENCE_BATCHES = (1, 16)
NUM_ROUNDS = 2  # of step alone and pipeline + step in turn, so that a slow spell of the machine hits both
MAX_LARGEST_BATCH = 8192
MAX_COMPILATIONS = 5  # of the search for the largest batch
LARGEST_BATCH_PRECISION = 1.05  # not worth another compilation

CompiledStep = Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_step_batch(run: Run) -> dict[str, jax.Array]:
    """Return one training batch of the run's data on the devices."""
    records, size = run.dataset.splits["train"], run.config.train.batch_size
    batch = next(make_train_iterator(records, run.config.data, batch_size=size, seed=0))
    return put_batch(run.select_inputs(batch), run.mesh)


def run_steps(
    run: Run, step: CompiledStep, state: TrainState, next_batch: Callable[[], Batch], num_steps: int, bar: tqdm
) -> tuple[TrainState, np.ndarray, np.ndarray]:
    """Train as `train_epoch` does: while the device works on a step, the host fetches the metrics of the one before.

    Returns:
      The state; seconds from one step's end to the next one's, [num_steps]; of these, seconds in `next_batch`. One step
      more is run first, to fill the queue, and does not count.
    """
    rate_scale = jax.device_put(np.float32(1), replicated(run.mesh))
    ends, loading, pending = [], [], None
    for _ in range(num_steps + 1):
        start = time.perf_counter()
        batch = next_batch()
        loading.append(time.perf_counter() - start)
        state, metrics = step(state, batch, rate_scale, run.root_key)
        if pending is not None:
            float(pending["loss"])
            ends.append(time.perf_counter())
        pending = metrics
        bar.update(run.config.train.batch_size)
    float(pending["loss"])
    ends.append(time.perf_counter())
    return state, np.diff(ends), np.array(loading[1:])


def measure_steps(run: Run, step: CompiledStep, state: TrainState, bar: tqdm) -> tuple[TrainState, dict[str, Any]]:
    """Measure the step on a batch that lies on the device, and the same step fed by the pipeline, in turn.

    Returns:
      The state; 'train' (the step alone), 'pipeline_and_step', and 'pipeline' (alone).
    """
    batch, options = make_step_batch(run), run.config.benchmark
    state, *_ = run_steps(run, step, state, lambda: batch, options.num_warmup, bar)
    alone, together, loading = [], [], []
    with tempfile.TemporaryDirectory(prefix="cxa_jax_benchmark_") as folder:
        stored = _store_records(run, pathlib.Path(folder))
        records, size = stored.dataset.splits["train"], run.config.train.batch_size
        iterator = make_train_iterator(records, run.config.data, batch_size=size, seed=0)

        def load() -> dict[str, jax.Array]:
            return put_batch(stored.select_inputs(next(iterator)), run.mesh)

        for _ in range(NUM_ROUNDS):
            num_steps = -(-options.num_steps // NUM_ROUNDS)
            state, seconds, _ = run_steps(run, step, state, lambda: batch, num_steps, bar)
            alone.append(seconds)
            state, seconds, waits = run_steps(run, step, state, load, num_steps, bar)
            together.append(seconds)
            loading.append(waits)
        pipeline = _measure_pipeline(iterator)
    both = summarize(np.concatenate(together), size)
    step_seconds = summarize(np.concatenate(alone), size)
    both["slowdown"] = both["p50_s"] / step_seconds["p50_s"] - 1
    both["device_wait_share"] = max(0.0, 1 - step_seconds["p50_s"] / both["p50_s"])
    both["host_loading_share"] = float(np.sum(loading) / np.sum(together))
    return state, {"train": step_seconds, "pipeline": pipeline, "pipeline_and_step": both}


def count_measured_images(run: Run) -> int:
    """Return the images that `measure_steps` trains on: the length of its progress bar."""
    options = run.config.benchmark
    num_steps = options.num_warmup + 1 + 2 * NUM_ROUNDS * (1 + -(-options.num_steps // NUM_ROUNDS))
    return num_steps * run.config.train.batch_size


def _store_records(run: Run, folder: pathlib.Path) -> Run:
    """Return the run with noise on disk, as prepared images lie there, in place of its images."""
    size = run.config.data.image_size
    num_images = max(run.config.train.batch_size, min(2048, RECORD_BYTES // size**2))
    splits = {"train": prepare_fake_split(folder, size, num_images)}
    return dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, splits=splits))


def _measure_pipeline(iterator: grain.DatasetIterator, seconds: float = 2.0) -> dict[str, float]:
    """Read batches as fast as they come; `images_per_cpu_s` counts the processor time of all reader threads."""
    for _ in range(20):  # past what was read ahead
        next(iterator)
    num_images, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        num_images += len(next(iterator)["label"])
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {"images_per_s": num_images / wall, "images_per_cpu_s": num_images / cpu, "cores": cpu / wall}


def measure_inference(run: Run, state: TrainState) -> dict[str, Any]:
    """Measure the evaluation step, logits and maps, blocking; on one device where several do not divide the batch."""
    results, size = {}, run.config.data.image_size
    for batch_size in INFERENCE_BATCHES:
        mesh = run.mesh if batch_size % run.mesh.size == 0 else create_mesh(jax.devices()[:1])
        step = run.eval_step if mesh is run.mesh else jax.jit(make_eval_step(run.model, run.normalization))
        images = put_batch(np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 1), np.uint8), mesh)
        variables = jax.device_put(state.variables, replicated(mesh))
        start = time.perf_counter()
        compiled = step.lower(variables, images).compile()
        compile_s = time.perf_counter() - start
        call = partial(compiled, variables, images)
        seconds = time_calls(call, run.config.benchmark.num_steps, run.config.benchmark.num_warmup)
        facts = {"compile_s": compile_s, "temp_bytes": analyze_memory(compiled)["temp"], "devices": mesh.size}
        results[f"batch_{batch_size}"] = summarize(seconds, batch_size) | facts
    return results


def measure_augmentation(run: Run, step_s: float) -> dict[str, float]:
    """Measure what augmentation adds to the way from bytes to images, as a share of the step of `step_s` seconds.

    Measured by itself, with and without in turn: a difference of two whole steps would drown in their scatter.
    """
    batch, seconds = make_step_batch(run), {}
    calls = {}
    for enabled in (True, False):
        config = run.config.augment.copy_and_resolve_references()
        with config.unlocked():
            config.enabled = enabled
        prepare = jax.jit(partial(augment_batch, normalization=run.normalization, config=config))
        calls[enabled] = partial(prepare, run.root_key, 0, {"image": batch["image"]})
        time_calls(calls[enabled], 1, 2)
        seconds[enabled] = []
    for _ in range(run.config.benchmark.num_steps):
        for enabled, call in calls.items():
            seconds[enabled].append(time_calls(call, 1, 0)[0])
    with_s, without_s = float(np.median(seconds[True])), float(np.median(seconds[False]))
    return {"with_s": with_s, "without_s": without_s, "share_of_step": (with_s - without_s) / step_s}


def find_largest_batch(run: Run, memory_bytes: int, compiled: Compiled) -> dict[str, Any]:
    """Find the largest batch whose training step fits, by XLA's memory analysis; nothing is run.

    Two batch sizes give a line, the line a guess; the guess is compiled, and mended by the line through it until it
    fits. XLA's schedule is not exactly linear in the batch, so a few images more may fit.

    Args:
      run: its train step, image size and devices.
      memory_bytes: of one device.
      compiled: the step of config.train.batch_size, the line's first point.

    Returns:
      'batch_size' (0: none fits; a multiple of devices x parts), 'memory_bytes', and 'tried', {batch size: bytes}.
    """
    unit = run.mesh.size * run.config.train.accumulate_steps
    tried = {run.config.train.batch_size: analyze_memory(compiled)["all"]}

    def need(batch_size: int) -> int:
        if batch_size not in tried:
            tried[batch_size] = analyze_memory(lower_train_step(run, batch_size).compile(ANALYSIS_ONLY))["all"]
            log.info("  batch %d takes %.2f GiB", batch_size, tried[batch_size] / 2**30)
        return tried[batch_size]

    need(2 * run.config.train.batch_size)
    while len(tried) < MAX_COMPILATIONS:
        best = max((size for size, num_bytes in tried.items() if num_bytes <= memory_bytes), default=0)
        guess = min(_solve_line(tried, memory_bytes), MAX_LARGEST_BATCH) // unit * unit
        if guess < unit or guess in tried or best <= guess < LARGEST_BATCH_PRECISION * best:
            break
        need(guess)
    best = max((size for size, num_bytes in tried.items() if num_bytes <= memory_bytes), default=0)
    return {"batch_size": best, "memory_bytes": memory_bytes, "tried": tried}


def _solve_line(tried: dict[int, int], memory_bytes: int) -> int:
    """Return the batch size at which the line through the two tried ones nearest to `memory_bytes` reaches it."""
    (size, num_bytes), (other_size, other_bytes) = sorted(tried.items(), key=lambda item: abs(item[1] - memory_bytes))[
        :2
    ]
    return math.floor(size + (memory_bytes - num_bytes) * (other_size - size) / (other_bytes - num_bytes))
