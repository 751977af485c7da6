"""Draw an outcome of compare.py: images/s of every program, train step and inference side by side.

python benchmarks/plot.py --outcome=benchmarks/results/densenet121.json --output=docs/figures/speed.png
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from compare import CALLS, PROGRAMS, count_images  # noqa: E402

OURS, THEIRS = "#0072b2", "#999999"  # told apart by the colour-blind, and in grey


def main() -> None:
    """Parse flags and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcome", required=True, help="NAME.json of compare.py")
    parser.add_argument("--output", required=True, help="picture to write")
    arguments = parser.parse_args()
    outcome = json.loads(pathlib.Path(arguments.outcome).read_text(encoding="utf-8"))
    calls = [call for call in outcome["settings"]["calls"].split(",") if call != "predict_one"]
    figure, all_axes = plt.subplots(1, len(calls), figsize=(4.2 * len(calls), 3), sharey=True, squeeze=False)
    for axes, call in zip(all_axes[0], calls, strict=True):
        draw(axes, outcome, call)
    settings = outcome["settings"]
    title = f"{settings['backbone']} + AMM, batch {settings['batch_size']}, {settings['image_size']} px, "
    figure.suptitle(f"{title}{settings['dtype']}, {outcome['machine']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=130, metadata={"Software": None})


def draw(axes: plt.Axes, outcome: dict, call: str) -> None:
    """Draw a bar for each program, the first one on top: images/s by the median, whiskers the spread of the rounds."""
    names = list(outcome["programs"])[::-1]
    size = count_images(call, outcome["settings"]["batch_size"])
    for place, name in enumerate(names):
        values = outcome["programs"][name]["calls"][call]
        seconds = sorted(value for of_round in values["seconds"] for value in of_round)
        rate, low, high = size / values["median_s"], size / seconds[-1], size / seconds[0]
        color = OURS if name.startswith("cxa") else THEIRS
        axes.barh(place, rate, color=color, xerr=[[rate - low], [high - rate]], error_kw={"elinewidth": 1})
        axes.text(
            0.02, place, f"{rate:.3g}", va="center", color="white", fontsize=8, transform=axes.get_yaxis_transform()
        )
    axes.set_yticks(range(len(names)), [PROGRAMS[name][0] for name in names], fontsize=8)
    axes.set_xlabel(f"images/s, {CALLS[call].removesuffix(', whole batch')}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
