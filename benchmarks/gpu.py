"""Compare the speed of training with PyTorch's on a GPU: backbones, batch sizes and types, all in one run.

  python benchmarks/gpu.py --name=gpu densenet121/16,64,256/bfloat16,float32/cxa,torch_compiled

An argument is a group of settings: backbones / batch sizes / types / programs of compare.py. Each program of a setting
is a process. Most of the time goes into compiling, which takes a core each, so --at_once of them run together, in the
order given. When those of one setting are ready, all others are stopped, and they are timed in turns, only one at work
at a time: the seconds of ten steps on a batch that lies on the device, and the ratio to the first program's within a
round. Then they make room for the next. Writes benchmarks/results/NAME.json and NAME.md after every setting.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import compare
from compare import RUN_STEPS
from processes import Processes, end_by_sigterm
from records import add_flags, count, find_commit, is_not_a_place, processor, write_files

CALL = "train_run"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class Setting:
    """What is timed together: the flags of compare.py, its programs, the future of each one's start."""

    options: argparse.Namespace
    programs: list[str]
    starts: list[concurrent.futures.Future] = dataclasses.field(default_factory=list)
    stack: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def is_ready(self) -> bool:
        """Return whether each program has started, or will not."""
        return all(future.done() for future in self.starts)

    @property
    def peers(self) -> list[compare.Peer]:
        """The programs that have started."""
        return [answer for answer in (future.result() for future in self.starts) if not isinstance(answer, str)]

    @property
    def skipped(self) -> dict[str, str]:
        """Why the others have not, by their names."""
        answers = zip(self.programs, (future.result() for future in self.starts), strict=True)
        return {name: answer for name, answer in answers if isinstance(answer, str)}


def main() -> None:
    """Parse flags, start and time all settings, write after each."""
    arguments = parse_arguments()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the programs share the GPU's memory
    cells = []
    with contextlib.closing(start_all(list_settings(arguments), arguments)) as ready:
        for setting in ready:
            cells.append(time_setting(setting))
            write(cells, arguments)


def parse_arguments() -> argparse.Namespace:
    """Return the flags, each of `groups` as its four parts; leave with one message for a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", type=group, help="BACKBONES/BATCH_SIZES/TYPES/PROGRAMS")
    add_flags(parser, rounds=3)
    # What waits keeps its memory: at batch 256 fourteen programs were too many for 80 GB, and most of them ended.
    parser.add_argument("--at_once", type=count, default=4, help="programs that run, as cores and GPU memory allow")
    parser.add_argument("--patience", type=float, default=1800, help="seconds; what has not started then is left out")
    return parser.parse_args()


def group(text: str) -> list[list[str]]:
    """Check and split one argument; a type for argparse."""
    parts = [part.split(",") for part in text.split("/")]
    if len(parts) != 4 or set(parts[3]) - set(compare.PROGRAMS) or set(parts[2]) - set(DTYPES):
        known = f"types are {', '.join(DTYPES)}; programs are {', '.join(compare.PROGRAMS)}"
        raise argparse.ArgumentTypeError(f"{text!r}: give BACKBONES/BATCH_SIZES/TYPES/PROGRAMS; {known}")
    for size in parts[1]:
        count(size)
    if any(len(set(part)) < len(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} names one twice")
    if "bfloat16" in parts[2] and any(compare.PROGRAMS[name][1] == "keras_applications.py" for name in parts[3]):
        raise argparse.ArgumentTypeError(f"{text!r}: Keras' programs train in float32 alone")
    return parts


def list_settings(arguments: argparse.Namespace) -> list[Setting]:
    """Return the settings of all groups, in the order given."""
    common = vars(arguments) | {"calls": CALL, "caches": "", "steps": 1}
    return [
        Setting(argparse.Namespace(**common | {"backbone": name, "batch_size": int(size), "dtype": dtype}), programs)
        for names, sizes, dtypes, programs in arguments.groups
        for name, size, dtype in itertools.product(names, sizes, dtypes)
    ]


def start_all(settings: list[Setting], arguments: argparse.Namespace) -> Iterator[Setting]:
    """Start the programs, so many at once; yield a setting when all of its own are ready, the others stopped.

    However it is left, no program is.
    """
    deadline, processes = time.monotonic() + arguments.patience, Processes()
    waiting, running = list(settings), []
    with (
        contextlib.ExitStack() as stack,
        concurrent.futures.ThreadPoolExecutor(sum(len(setting.programs) for setting in settings)) as pool,
    ):
        stack.callback(lambda: [setting.stack.close() for setting in running])  # last: their folders
        try:
            while waiting or running:
                while waiting and is_room(running, waiting[0], arguments.at_once):
                    setting = waiting.pop(0)
                    setting.starts = [
                        pool.submit(start, name, setting, processes, deadline) for name in setting.programs
                    ]
                    running.append(setting)
                ready = next(filter(Setting.is_ready, running), None)
                if ready is None:
                    unfinished = [future for setting in running for future in setting.starts if not future.done()]
                    concurrent.futures.wait(unfinished, return_when=concurrent.futures.FIRST_COMPLETED)
                    continue
                with processes.only({peer.process.pid for peer in ready.peers}):
                    yield ready
                running.remove(ready)
                ready.stack.close()
        finally:
            processes.end_all()  # first, for the pool waits for those that are still starting


def is_room(running: list[Setting], setting: Setting, at_once: int) -> bool:
    """Return whether the setting's programs may start beside what runs; alone, any may."""
    return not running or sum(len(other.programs) for other in [*running, setting]) <= at_once


def start(name: str, setting: Setting, processes: Processes, deadline: float) -> compare.Peer | str:
    """Start a program, to be ended by the setting's stack; return it, or the reason why there is none."""
    patience = deadline - time.monotonic()
    if patience <= 0:
        return f"not begun within --patience={setting.options.patience:g}"
    return setting.stack.enter_context(compare.start(name, setting.options, processes, patience))


def time_setting(setting: Setting) -> dict[str, Any]:
    """Let the programs of one setting take turns; return its record, and print it. One that ends ends all turns."""
    own, peers = setting.options, setting.peers
    record = {name: getattr(own, name) for name in ("backbone", "batch_size", "dtype")}
    record |= {"skipped": setting.skipped, "programs": {}}
    try:
        if peers:
            compare.take_turns(peers, [CALL], own)
    except RuntimeError as error:
        record["skipped"] |= {peer.name: f"not timed: {error}" for peer in peers}
        peers = []
    for peer in peers:
        summary = compare.summarize(peer, peers[0], CALL)
        step_s = summary["median_s"] / RUN_STEPS
        speed = {"step_s": step_s, "images_per_s": own.batch_size / step_s}
        record["programs"][peer.name] = speed | {"about": peer.about} | summary
    print("\n".join(format_rows(record)), flush=True)
    return record


def format_rows(record: dict[str, Any]) -> list[str]:
    """Return the lines of a setting in the table."""
    what = f"| {record['backbone']} | {record['batch_size']} | {record['dtype']}"
    rows = [
        f"{what} | {compare.PROGRAMS[name][0]} | {values['step_s'] * 1e3:.4g} | {values['images_per_s']:.0f} "
        f"| {values['ratio']:.2f} [{values['ratio_range'][0]:.2f}, {values['ratio_range'][1]:.2f}] |"
        for name, values in record["programs"].items()
    ]
    return rows + [f"{what} | {compare.PROGRAMS[name][0]} | | | {why} |" for name, why in record["skipped"].items()]


def write(cells: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write NAME.json and NAME.md."""
    about = [program["about"] for cell in cells for program in cell["programs"].values()]
    outcome = {
        "command": " ".join(["python benchmarks/gpu.py", *filter(is_not_a_place, sys.argv[1:])]),
        "commit": find_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "devices": sorted({entry["device"] for entry in about if "device" in entry}),
        "versions": sorted({f"{name} {entry[name]}" for entry in about for name in ("jax", "torch") if name in entry}),
        "image_size": arguments.image_size,
        "cells": cells,
    }
    lines = [
        "# Training on a GPU",
        "",
        f"{', '.join(outcome['devices'])}; {', '.join(outcome['versions'])}; {arguments.image_size} px.  ",
        f"`{outcome['command']}`  ",
        f"commit {outcome['commit']}, {outcome['time']}, {outcome['machine']}",
        "",
        f"A step of {RUN_STEPS} in a row, the batch on the device; median of {arguments.rounds} rounds.",
        "Ratio: time over the first program's in the same round, median [least, greatest].",
        "",
        "| backbone | batch | type | program | ms | images/s | ratio |",
        "|---|--:|---|---|--:|--:|--:|",
        *itertools.chain.from_iterable(map(format_rows, cells)),
    ]
    write_files(
        pathlib.Path(arguments.results), arguments.name, json.dumps(outcome, indent=1) + "\n", "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    end_by_sigterm()
    main()
