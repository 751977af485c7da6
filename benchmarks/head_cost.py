"""What the attention mapping costs: train-step time of CXA_Dense121 over DenseNet121-GAP, interleaved in one process.

    python benchmarks/head_cost.py

Writes benchmarks/results/head_cost.json and .md. Rounds alternate the order of the two, and each round gives one ratio,
so that whatever else the machine does falls on both alike. Random bytes stand in for X-rays: no number depends on them.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path("~/.cache/cxa_jax/xla").expanduser()))

import jax  # noqa: E402 (it reads the variable when it is imported)
import numpy as np  # noqa: E402

from configs import dense121  # noqa: E402
from cxa_jax.flops import count_flops  # noqa: E402
from cxa_jax.models import CardioXAttentionNet, create_model  # noqa: E402
from cxa_jax.optimizer import create_optimizer  # noqa: E402
from cxa_jax.steps import TrainStep, make_train_step  # noqa: E402
from cxa_jax.timing import describe_host  # noqa: E402
from cxa_jax.train_state import create_train_state  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

MODELS = {"CXA_Dense121": "", "DenseNet121-GAP": "gap"}  # name: variant of configs/dense121.py
TARGET = 1.03


def make_call(variant: str, image_size: int, batch_size: int) -> tuple[Callable[[], None], int]:
    """Return a call that does one train step of a fresh model and waits for it, and the plain graph's FLOP."""
    config = dense121.get_config(variant)
    tx = create_optimizer(1e-4, config.optimizer.momentum)

    def make_step(implementation: str) -> tuple[CardioXAttentionNet, TrainStep]:
        config.model.implementation = implementation
        model = create_model(config.model)
        return model, make_train_step(model, tx, jax.random.key(1), (1.0, 1.0), "min_max", config.augment)

    model, step = make_step(config.model.implementation)
    state = create_train_state(jax.random.key(0), model, tx, image_size)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, image_size, image_size, 1), dtype=np.uint8),
        "label": rng.integers(0, 2, batch_size).astype(np.int32),
        "mask": np.ones(batch_size, bool),
    }
    batch, rate_scale = jax.device_put((batch, np.float32(1)))
    plain = jax.make_jaxpr(make_step("plain")[1])(state, batch, rate_scale)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, rate_scale).compile()

    def call() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, rate_scale)
        jax.block_until_ready((state, metrics))

    return call, count_flops(plain.jaxpr)


def measure(
    calls: dict[str, Callable[[], None]], num_rounds: int, num_warmup: int
) -> dict[str, dict[str, list[float]]]:
    """Return {'wall_s', 'cpu_s'} of every model and round; the order turns round from one round to the next."""
    clocks = {"wall_s": time.perf_counter, "cpu_s": time.process_time}
    seconds = {clock: {name: [] for name in calls} for clock in clocks}
    for turn in range(num_warmup + num_rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            starts = {clock: now() for clock, now in clocks.items()}
            calls[name]()
            for clock, now in clocks.items():
                if turn >= num_warmup:
                    seconds[clock][name].append(now() - starts[clock])
    return seconds


def summarize_ratio(seconds: dict[str, list[float]], seed: int = 0) -> dict[str, float]:
    """Return the median over rounds of the ratio of the two models, with its 95 % bootstrap interval."""
    amm, gap = (np.array(seconds[name]) for name in MODELS)
    ratios = amm / gap
    draws = np.random.default_rng(seed).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    medians = {f"median_{name}_s": float(np.median(seconds[name])) for name in MODELS}
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)} | medians


def format_results(results: dict) -> str:
    """Return the results as Markdown."""
    host, environment = results["host"], results["environment"]
    lines = [
        "# Cost of the attention mapping",
        "",
        f"Train step of CXA_Dense121 (AMM, Eq. 9, two dense layers) over DenseNet121-GAP (one dense unit): batch "
        f"{results['batch_size']}, {results['image_size']} px, float32, {results['num_rounds']} interleaved rounds. "
        f"Target: at most {TARGET}.",
        "",
        "| clock | CXA_Dense121 | DenseNet121-GAP | ratio, median of rounds [95 %] |",
        "|---|---|---|---|",
    ]
    for clock, title in (("wall_s", "wall time"), ("cpu_s", "CPU time")):
        row = results[clock]
        medians = " | ".join(f"{row[f'median_{name}_s']:.3f} s" for name in MODELS)
        lines.append(f"| {title} | {medians} | {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] |")
    amm, gap = (results["flops"][name] for name in MODELS)
    lines.append(f"| products and convolutions, FLOP | {amm:.4g} | {gap:.4g} | {amm / gap:.4f} |")
    load = "{:.1f}".format(host["load_average"][0])
    lines += [
        "",
        f"Machine: {host['processor']}, {host['usable_cores']} cores, load {load} at the end; "
        f"devices: {', '.join(environment['devices'])}. Commit {environment['commit']}, {environment['time']}.",
        f"Command: `python {environment['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224, help="px")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_rounds", type=int, default=20)
    parser.add_argument("--num_warmup", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    made = {name: make_call(variant, options.image_size, options.batch_size) for name, variant in MODELS.items()}
    seconds = measure({name: call for name, (call, _) in made.items()}, options.num_rounds, options.num_warmup)
    results = {clock: summarize_ratio(values) for clock, values in seconds.items()}
    results |= {name: getattr(options, name) for name in ("image_size", "batch_size", "num_rounds")}
    results["flops"] = {name: flops for name, (_, flops) in made.items()}
    results |= {"seconds": seconds, "host": describe_host(), "environment": describe_environment()}
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "head_cost.json", to_json(results))
    text = format_results(results)
    write_atomically(options.output / "head_cost.md", text)
    print(text)


if __name__ == "__main__":
    main()
