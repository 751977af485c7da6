"""--mode=benchmark: how fast a config trains and predicts here, and what it takes, on noise in place of images."""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from ml_collections import ConfigDict

from cxa_jax.console import progress_bar
from cxa_jax.data.fake_xrays import make_fake_dataset
from cxa_jax.flops import count_flops
from cxa_jax.hlo import analyze_memory, count_collectives, count_traffic
from cxa_jax.measurements import (
    count_measured_images,
    find_largest_batch,
    make_step_batch,
    measure_augmentation,
    measure_inference,
    measure_steps,
)
from cxa_jax.model_names import name_backbone
from cxa_jax.run import Run, create_run
from cxa_jax.runtime import check_compute_type
from cxa_jax.sharding import replicated
from cxa_jax.timing import describe_host, device_memory, measure_matmul, peak_host_bytes, process_age
from cxa_jax.train_state import TrainState
from cxa_jax.warm_up import compiling_train_step, trace_train_step
from cxa_jax.workdir import describe_environment, flatten_config, open_workdir, to_json, write_atomically

log = logging.getLogger(__name__)

CACHE_HIT = "/jax/compilation_cache/cache_hits"
GIB = 2**30


def benchmark(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measure a config's training step, inference and input pipeline; write `workdir`/benchmark.json and log a table.

    The step is the one that training runs: model, optimiser, augmentation and batch size of the config. Data are noise,
    so no data set is needed and the loss means nothing.

    Returns:
      What was written: 'conditions', 'data', 'config' (flat), 'results'.

    Raises:
      UserError: the config or workdir cannot be used.
    """
    check_compute_type(config.model.dtype)
    with open_workdir(workdir) as folder:
        return _benchmark(config, folder)


def _benchmark(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    conditions = describe_environment() | {"host": describe_host()}  # before this process itself is load
    size, batch_size = config.data.image_size, config.train.batch_size
    # At least what fills a batch; a size that makes no sense is create_run's to refuse.
    run = create_run(config, make_fake_dataset(max(1, size), max(4, batch_size)))
    name, graph = name_backbone(flatten_config(config)), run.model.backbone.implementation
    log.info("%s, %s graph, batch %d, %d px", name, graph, batch_size, size)
    results, compiled, state = _start(run)
    with progress_bar(count_measured_images(run), "train step") as bar:
        state, measured = measure_steps(run, compiled, state, bar)
    results |= measured
    results["memory"] = {
        "host_peak_bytes": peak_host_bytes(),
        "device": device_memory(jax.local_devices()[0]),
        "step": analyze_memory(compiled),
    }
    log.info("inference, augmentation, matrix product ...")
    results["inference"] = measure_inference(run, state)
    results["augmentation"] = measure_augmentation(run, results["train"]["p50_s"])
    results["arithmetic"] |= _compare_with_peak(run, results)
    memory_bytes = int(config.benchmark.memory_gib * GIB) or results["memory"]["device"].get("limit", 0)
    results["largest_batch"] = None
    if memory_bytes:
        log.info("largest batch in %.3g GiB ...", memory_bytes / GIB)
        results["largest_batch"] = find_largest_batch(run, memory_bytes, compiled)
    report = {"conditions": conditions, "data": run.dataset.description, "config": flatten_config(config)}
    report |= {"results": results}
    write_atomically(folder / "benchmark.json", to_json(report))
    log.info("%s\nwritten to %s", format_table(results), folder / "benchmark.json")
    return report


def _start(run: Run) -> tuple[dict[str, Any], Compiled, TrainState]:
    """Initialise, compile and run the first step; return what that took, the compiled step and the state."""
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event == CACHE_HIT else None)
    with compiling_train_step(run) as program:  # as training does
        state = run.create_state()
    compiled, trace_s, compile_s = program.result()
    rate_scale = jax.device_put(np.float32(1), replicated(run.mesh))
    state, metrics = compiled(state, make_step_batch(run), rate_scale, run.root_key)
    float(metrics["loss"])
    text = compiled.as_text()
    results = {
        "start": {
            "trace_s": trace_s,
            "compile_s": compile_s,
            "to_first_step_s": process_age(),
            "programs_from_cache": len(hits),
        },
        "arithmetic": {"flops": _count_flops(run), "bytes_accessed": count_traffic(compiled, run.mesh.size)},
        "collectives": count_collectives(text),
    }
    return results, compiled, state


def _count_flops(run: Run) -> int:
    """The arithmetic that the network asks of a step: of the plain graph, whatever another computes more than once."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.implementation, config.train.remat = "plain", False
    plain = create_run(config.lock(), run.dataset)
    return count_flops(trace_train_step(plain, run.config.train.batch_size).jaxpr.jaxpr)


def _compare_with_peak(run: Run, results: dict[str, Any]) -> dict[str, float]:
    peak = measure_matmul(run.mesh, run.config.model.dtype)
    rate = results["arithmetic"]["flops"] / results["train"]["p50_s"]
    return {"flops_per_s": rate, "matmul_flops_per_s": peak, "share_of_matmul_peak": rate / peak}


def format_table(results: dict[str, Any]) -> str:
    """Return the results as lines 'what    value'."""
    start, train, both = results["start"], results["train"], results["pipeline_and_step"]
    memory, arithmetic, pipeline = results["memory"], results["arithmetic"], results["pipeline"]
    augmentation, step = results["augmentation"], memory["step"]
    rows = [
        (
            "start to first step done",
            f"{start['to_first_step_s']:.1f} s, {start['programs_from_cache']} from the cache",
        ),
        ("trace, compile the step", f"{start['trace_s']:.1f} s, {start['compile_s']:.1f} s"),
        ("train step", _describe_seconds(train)),
        ("peak host memory", f"{memory['host_peak_bytes'] / GIB:.2f} GiB"),
        ("peak device memory", _describe_device(memory["device"])),
        ("step's memory (XLA)", f"{step['all'] / GIB:.2f} GiB, {step['temp'] / GIB:.2f} GiB of it temporary"),
        ("arithmetic", f"{arithmetic['flops'] / 1e9:.1f} GFLOP, the plain graph's products and convolutions"),
        ("memory traffic", _describe_traffic(arithmetic["bytes_accessed"])),
        ("reached", f"{arithmetic['flops_per_s'] / 1e9:.1f} GFLOP/s"),
        ("matrix product's rate", f"{arithmetic['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s"),
        ("share reached", f"{arithmetic['share_of_matmul_peak']:.1%}"),
    ]
    for name, values in results["inference"].items():
        text = f"{_describe_seconds(values)}, on {values['devices']} device(s)"
        rows.append((f"inference, {name.replace('_', ' ')}", text))
    rows += [
        (
            "input pipeline alone",
            f"{pipeline['images_per_s']:,.0f} images/s, {pipeline['images_per_cpu_s']:,.0f} a core",
        ),
        ("pipeline + step", f"{_describe_seconds(both)}; {both['slowdown']:+.1%} of the step alone"),
        ("device waits for input", f"{both['device_wait_share']:.1%} of the time"),
        ("augmentation", f"{augmentation['with_s'] * 1e3:.2f} ms, without {augmentation['without_s'] * 1e3:.2f} ms"),
        ("augmentation's share", f"{augmentation['share_of_step']:.2%} of the step"),
        ("largest batch", _describe_largest(results["largest_batch"])),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


def _describe_seconds(values: dict[str, float]) -> str:
    p50, p95, rate = values["p50_s"], values["p95_s"], values["images_per_s"]
    return f"{p50 * 1e3:.1f} ms (95 %: {p95 * 1e3:.1f} ms), {rate:,.1f} images/s"


def _describe_traffic(num_bytes: float | None) -> str:
    return "XLA does not tell" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB, by XLA"


def _describe_device(device: dict[str, int]) -> str:
    return f"{device['peak'] / GIB:.2f} GiB" if "peak" in device else "the backend does not tell"


def _describe_largest(largest: dict[str, Any] | None) -> str:
    if largest is None:
        return "not asked for: --config.benchmark.memory_gib=N"
    return (
        f"{largest['batch_size']} in {largest['memory_bytes'] / GIB:.3g} GiB ({len(largest['tried'])} sizes compiled)"
    )
