"""How a program talks to compare.py: it starts, runs one step, says so, and then works only when told to.

Standard library alone, for it runs in every peer's environment. Answers are lines of standard output that start with
MARK; whatever else a library prints there is passed over.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "@peer "
CLASS_WEIGHTS = (0.6, 2.0)
LEARNING_RATE, MOMENTUM = 1e-4, 0.9
DROPOUT = 0.5
AMM_WIDTHS = (128, 32, 16)
HEAD_WIDTH = 128
RUN_STEPS = 10  # of the call "train_run"


def parse_arguments(**choices: tuple[str, ...]) -> argparse.Namespace:
    """Return the flags of all programs, and this one's own: `choices` has a flag's values, its default first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--first", default="train", help="the call that the start is timed up to")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", default=values[0], choices=values)
    return parser.parse_args()


def serve(first: str, calls: dict[str, Callable[[], Any]], about: dict[str, Any]) -> None:
    """Run the call `first` once, report, then answer lines 'NAME COUNT' until standard input ends.

    Args:
      first: one of `calls`.
      calls: what can be timed; each call returns when its result is on the host.
      about: versions and the number of parameters, for the record.
    """
    calls[first]()
    _answer({"about": about})
    for line in sys.stdin:
        name, count = line.split()
        seconds, cpu_seconds = [], []
        for _ in range(int(count)):
            start, cpu_start = time.perf_counter(), time.process_time()
            calls[name]()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        _answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak})


def _answer(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)
