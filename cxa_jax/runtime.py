"""What jax is told before it starts: where compiled programs are kept, and the devices that a processor stands for."""

import os
import pathlib

import jax

from cxa_jax.data.parallel import count_cores
from cxa_jax.errors import UserError

CACHE = "~/.cache/cxa_jax/xla"
# XLA:CPU leaves a part of the second core idle within an operation. Two devices, half of a batch each, fill it:
# docs/performance.md. More than two were not measured.
NUM_CPU_DEVICES = 2
# LLVM passes that cost an eighth of the compilation; the step is no slower without them, rather faster. Same file.
COMPILER_FLAGS = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer"


def set_up_runtime() -> None:
    """Keep compiled programs, make them quickly, and make the processor two devices if this process may use two cores.

    JAX_COMPILATION_CACHE_DIR, JAX_NUM_CPU_DEVICES and XLA_FLAGS in the environment go before. Call it before jax is
    first asked for its devices; where it finds an accelerator, the processor's devices are not used.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(CACHE).expanduser()))
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COMPILER_FLAGS}".strip()
    if not names_cpu_devices():
        jax.config.update("jax_num_cpu_devices", min(NUM_CPU_DEVICES, count_cores()))


def names_cpu_devices() -> bool:
    """Return whether the environment says how many devices a processor stands for."""
    return "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")


def check_compute_type(dtype: str) -> None:
    """Refuse bfloat16 where the processor that would train in it emulates it, many times slower than float32.

    Raises:
      UserError: `dtype` is 'bfloat16', there is no accelerator, and the processor names no unit for it.
    """
    if dtype == "bfloat16" and jax.default_backend() == "cpu" and not has_fast_bfloat16():
        raise UserError(
            "config.model.dtype='bfloat16' would crawl: there is no GPU, and this processor has no unit for bfloat16 "
            "matrix products (amx_bf16). Set --config.model.dtype=float32, or train on a GPU."
        )


def has_fast_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices itself; True where the system does not tell."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return True
    return not {"amx_bf16", "bf16"}.isdisjoint(flags)  # x86's and Arm's name
