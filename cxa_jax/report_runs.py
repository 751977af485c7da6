"""Where a report's numbers come from: runs, states, data, configs, versions."""

from typing import Any

from cxa_jax.report_tables import DASH, Table
from cxa_jax.workdir import describe_changes


def tabulate_runs(report: dict[str, Any]) -> list[Table]:
    """Return the runs with their data and states, and the settings in which they differ."""
    rows = []
    for run in report["runs"]:
        if run["kind"] != "run":
            rows.append([run["name"], run["kind"], *[DASH] * 7, run["path"]])
            continue
        train, checkpoint = run["train"], run["checkpoint"]
        images = f"{train['num_images']:,} ({train['num_positives']:,} positive)"
        shared = ", ".join(f"{pair} {count}" for pair, count in train["patients_shared"].items())
        state = f"step {checkpoint['step']}, epoch {checkpoint['epoch']}"
        cells = [run["data"], f"{run['image_size']} px", images, shared, state, run["fingerprint"][:12]]
        rows.append([run["name"], str(run["config"]["seed"]), *cells, run["environment"]["commit"][:12], run["path"]])
    head = [
        "run",
        "seed",
        "data",
        "size",
        "training images",
        "patients shared",
        "state",
        "data print",
        "commit",
        "path",
    ]
    tables = [Table("Where the numbers come from", head, rows)]
    configs = [run["config"] for run in report["runs"] if run["kind"] == "run"]
    names = [run["name"] for run in report["runs"] if run["kind"] == "run"]
    fields = sorted({_field(change) for config in configs[1:] for change in describe_changes(configs[0], config)})
    if fields:
        rows = [[field, *(str(config.get(field, DASH)) for config in configs)] for field in fields]
        tables.append(Table("Settings in which the runs differ", ["field", *names], rows, folded=True))
    if configs:
        rows = [[field, str(value)] for field, value in sorted(configs[0].items())]
        tables.append(Table(f"All settings of {names[0]}", ["field", "value"], rows, folded=True))
    return tables


def _field(change: str) -> str:
    return change.split(":")[0].removeprefix("config.")
