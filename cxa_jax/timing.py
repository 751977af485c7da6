"""Clocks, and what the machine could do at best. Nothing here knows the network."""

import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cxa_jax.sharding import replicated, split

_IMPORTED = time.perf_counter()
MATMUL_SIDE = {"cpu": 2048}  # long enough to reach the peak, short enough to wait for
MATMUL_SIDE_ELSEWHERE = 8192


def process_age() -> float:
    """Return the seconds since this process was started; where the system does not tell, since this file's import."""
    try:
        # Fields of stat(5) after the command's name, which may hold spaces; 22 is the start in ticks since boot.
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[22 - 3])
    except OSError:
        return time.perf_counter() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def time_calls(call: Callable[[], Any], num_calls: int, num_warmup: int) -> np.ndarray:
    """Return the seconds of each of `num_calls` calls, waiting for its result, after `num_warmup` that do not count."""
    seconds = []
    for _ in range(num_warmup + num_calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[num_warmup:])


def summarize(seconds: np.ndarray, num_images: int) -> dict[str, float]:
    """Return median and 95th percentile of the seconds of a call, and images/s at the median."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50_s": p50, "p95_s": p95, "images_per_s": num_images / p50}


def peak_host_bytes() -> int:
    """Return the most memory this process ever held (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: jax.Device) -> dict[str, int]:
    """Return 'peak' and 'limit' in bytes as far as the backend tells: a CPU tells nothing, its memory is the host's."""
    stats = device.memory_stats() or {}
    names = {"peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: stats[key] for name, key in names.items() if key in stats}


def measure_matmul(mesh: Mesh, dtype: str) -> float:
    """Return the FLOP/s of a large square matrix product in `dtype` on all devices at once: the best of ten calls."""
    side = MATMUL_SIDE.get(jax.default_backend(), MATMUL_SIDE_ELSEWHERE)
    left = jax.device_put(jnp.ones((mesh.size, side, side), dtype), split(mesh))
    right = jax.device_put(jnp.ones((side, side), dtype), replicated(mesh))
    product = jax.jit(lambda a, b: a @ b, out_shardings=split(mesh))
    seconds = time_calls(lambda: product(left, right), num_calls=10, num_warmup=2)
    return 2 * mesh.size * side**3 / float(seconds.min())


def describe_host() -> dict[str, Any]:
    """Return the processor, the cores this process may use, the memory, and how busy the machine is with others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "usable_cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),  # over 1, 5 and 15 minutes
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
