"""ablate(config, workdir): every pooling with every seed, each the main job itself; then one table and one figure."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from cxa_jax.ablation_figure import save_ablation_figure
from cxa_jax.ablation_member import SCORES, load_scores, measure_step_times, train_member
from cxa_jax.ablation_table import compute_table, format_table, table_rows
from cxa_jax.config_checks import check_config
from cxa_jax.console import progress_bar
from cxa_jax.data.datasets import Dataset, describe_splits, load_dataset
from cxa_jax.data.parallel import count_cores
from cxa_jax.errors import UserError
from cxa_jax.metric_writer import count_rows, write_history
from cxa_jax.models import BACKBONES
from cxa_jax.models.cxa import check_model
from cxa_jax.pooling import POOLINGS
from cxa_jax.process_pool import Job, run_jobs, split_cores
from cxa_jax.runtime import CACHE, NUM_CPU_DEVICES, names_cpu_devices
from cxa_jax.workdir import flatten_config, log_to_file, open_workdir, to_json, write_atomically

log = logging.getLogger(__name__)

STEP_TIMES = "step_times.json"


@dataclasses.dataclass(frozen=True)
class Member:
    """One run: a pooling and a seed, with its config and its folder."""

    pooling: str
    seed: int
    config: ConfigDict
    folder: pathlib.Path

    @property
    def name(self) -> str:
        """POOLING-seedN, also the folder's name."""
        return self.folder.name

    def is_finished(self, fingerprint: str) -> bool:
        """Return whether its scores are there, of this very config and these data."""
        if not (self.folder / SCORES).is_file():
            return False
        facts = load_scores(self.folder / SCORES)[1]
        return facts["config"] == flatten_config(self.config) and facts["fingerprint"] == fingerprint

    def count_epochs(self) -> int:
        """Return the finished epochs, as far as its metrics.csv tells."""
        return count_rows(self.folder / "metrics.csv")


def ablate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Train every pooling with every seed, compare them on the same test images, write everything to `workdir`.

    The same command again goes on where a cut ablation stopped: finished runs are kept, a cut one resumes.

    Returns:
      What was written to ablation.json.

    Raises:
      UserError: the config cannot be meant, or a run failed; the others are finished and tabulated first.
    """
    with open_workdir(workdir) as folder:
        return _ablate(config, folder)


def _ablate(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    poolings, seeds, num_parallel = read_ablation(config)
    log_to_file(folder)
    for member in make_members(config, config.data.name, poolings, seeds, folder):
        check_model(member.config.model)
        model = member.config.model
        backbone = BACKBONES[model.backbone](stride=model.stride, stride_by=model.stride_by)
        check_config(member.config, backbone.min_size)
    dataset = load_dataset(config.data)
    log.info("data: %s\n%s", dataset.description, describe_splits(dataset))
    members = make_members(config, dataset.name, poolings, seeds, folder)
    num_parallel = num_parallel or (count_cores() if find_platform() == "cpu" else 1)
    failed = run_members(members, dataset, num_parallel)
    finished = [member for member in members if member.name not in failed]
    if not finished:
        raise UserError(_describe_failures(members, failed))
    step_times = time_steps(finished, num_parallel, folder)
    report = write_report(config, finished, step_times, folder)
    if failed:
        raise UserError(_describe_failures(members, failed))
    return report


def read_ablation(config: ConfigDict) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Return poolings, seeds and the number of parallel runs of config.ablation.

    Raises:
      UserError: there is no such section, or a field cannot be meant.
    """
    if "ablation" not in config:
        raise UserError("--mode=ablate needs the section config.ablation: use --config=configs/ablation.py")
    section = config.ablation
    names = tuple(name.strip() for name in section.poolings.split(",") if name.strip())
    poolings = tuple(POOLINGS) if names == ("all",) else names
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        known = ", ".join(POOLINGS)
        raise UserError(f"config.ablation.poolings={section.poolings!r}: needed is 'all' or some of {known}")
    seeds = tuple(section.seeds)
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"config.ablation.seeds={seeds}: needed is at least one whole number from 0 to {2**32 - 1}")
    for field, values in (("poolings", poolings), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"config.ablation.{field} names one twice: {', '.join(map(str, values))}")
    if section.num_parallel < 0:
        raise UserError(f"config.ablation.num_parallel={section.num_parallel} must be at least 0")
    return poolings, seeds, section.num_parallel


def make_members(
    config: ConfigDict, data_name: str, poolings: tuple[str, ...], seeds: tuple[int, ...], folder: pathlib.Path
) -> list[Member]:
    """Return the runs, seed by seed: all poolings of one seed first, so that a cut ablation is a smaller one.

    PCAM shares a linear head with its map and gets one; all others have the head of the config. GeM takes positive
    features alone, so it reads F where the others read BN(F).
    """
    members = []
    for seed in seeds:
        for pooling in poolings:
            own = config.copy_and_resolve_references()
            with own.unlocked():
                del own.ablation
                own.name, own.seed, own.model.pooling = f"{pooling}-seed{seed}", seed, pooling
                own.data.name = data_name  # 'auto' could find other data later
                if pooling == "pcam":
                    own.model.head = "linear"
                if pooling == "gem" and own.model.attended == "all_normalized":
                    own.model.attended = "normalized"
            members.append(Member(pooling, seed, own, folder / own.name))
    return members


def find_platform() -> str:
    """Return jax's default platform, asked in another process: this one must leave an accelerator to its runs."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def run_members(members: list[Member], dataset: Dataset, num_parallel: int) -> set[str]:
    """Run what is not finished, under one bar over epochs; return the names of the runs that failed."""
    todo = [member for member in members if not member.is_finished(dataset.fingerprint)]
    log.info("%d of %d runs to do, %d at a time", len(todo), len(members), num_parallel)
    if not todo:
        return set()
    failed, places = set(), split_cores(num_parallel)
    jobs = [
        Job(member.name, train_member, (member.config, str(member.folder)), member.folder / "console.txt")
        for member in todo
    ]
    num_epochs = sum(member.config.train.num_epochs for member in todo)
    with progress_bar(num_epochs, "ablation", initial=_count(todo), unit="epoch") as bar:

        def when_done(job: Job, status: int) -> None:
            if status:
                failed.add(job.name)
                log.error("%s failed (status %d): %s\n  its log: %s", job.name, status, _last_line(job.log), job.log)
            else:
                log.info("%s is done", job.name)

        run_jobs(jobs, places, _environment(places), when_done, functools.partial(_show, bar, todo))
    return failed


def _count(members: list[Member]) -> int:
    return sum(member.count_epochs() for member in members)


def _show(bar: tqdm, members: list[Member]) -> None:
    bar.update(_count(members) - bar.n)


def _environment(places: list[list[int]]) -> dict[str, str]:
    """Return what jax is told in a run's process, as `set_up_runtime` does in this one.

    Compiled programs have a place for each number of cores, since XLA splits loops by the cores it sees.
    """
    root = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE)).expanduser()
    variables = {"JAX_COMPILATION_CACHE_DIR": str(root / f"{len(places[0])}_cores")}
    if not names_cpu_devices():
        variables["JAX_NUM_CPU_DEVICES"] = str(min(NUM_CPU_DEVICES, len(places[0]) or count_cores()))
    return variables


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _describe_failures(members: list[Member], failed: set[str]) -> str:
    logs = [f"  {member.name}: {member.folder / 'console.txt'}" for member in members if member.name in failed]
    return f"{len(failed)} of {len(members)} runs failed; the same command tries them again:\n" + "\n".join(logs)


def time_steps(members: list[Member], num_parallel: int, folder: pathlib.Path) -> dict[str, Any] | None:
    """Time one train step of each pooling, interleaved, on the cores of one run and with nothing beside it."""
    path = folder / STEP_TIMES
    configs = {member.pooling: member.config for member in reversed(members)}  # the first seed of each
    if path.is_file():
        measured = json.loads(path.read_text(encoding="utf-8"))
        if measured["configs"] == {name: flatten_config(own) for name, own in configs.items()}:
            return measured
    log.info("timing a train step of each pooling")
    job = Job("step times", measure_step_times, (configs, str(path)), folder / "step_times_console.txt")
    statuses = []
    place = split_cores(num_parallel)[:1]
    run_jobs([job], place, _environment(place), lambda _, status: statuses.append(status), lambda: None)
    if statuses != [0]:
        log.error("no step times: %s\n  the log: %s", _last_line(job.log), job.log)
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write_report(
    config: ConfigDict, members: list[Member], step_times: dict[str, Any] | None, folder: pathlib.Path
) -> dict[str, Any]:
    """Write ablation.json, .csv, .md, .png and .pdf, and log the table."""
    scores = {(member.pooling, member.seed): load_scores(member.folder / SCORES) for member in members}
    report = compute_table(scores, step_times, config.eval.num_bootstrap, config.seed)
    write_atomically(folder / "ablation.json", to_json(report))
    write_history(folder / "ablation.csv", table_rows(report))
    text = format_table(report)
    write_atomically(folder / "ablation.md", text)
    save_ablation_figure(report, folder / "ablation")
    log.info("%s", text)
    log.info("everything is in %s: ablation.md, .csv, .json, .png, .pdf, and a folder for each run", folder)
    return report
