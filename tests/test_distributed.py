"""Several processes train as one: the same numbers, each image once, one writer, no one left waiting."""

import collections
import csv
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from cxa_jax import distributed
from cxa_jax.errors import UserError

PROGRAM = pathlib.Path(__file__).with_name("distributed_run.py")
TIMEOUT_S = 900  # two processes compile in double precision


def start(workdir, num_devices, *arguments):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, str(PROGRAM), f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command, env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(workdir, *arguments, own=((), ())):
    joint = [f"--coordinator=127.0.0.1:{find_port()}", "--num_processes=2", *arguments]
    return [start(workdir, 2, *joint, f"--process_id={i}", *own[i]) for i in (0, 1)]


def finish(processes):
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one process on four devices, and of two processes on two each; with what each process read."""
    folder = tmp_path_factory.mktemp("Läufe zu zweit")
    ((code, error),) = finish([start(folder / "one", 4, f"--images={folder / 'all'}")])
    assert code == 0, error[-3000:]
    pair = start_two(folder / "two", own=[[f"--images={folder / name}"] for name in ("0", "1")])
    for code, error in finish(pair):
        assert code == 0, error[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(trained):
    one, two = (read_table(trained / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for name in ("train_loss", "dev_loss", "dev_loss_weighted", "dev_auroc", "learning_rate"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name
    for split in ("dev", "test"):
        one, two = (read_table(trained / name / f"predictions_{split}.csv") for name in ("one", "two"))
        assert [row["id"] for row in one] == [row["id"] for row in two] and len({row["id"] for row in two}) == len(two)
        logits = [[float(row["logit"]) for row in rows] for rows in (one, two)]
        np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_process_reads_its_own_rows(trained):
    whole, first, second = (collections.Counter((trained / name).read_text().split("\n")) for name in ("all", "0", "1"))
    both = first + second
    for split, size in (("dev", 13), ("test", 19)):
        for row in range(size):
            # The last batch of test has three images, none of them the second process': it reads one, for the shape.
            times = 2 if (split, row) == ("test", 16) else 1
            assert both[f"{split} {row}"] == times * whole[f"{split} {row}"] > 0, (split, row)
    assert set(first) & set(second) & {f"dev {row}" for row in range(13)} == set()
    # Training reads ahead, so how often depends on time; a half each, not the whole.
    in_training = [sum(count for row, count in c.items() if row.startswith("train")) for c in (whole, first, second)]
    assert max(in_training[1:]) < 0.75 * in_training[0]


@pytest.mark.slow
def test_one_process_writes(trained):
    one, two = ({str(path.relative_to(trained / name)) for path in (trained / name).rglob("*") if "checkpoints" not in path.parts and "tensorboard" not in path.parts} for name in ("one", "two"))  # fmt: skip  # noqa: E501
    assert one == two
    assert len(list((trained / "two" / "tensorboard").iterdir())) == 1
    assert len(read_table(trained / "two" / "metrics.csv")) == 2
    log = (trained / "two" / "log.txt").read_text()
    assert log.count("devices: 4 x") == 1 and "of 2 process(es)" in log
    assert sorted(path.name for path in (trained / "two" / "checkpoints" / "latest").iterdir()) == ["12", "6"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "saved"),
    [
        (((), ["--signal=training:9"]), "step 11"),  # that step and two more
        ((["--signal=training:5"], ["--signal=training:6"]), "step 6"),  # at the end of an epoch, to both
        (((), ["--signal=start:1"]), "step 3"),
        (((), ["--signal=dev:1"]), "step 6"),  # the epoch is finished
        (((), ["--signal=dev:3"]), "step 12"),  # of the last epoch; the second is the first epoch's, by other moments
        (((), ["--signal=save:1"]), "step 6"),
        ((["--signal=predict:1"], ()), "step 12"),
        (((), ["--signal=predict:2"]), "step 12"),
        (((), ["--signal=metrics:1"]), "step 12"),
    ],
    ids=["in an epoch", "both at an epoch's end", "start", "dev", "last dev", "saving", "dev again", "test", "end"],
)
def test_a_signal_to_one_saves_and_ends_all(trained, tmp_path, signals, saved):
    """The run then goes on as if nothing had been."""
    for code, error in finish(start_two(tmp_path / "cut", own=signals)):
        assert code == 75, error[-3000:]
        assert "all together; the same commands go on" in error
    for number, (code, error) in enumerate(finish(start_two(tmp_path / "cut"))):
        assert code == 0, error[-3000:]
        assert number or f"resuming {tmp_path / 'cut'} at {saved}" in error, error[-3000:]
    for name in ("metrics.csv", "predictions_test.csv"):
        assert (tmp_path / "cut" / name).read_text() == (trained / "two" / name).read_text()


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_one_and_back(trained):
    """Two epochs by two processes, a third by one process on one device, a fourth by two."""
    ((code, error),) = finish([start(trained / "two", 1, "--num_epochs=3")])
    assert code == 0 and "resuming" in error and "step 12" in error, error[-3000:]
    (code, error), (other_code, other_error) = finish(start_two(trained / "two", "--num_epochs=4"))
    assert code == other_code == 0 and "step 18" in error, error[-3000:] + other_error[-3000:]
    ((code, error),) = finish([start(trained / "one", 4, "--num_epochs=4")])
    assert code == 0, error[-3000:]
    one, two = (read_table(trained / name / "metrics.csv") for name in ("one", "two"))
    assert [float(row["train_loss"]) for row in one] == pytest.approx(
        [float(row["train_loss"]) for row in two], rel=1e-4
    )


def add_up(victim, how):
    """Run two processes of two devices; return (status, standard error) of each."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(PROGRAM.parents[1]),
    }
    command = [sys.executable, str(PROGRAM.with_name("distributed_sums.py")), f"127.0.0.1:{find_port()}"]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return finish([subprocess.Popen([*command, str(i), str(victim), how], **options) for i in (0, 1)])


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, "killed"),
        *(pytest.param(0, how, marks=pytest.mark.slow) for how in ("killed", "user error", "exit", "late")),
        *(pytest.param(1, how, marks=pytest.mark.slow) for how in ("user error", "exit", "bug", "late")),
    ],
)
def test_the_end_of_one_ends_the_other(victim, how):
    ended = add_up(victim, how)
    assert ended[victim][0] == (-signal.SIGKILL if how == "killed" else 1)
    said = {
        "late": "error: the data are not there",
        "killed": "",
        "user error": "error: the data are not there",
        "exit": "error: enough",
        "bug": "a bug",
    }
    said["late"] = said["user error"]
    assert said[how] in ended[victim][1]
    assert ended[1 - victim][0] not in (0, None)
    assert "another process of this run is gone" in ended[1 - victim][1] or "another task died" in ended[1 - victim][1]


@pytest.mark.slow
def test_two_that_end_well():
    assert [status for status, _ in add_up(-1, "well")] == [0, 0]


def test_flags_that_do_not_go_together():
    for given in [("h:1", 0, -1, False), ("", 2, 0, False), ("h:1", 2, 2, False), ("h", 2, 0, False),
                  ("h:x", 2, 1, False), ("h:1", 2, 0, True)]:  # fmt: skip
        with pytest.raises(UserError, match="--coordinator"), distributed.joined(*given):
            pass


def test_modes_for_one_process():
    with pytest.raises(UserError, match="--mode=predict takes one process"):
        with distributed.joined("h:1", 2, 0, False, "predict"):
            pass


def test_auto_where_nothing_says_how_many(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))]:
        monkeypatch.delenv(name)
    program = "from cxa_jax.distributed import joined\nwith joined('', 0, -1, True): print('in')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "did not come together" in done.stderr and "in" not in done.stdout.split()


def test_a_single_process_is_first_and_waits_for_none(tmp_path):
    with distributed.joined("", 0, -1, False), distributed.first_alone("x"), distributed.writable(tmp_path) as folder:
        assert distributed.is_first() and folder == tmp_path
    distributed.barrier("y")
