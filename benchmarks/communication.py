"""What eight devices exchange in one train step, from the HLO, and from it, on paper, how far the step scales.

  python benchmarks/communication.py [--backbones=densenet121,resnet50]

Eight devices are simulated on the host; nothing is run, so the numbers are XLA's and no clock's. Bytes do not depend on
the image's or the batch's size. Writes benchmarks/results/communication.json and .md.
"""

import argparse
import os
import pathlib
import sys

NUM_DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  (reads XLA_FLAGS)

from configs import common  # noqa: E402
from cxa_jax.data.fake_xrays import make_fake_dataset  # noqa: E402
from cxa_jax.hlo import ANALYSIS_ONLY, count_collectives  # noqa: E402
from cxa_jax.measurements import lower_train_step  # noqa: E402
from cxa_jax.models import BACKBONES  # noqa: E402
from cxa_jax.run import create_run  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

IMAGE_SIZE = 96  # px; any size gives the same sums
# Assumptions of the paper estimate, all on the side of a worse efficiency but the last two.
PER_DEVICE_BATCH = 256
TRAFFIC_BYTES = {  # of one image's training step in bfloat16, as usually compiled: the shortest step to expect
    "densenet121": 883e6 / 2,
    "densenet201": 1393e6 / 2,
    "resnet50": 614e6 / 2,
    "inception_resnet_v2": 1145e6 / 2,
}
MEMORY_BYTES_PER_S = 3.0e12  # H100
# name: (devices, bytes/s of each device's slowest link one way, seconds of an all-reduce of next to nothing)
NETWORKS = {
    "8 over NVLink": (8, 450e9, 15e-6),
    "64, 400 Gb/s a GPU": (64, 50e9, 40e-6),
    "64, 400 Gb/s a node": (64, 50e9 / 8, 40e-6),
}


def count_exchanged(backbone: str) -> dict[str, dict[str, int]]:
    """Return what `count_collectives` says of the step of the paper's network on NUM_DEVICES devices."""
    config = common.get_config("communication", backbone)
    config.data.image_size = IMAGE_SIZE
    config.model.implementation = "plain"  # what a GPU runs
    config.eval.batch_size = config.train.batch_size = NUM_DEVICES
    run = create_run(config.lock(), make_fake_dataset(IMAGE_SIZE, NUM_DEVICES))
    assert run.mesh.size == NUM_DEVICES
    return count_collectives(lower_train_step(run, NUM_DEVICES).compile(ANALYSIS_ONLY).as_text())


def estimate_efficiency(backbone: str, count: int, num_bytes: int, network: str) -> float:
    """Return step time alone over step time with communication, none of it hidden behind arithmetic.

    A ring sends 2 b (n - 1) / n bytes over each device's link; each of `count` all-reduces waits once for the network.
    """
    num_devices, bytes_per_s, latency_s = NETWORKS[network]
    step_s = PER_DEVICE_BATCH * TRAFFIC_BYTES[backbone] / MEMORY_BYTES_PER_S
    communication_s = 2 * num_bytes * (num_devices - 1) / num_devices / bytes_per_s + count * latency_s
    return step_s / (step_s + communication_s)


def format_markdown(results: dict, conditions: dict) -> str:
    """Return the page: bytes of each backbone, and the efficiency on paper."""
    lines = [
        "# Communication of one train step",
        "",
        f"`{conditions['command']}`  \ncommit {conditions['commit']}, {conditions['time']}, {NUM_DEVICES} simulated",
        "",
        f"Efficiency on paper: {PER_DEVICE_BATCH} images a device, bfloat16, a step as short as memory traffic allows,",
        "communication never hidden behind arithmetic.",
        "",
        f"| backbone | all-reduces | arrays | MB | other collectives | {' | '.join(NETWORKS)} |",
        f"|---|--:|--:|--:|--:|{'--:|' * len(NETWORKS)}",
    ]
    for backbone, collectives in results.items():
        sums = collectives["all-reduce"]
        shares = [f"{estimate_efficiency(backbone, sums['count'], sums['bytes'], name):.0%}" for name in NETWORKS]
        others = ", ".join(sorted(set(collectives) - {"all-reduce"})) or "none"
        size = f"{sums['bytes'] / 1e6:.1f}"
        lines.append(f"| {backbone} | {sums['count']} | {sums['arrays']} | {size} | {others} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile each backbone's step, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    results = {}
    for backbone in parser.parse_args().backbones.split(","):
        results[backbone] = count_exchanged(backbone)
        jax.clear_caches()
        print(backbone, results[backbone], flush=True)
    conditions = describe_environment()
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    page = format_markdown(results, conditions)
    write_atomically(folder / "communication.json", to_json({"conditions": conditions, "results": results}))
    write_atomically(folder / "communication.md", page)
    print(page)


if __name__ == "__main__":
    main()
