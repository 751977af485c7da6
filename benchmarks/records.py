"""What a benchmark's record says of where it comes from, and how it is written. Standard library alone."""

import argparse
import os
import pathlib
import platform
import subprocess

HERE = pathlib.Path(__file__).parent


def file_name(text: str) -> str:
    """Check a --name; a type for argparse."""
    if pathlib.Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file: give a name, and its folder by --results")
    return text


def find_commit() -> str:
    """Return the commit of this file, marked if files differ from it; 'unknown' outside a repository."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+changes", "--abbrev=40", "--match=no tag"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def is_not_a_place(argument: str) -> bool:
    """Return False for the flags that say where things lie on this machine, which matters to nobody else."""
    return argument.split("=")[0] not in ("--python", "--peers_python", "--results", "--caches")


def processor() -> str:
    """Return the processor's name."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_files(folder: pathlib.Path, name: str, record: str, page: str) -> None:
    """Write NAME.json and NAME.md, each all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", record), (".md", page)):
        temporary = folder / f".{name}{suffix}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / (name + suffix))
