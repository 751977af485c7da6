"""The folder of a run: what lies where, what shaped the run, and whether a resumed run is still the same run."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import common
from cxa_jax.atomic_files import remove_leftovers, replace_when_written
from cxa_jax.distributed import is_first
from cxa_jax.errors import UserError
from cxa_jax.file_lock import lock_file

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "clu")

# Fields that do not shape a result: where data lie, how many readers, how long to go on, how to evaluate.
FREE_FIELDS = (
    "name",
    "model.implementation",  # the same function of the same variables
    "data.data_dir",
    "data.manual_dir",
    "data.name",
    "data.folder.positive",  # with the next four: the data's fingerprint says what they made
    "data.folder.negative",
    "data.folder.patient_regex",
    "data.folder.table",
    "data.folder.test_fraction",
    "data.num_threads",
    "data.num_workers",
    "data.allow_missing",
    "train.num_epochs",
    "train.checkpoint_every_steps",
    "train.remat",
    "train.resume_changed",
)
FREE_SECTIONS = ("eval.", "benchmark.")

# Fields whose change makes other arrays, as `describe_changes` writes them: no checkpoint can be carried over.
NETWORK_FIELDS = tuple(
    f"config.model.{field}:" for field in ("backbone", "stride", "stride_by", "pooling", "head", "labels")
)
# Fields whose change makes another state of the optimiser.
OPTIMIZER_FIELDS = ("config.optimizer.name:", "config.optimizer.schedule:", "config.optimizer.warmup_steps:")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write text to `path`, all or nothing."""
    with replace_when_written(path) as neighbour:
        neighbour.write_text(text, encoding="utf-8")


def to_json(value: Any) -> str:
    """Dump `value` as strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Create the folder if need be, hold it against other processes, and yield it as an absolute path.

    Raises:
      UserError: it cannot be created or written, or another process holds it.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path} cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"--workdir={path} cannot be written; choose another")
    refuse_outward_links(path)
    if not is_first():  # the first process holds it for all
        yield path
        return

    def refuse(holder: str) -> None:
        raise UserError(f"--workdir={path} is in use by {holder}; wait until it ends, or choose another")

    with lock_file(path / LOCK_FILE, refuse):
        remove_leftovers(path)
        yield path


def refuse_outward_links(folder: pathlib.Path) -> None:
    """Refuse a folder in which a link leads out of it: a workdir from elsewhere must not write over one's own files.

    The folder itself may be a link.

    Raises:
      UserError: names the first link.
    """
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (pathlib.Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not pathlib.Path(os.path.realpath(path)).is_relative_to(root):
                raise UserError(f"{path} is a link out of {folder}; put what it leads to in its place, or delete it")


class _DiaryHandler(logging.FileHandler):
    """A log file whose lines may be lost, as on a full disk: told once, not with a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        logger = logging.getLogger("cxa_jax")
        logger.removeHandler(self)
        logger.warning("%s cannot be written (%s); the rest is told here alone", self.baseFilename, sys.exc_info()[1])


def log_to_file(workdir: pathlib.Path) -> None:
    """Append the package's log to `workdir`/log.txt, besides the console."""
    handler = _DiaryHandler(workdir / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("cxa_jax")
    for other in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        logger.removeHandler(other)
        other.close()
    logger.addHandler(handler)


def append_environment(workdir: pathlib.Path, data: str) -> None:
    """Add this session to environment.json, a list with one entry for each start: a resumed run has several."""
    path = workdir / "environment.json"
    sessions = _read_sessions(path) if path.exists() else []
    write_atomically(path, to_json([*sessions, describe_environment() | {"data": data}]))


def _read_sessions(path: pathlib.Path) -> list[Any]:
    """Return the entries of earlier starts; a damaged diary is put aside, since no run depends on it."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        sessions = error
    if isinstance(sessions, list):
        return sessions
    aside = path.with_suffix(".damaged")
    path.replace(aside)
    log.warning("%s is damaged and now %s; a new list of this run's starts begins", path, aside.name)
    return []


def describe_environment() -> dict[str, Any]:
    """Return what besides config and data shaped a run: versions, commit, machine, devices, command, time (UTC)."""
    return {
        "command": " ".join(sys.argv),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": read_commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def read_commit() -> str:
    """Return the commit of this source tree, '+changes' appended if it was edited, or 'unknown' outside git."""
    source = pathlib.Path(__file__).parent.parent
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return "unknown"


def _git(folder: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def flatten_config(config: ConfigDict) -> dict[str, Any]:
    """Return {'train.batch_size': 16, ...} in JSON's types (tuples as lists)."""
    flat = {}

    def visit(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value

    visit("", json.loads(config.to_json_best_effort()))
    return flat


def add_younger_fields(flat: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """Return a run's flat config with the defaults of the fields that `config` has and the run is too old to have."""
    return flatten_config(common.get_config(config.name, config.model.backbone)) | flat


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return 'config.a.b: old -> new' for every field that shapes a result and differs; inputs are flat configs."""
    free = set(FREE_FIELDS)
    if "cosine" in (old.get("optimizer.schedule"), new.get("optimizer.schedule")):
        free.remove("train.num_epochs")  # the cosine ends there
    fields = sorted((old.keys() | new.keys()) - free)
    fields = [field for field in fields if not field.startswith(FREE_SECTIONS)]
    missing = "(absent)"
    return [
        f"config.{field}: {old.get(field, missing)!r} -> {new.get(field, missing)!r}"
        for field in fields
        if old.get(field, missing) != new.get(field, missing)
    ]


def check_same_run(meta: dict[str, Any], config: ConfigDict, fingerprint: str, workdir: pathlib.Path) -> list[str]:
    """Return the differences between a checkpoint's run and this one, if resuming is allowed all the same.

    Fields that are younger than the run had their defaults.

    Raises:
      UserError: config or data differ and config.train.resume_changed is False, or the network is another one.
    """
    changes = describe_changes(add_younger_fields(meta["config"], config), flatten_config(config))
    other_network = [change for change in changes if change.startswith(NETWORK_FIELDS)]
    if other_network:
        raise UserError(f"{workdir} holds another network; choose another --workdir:\n  " + "\n  ".join(other_network))
    other_optimizer = [change for change in changes if change.startswith(OPTIMIZER_FIELDS)]
    if other_optimizer:
        raise UserError(
            f"{workdir} holds the state of another optimiser; choose another --workdir, which may start from this "
            "run's backbone by --config.init.run:\n  " + "\n  ".join(other_optimizer)
        )
    if meta["fingerprint"] != fingerprint:
        changes.append(f"data fingerprint: {meta['fingerprint'][:12]} -> {fingerprint[:12]}")
    if changes and not config.train.resume_changed:
        raise UserError(
            f"{workdir} holds a run with other settings:\n  " + "\n  ".join(changes) + "\n"
            "Choose another --workdir, or go on with the new ones by --config.train.resume_changed=True."
        )
    return changes
