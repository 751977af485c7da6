"""Compare the speed of this project and its peers on the same graph, optimiser and loss, interleaved.

  python benchmarks/compare.py --name=densenet121 --peers_python=peers/bin/python
  python benchmarks/compare.py --name=resnet50 --backbone=resnet50 --programs=cxa,keras_jax --rounds=5

Every program is a process of its own. They are started one after another, the machine to itself, which gives the time
from start to the first call done; then all stay alive and take turns, and only one works at a time. So a slow spell of
the machine hits all alike, and ratios are taken within a round. Writes benchmarks/results/NAME.json and NAME.md.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator

from processes import Processes, end_by_sigterm
from records import HERE, add_flags, count, find_commit, is_not_a_place, processor, write_files

MARK, RUN_STEPS = "@peer ", 10  # as in peers/protocol.py
# name: (title, file in peers/, its own flags, whose environment)
PROGRAMS = {
    "cxa": ("CXA-JAX", "cxa.py", [], "ours"),
    "cxa_plain": ("CXA-JAX, plain graph", "cxa.py", ["--implementation=plain"], "ours"),
    "cxa_one": ("CXA-JAX, one host device", "cxa.py", ["--host_devices=1"], "ours"),
    "keras_jax": ("Keras 3 on JAX", "keras_applications.py", ["--backend=jax"], "peers"),
    "keras_tensorflow": ("Keras 3 on TensorFlow", "keras_applications.py", ["--backend=tensorflow"], "peers"),
    "torch": ("PyTorch eager", "pytorch.py", ["--mode=eager"], "peers"),
    "torch_compiled": ("PyTorch compiled, channels last", "pytorch.py", ["--mode=compiled"], "peers"),
}
CALLS = {
    "train": "train step",
    "train_run": "ten train steps, the batch on the device",
    "predict": "inference, whole batch",
    "predict_one": "inference, batch 1",
}
# Where compilers keep programs; pointed at an empty folder, so that a start is a cold one.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclasses.dataclass
class Peer:
    """A running program: its process, what it said of itself, and its seconds, [round][step] for each call."""

    name: str
    process: subprocess.Popen
    about: dict
    start_s: float
    seconds: dict[str, list[list[float]]]
    cpu_seconds: dict[str, list[list[float]]]
    peak_bytes: int = 0

    def run(self, call: str, count: int, *, record: bool) -> None:
        """Let it run `count` calls, the others waiting."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; so there is no answer
            self.process.stdin.write(f"{call} {count}\n")
            self.process.stdin.flush()
        answer = read_answer(self.process)
        if answer is None:
            raise RuntimeError(f"{self.name} ended during {call!r} with status {self.process.wait()}")
        if record:
            self.seconds[call].append(answer["seconds"])
            self.cpu_seconds[call].append(answer["cpu_seconds"])
        self.peak_bytes = answer["peak_bytes"]


def main() -> None:
    """Parse flags, start the programs, let them take turns, write the outcome."""
    arguments = parse_arguments()
    calls = arguments.calls.split(",")
    processes = Processes()
    with contextlib.ExitStack() as stack:
        peers, skipped = [], {}
        for name in arguments.programs.split(","):
            peer = stack.enter_context(start(name, arguments, processes))
            if isinstance(peer, str):
                skipped[name] = peer
                print(f"skipped {PROGRAMS[name][0]}: {peer}", flush=True)
            else:
                peers.append(peer)
                print(f"{PROGRAMS[name][0]}: first call done after {peer.start_s:.1f} s", flush=True)
        if not peers:
            sys.exit("error: no program could be started")
        take_turns(peers, calls, arguments)
        outcome = describe(peers, skipped, calls, arguments)
    write(outcome, arguments)


def parse_arguments() -> argparse.Namespace:
    """Return the flags; leave with one message for a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, rounds=5)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="the first one is what ratios refer to")
    parser.add_argument("--calls", default="train,predict,predict_one", help=", ".join(CALLS))
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--batch_size", type=count, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="not of Keras' programs")
    parser.add_argument("--steps", type=count, default=2, help="in a row, of each program in each round")
    parser.add_argument("--caches", default="", help="folder for compiled programs; empty: a new one, for cold starts")
    parser.add_argument("--patience", type=float, default=1800, help="seconds that a program may take to start")
    arguments = parser.parse_args()
    for flag, known in (("programs", PROGRAMS), ("calls", CALLS)):
        names = getattr(arguments, flag).split(",")
        if unknown := set(names) - set(known):
            parser.error(f"--{flag}: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
        if len(set(names)) < len(names):
            parser.error(f"--{flag}={getattr(arguments, flag)} names one twice")
    return arguments


@contextlib.contextmanager
def start(
    name: str, arguments: argparse.Namespace, processes: Processes, patience: float | None = None
) -> Iterator[Peer | str]:
    """Start a program and wait for its first step; yield it, or the reason why it cannot run here.

    Args:
      name: one of PROGRAMS.
      arguments: the flags.
      processes: what begins and ends it.
      patience: seconds that it may take; by default all of --patience.
    """
    _, file, flags, environment = PROGRAMS[name]
    python = arguments.python if environment == "ours" else arguments.peers_python
    command = [python, str(HERE / "peers" / file), *flags]
    command += [f"--{flag}={getattr(arguments, flag)}" for flag in ("backbone", "batch_size", "image_size")]
    command.append(f"--first={arguments.calls.split(',')[0]}")
    if file != "keras_applications.py":
        command.append(f"--dtype={arguments.dtype}")
    with (  # compilers' own processes may still write when theirs has been ended
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        open(pathlib.Path(folder, "log"), "w+", encoding="utf-8") as errors,
    ):
        caches = {variable: str(pathlib.Path(arguments.caches or folder, variable)) for variable in CACHES}
        began = time.perf_counter()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = processes.begin(command, env=os.environ | caches, **pipes)
        out_of_patience = threading.Event()
        seconds = arguments.patience if patience is None else patience
        impatience = threading.Timer(seconds, lambda: (out_of_patience.set(), processes.end(process)))
        impatience.start()
        try:
            ready = read_answer(process)
            impatience.cancel()
            if out_of_patience.is_set():
                yield f"not ready within --patience={arguments.patience:g}"
            elif ready is None:
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["it said nothing"]
                named = [line for line in lines if "Error" in line]
                yield f"status {process.wait()}: {textwrap.shorten((named or lines)[-1], 200)}"
            else:
                empty = [{call: [] for call in CALLS} for _ in range(2)]
                yield Peer(name, process, ready["about"], time.perf_counter() - began, *empty)
        finally:
            impatience.cancel()
            processes.end(process)


def read_answer(process: subprocess.Popen) -> dict | None:
    """Return the next answer of a program, None if it ended."""
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    return None


def take_turns(peers: list[Peer], calls: list[str], arguments: argparse.Namespace) -> None:
    """Warm every call up once, then run the rounds; each round starts with another program."""
    for call in calls:
        for peer in peers:
            peer.run(call, 1, record=False)
    for number in range(arguments.rounds):
        for call in calls:
            for i in range(len(peers)):
                peer = peers[(number + i) % len(peers)]
                peer.run(call, arguments.steps, record=True)
        print(f"round {number + 1} of {arguments.rounds}", flush=True)


def describe(peers: list[Peer], skipped: dict[str, str], calls: list[str], arguments: argparse.Namespace) -> dict:
    """Return everything worth keeping, in JSON's types."""
    first = peers[0]
    return {
        "command": " ".join(["python benchmarks/compare.py", *filter(is_not_a_place, sys.argv[1:])]),
        "commit": find_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "load_average": os.getloadavg(),
        "settings": {key: value for key, value in vars(arguments).items() if "python" not in key and key != "results"},
        "skipped": skipped,
        "programs": {
            peer.name: {
                "about": peer.about,
                "start_to_first_call_s": peer.start_s,
                "peak_bytes": peer.peak_bytes,
                "calls": {call: summarize(peer, first, call) for call in calls},
            }
            for peer in peers
        },
    }


def count_images(call: str, batch_size: int) -> int:
    """Return the images that one call works on."""
    return {"predict_one": 1, "train_run": RUN_STEPS * batch_size}.get(call, batch_size)


def summarize(peer: Peer, first: Peer, call: str) -> dict:
    """Return median seconds, and the program's time over the first one's: median and range over the rounds."""
    of_rounds = [statistics.median(seconds) for seconds in peer.seconds[call]]
    reference = [statistics.median(seconds) for seconds in first.seconds[call]]
    ratios = [mine / its for mine, its in zip(of_rounds, reference, strict=True)]
    return {
        "median_s": statistics.median(sum(peer.seconds[call], [])),
        "median_cpu_s": statistics.median(sum(peer.cpu_seconds[call], [])),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "seconds": peer.seconds[call],
    }


def format_markdown(outcome: dict) -> str:
    """Return the outcome as a page: one table for each kind of call."""
    settings = outcome["settings"]
    about = "backbone", "batch_size", "image_size", "dtype", "rounds", "steps"
    lines = [
        f"# {settings['name']}",
        "",
        ", ".join(f"{key} {settings[key]}" for key in about) + ".",
        f"`{outcome['command']}`  ",
        f"commit {outcome['commit']}, {outcome['time']}, {outcome['machine']}, load average {outcome['load_average']}",
        "",
        "Ratio: time over the first program's in the same round, median [least, greatest]. CPU: seconds of all cores.",
    ]
    titles = {name: PROGRAMS[name][0] for name in outcome["programs"]}
    for call in outcome["settings"]["calls"].split(","):
        size = count_images(call, settings["batch_size"])
        lines += ["", f"## {CALLS[call]}", "", "| program | s | images/s | CPU s | ratio |", "|---|--:|--:|--:|--:|"]
        for name, program in outcome["programs"].items():
            values = program["calls"][call]
            low, high = values["ratio_range"]
            lines.append(
                f"| {titles[name]} | {values['median_s']:.4g} | {size / values['median_s']:.3g} | "
                f"{values['median_cpu_s']:.4g} | {values['ratio']:.2f} [{low:.2f}, {high:.2f}] |"
            )
    kind = "as found in --caches" if settings["caches"] else "cold"
    lines += [
        "",
        f"## Start ({kind}) and memory",
        "",
        f"| program | first {CALLS[settings['calls'].split(',')[0]]} done, s | peak GiB | |",
        "|---|--:|--:|---|",
    ]
    for name, program in outcome["programs"].items():
        versions = ", ".join(f"{key} {value}" for key, value in program["about"].items())
        peak, seconds = program["peak_bytes"] / 2**30, program["start_to_first_call_s"]
        lines.append(f"| {titles[name]} | {seconds:.1f} | {peak:.2f} | {versions} |")
    lines += [f"\nSkipped: {PROGRAMS[name][0]} ({reason})" for name, reason in outcome["skipped"].items()]
    return "\n".join(lines) + "\n"


def write(outcome: dict, arguments: argparse.Namespace) -> None:
    """Write NAME.json and NAME.md, and print the latter."""
    page = format_markdown(outcome)
    write_files(pathlib.Path(arguments.results), arguments.name, json.dumps(outcome, indent=1) + "\n", page)
    print(page)


if __name__ == "__main__":
    end_by_sigterm()
    main()
