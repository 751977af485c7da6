"""ablate(config, workdir): poolings, strides and seeds, each run the main job itself; then one table and one figure."""

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
from cxa_jax.ablation_plan import Member, Plan, make_members, read_plan
from cxa_jax.ablation_table import compute_table, format_table, table_rows
from cxa_jax.config_checks import check_config
from cxa_jax.console import progress_bar
from cxa_jax.data.datasets import Dataset, describe_splits, load_dataset
from cxa_jax.data.parallel import count_cores
from cxa_jax.errors import UserError
from cxa_jax.metric_writer import write_history
from cxa_jax.models import BACKBONES
from cxa_jax.models.cxa import check_model
from cxa_jax.process_pool import Job, run_jobs, split_cores
from cxa_jax.runtime import CACHE, NUM_CPU_DEVICES, names_cpu_devices
from cxa_jax.workdir import flatten_config, log_to_file, open_workdir, to_json, write_atomically

log = logging.getLogger(__name__)

STEP_TIMES = "step_times.json"


def ablate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Train every pooling, at every stride, with every seed, compare them on the same test images, write to `workdir`.

    The same command again goes on where a cut ablation stopped: finished runs are kept, a cut one resumes.

    Returns:
      What was written to ablation.json.

    Raises:
      UserError: the config cannot be meant, or a run failed; the others are finished and tabulated first.
    """
    with open_workdir(workdir) as folder:
        return _ablate(config, folder)


def _ablate(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    plan = read_plan(config)
    log_to_file(folder)
    for member in make_members(config, config.data.name, plan, folder):
        check_model(member.config.model)
        model = member.config.model
        backbone = BACKBONES[model.backbone](stride=model.stride, stride_by=model.stride_by)
        check_config(member.config, backbone.min_size)
    dataset = load_dataset(config.data)
    log.info("data: %s\n%s", dataset.description, describe_splits(dataset))
    members = make_members(config, dataset.name, plan, folder)
    num_parallel = plan.num_parallel or (count_cores() if find_platform() == "cpu" else 1)
    failed = run_members(members, dataset, plan.rules, num_parallel)
    finished = [member for member in members if member.name not in failed]
    if not finished:
        raise UserError(_describe_failures(members, failed))
    step_times = time_steps(finished, num_parallel, folder)
    report = write_report(config, plan, finished, step_times, folder)
    if failed:
        raise UserError(_describe_failures(members, failed))
    return report


def find_platform() -> str:
    """Return jax's default platform, asked in another process: this one must leave an accelerator to its runs."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def run_members(members: list[Member], dataset: Dataset, rules: tuple[str, ...], num_parallel: int) -> set[str]:
    """Run what is not finished, under one bar over epochs; return the names of the runs that failed."""
    todo = [member for member in members if not member.is_finished(dataset.fingerprint, rules)]
    log.info("%d of %d runs to do, %d at a time", len(todo), len(members), num_parallel)
    if not todo:
        return set()
    failed, places = set(), split_cores(num_parallel)
    jobs = [
        Job(member.name, train_member, (member.config, str(member.folder), rules), member.folder / "console.txt")
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
    """Time one train step of each arm, interleaved, on the cores of one run and with nothing beside it."""
    path = folder / STEP_TIMES
    configs = {member.arm.name: member.config for member in reversed(members)}  # the first seed of each
    if path.is_file():
        measured = json.loads(path.read_text(encoding="utf-8"))
        if measured["configs"] == {name: flatten_config(own) for name, own in configs.items()}:
            return measured
    log.info("timing a train step of each of %d", len(configs))
    job = Job("step times", measure_step_times, (configs, str(path)), folder / "step_times_console.txt")
    statuses = []
    place = split_cores(num_parallel)[:1]
    run_jobs([job], place, _environment(place), lambda _, status: statuses.append(status), lambda: None)
    if statuses != [0]:
        log.error("no step times: %s\n  the log: %s", _last_line(job.log), job.log)
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write_report(
    config: ConfigDict, plan: Plan, members: list[Member], step_times: dict[str, Any] | None, folder: pathlib.Path
) -> dict[str, Any]:
    """Write ablation.json, .csv, .md, .png and .pdf, and log the table."""
    scores = {(member.arm, member.seed): load_scores(member.folder / SCORES) for member in members}
    report = compute_table(scores, step_times, plan.rules, config.eval.num_bootstrap, config.seed)
    write_atomically(folder / "ablation.json", to_json(report))
    write_history(folder / "ablation.csv", table_rows(report))
    text = format_table(report)
    write_atomically(folder / "ablation.md", text)
    save_ablation_figure(report, folder / "ablation")
    log.info("%s", text)
    log.info("everything is in %s: ablation.md, .csv, .json, .png, .pdf, and a folder for each run", folder)
    return report
