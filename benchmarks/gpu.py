"""Compare the speed of training with PyTorch's on a GPU: backbones, batch sizes and types, all in one run.

  python benchmarks/gpu.py --name=gpu densenet121/16,64,256/bfloat16,float32/cxa,torch_compiled

An argument is a phase: backbones / batch sizes / types / programs of compare.py. The programs of a phase, a process for
each of its cells, are started together, for most of the time goes into compiling, which takes a processor core each.
When all are ready, or --patience is over, they are timed in turns, only one at work at a time: the seconds of ten steps
on a batch that lies on the device, and the ratio to the first program's within a round. Writes
benchmarks/results/NAME.json and NAME.md after every phase.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import sys
from typing import Any

import compare
from compare import RUN_STEPS

CALL = "train_run"


def main() -> None:
    """Parse flags, run the phases one by one, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="+", help="BACKBONES/BATCH_SIZES/TYPES/PROGRAMS, each separated by commas")
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=900, help="seconds that a program may take to start")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--python", default=sys.executable, help="with the project's requirements")
    parser.add_argument("--peers_python", default=sys.executable, help="with benchmarks/requirements.txt")
    parser.add_argument("--results", default=str(compare.HERE / "results"), help="folder of the outcome")
    arguments = parser.parse_args()
    if pathlib.Path(arguments.name).name != arguments.name:
        parser.error(f"--name={arguments.name} is a path: give a name, and its folder by --results")
    phases = [[part.split(",") for part in phase.split("/")] for phase in arguments.phases]
    for phase, text in zip(phases, arguments.phases, strict=True):
        if len(phase) != 4 or set(phase[3]) - set(compare.PROGRAMS):
            known = ", ".join(compare.PROGRAMS)
            parser.error(f"{text}: give BACKBONES/BATCH_SIZES/TYPES/PROGRAMS; programs are {known}")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the programs share the GPU's memory
    cells = []
    for backbones, batch_sizes, dtypes, programs in phases:
        settings = list(itertools.product(backbones, map(int, batch_sizes), dtypes))
        cells += run_phase(settings, programs, arguments)
        write(cells, arguments)


def run_phase(settings: list[tuple[str, int, str]], programs: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Start the programs of all settings together, then time setting after setting; return a record of each."""
    options = [
        argparse.Namespace(
            **vars(arguments), backbone=backbone, batch_size=batch_size, dtype=dtype, calls=CALL, caches="", steps=1
        )
        for backbone, batch_size, dtype in settings
    ]
    starts = [(setting, compare.start(program, own)) for setting, own in enumerate(options) for program in programs]
    with concurrent.futures.ThreadPoolExecutor(len(starts)) as pool, contextlib.ExitStack() as stack:
        futures = [pool.submit(context.__enter__) for _, context in starts]
        for (_, context), future in zip(starts, futures, strict=True):
            stack.push(context)
            future.result()
        print(f"{len(starts)} programs started", flush=True)
        records = []
        for number, own in enumerate(options):
            answers = [future.result() for (i, _), future in zip(starts, futures, strict=True) if i == number]
            records.append(time_setting(own, programs, answers))
        return records


def time_setting(own: argparse.Namespace, programs: list[str], answers: list[compare.Peer | str]) -> dict[str, Any]:
    """Let the programs of one setting take turns; return its record, and print it."""
    peers = [answer for answer in answers if not isinstance(answer, str)]
    record = {name: getattr(own, name) for name in ("backbone", "batch_size", "dtype")}
    record["skipped"] = {p: answer for p, answer in zip(programs, answers, strict=True) if isinstance(answer, str)}
    record["programs"] = {}
    if peers:
        compare.take_turns(peers, [CALL], own)
    for peer in peers:
        summary = compare.summarize(peer, peers[0], CALL)
        step_s = summary["median_s"] / RUN_STEPS
        speed = {"step_s": step_s, "images_per_s": own.batch_size / step_s, "start_to_first_call_s": peer.start_s}
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
        "command": " ".join(["python benchmarks/gpu.py", *filter(compare.is_not_a_place, sys.argv[1:])]),
        "commit": compare.find_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{compare.processor()}, {len(os.sched_getaffinity(0))} cores",
        "devices": sorted({entry["device"] for entry in about}),
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
    folder = pathlib.Path(arguments.results)
    folder.mkdir(parents=True, exist_ok=True)
    compare.write_files(folder, arguments.name, json.dumps(outcome, indent=1) + "\n", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
