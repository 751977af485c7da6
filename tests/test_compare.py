"""benchmarks/compare.py and gpu.py with programs that only sleep: turns, ratios, what cannot start, what is written."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
SLEEPER = """
import sys, time
sys.path.insert(0, {peers!r})
from protocol import parse_arguments, serve
arguments = parse_arguments(dtype=("float32", "bfloat16"), pace=("1", "3"))
def work():
    with open({log!r}, "a") as log:
        log.write(f"{{arguments.pace}} ")
    time.sleep(0.02 * int(arguments.pace))
print("noise of a library")
serve(arguments.first, {{"train": work, "train_run": work, "predict": work, "predict_one": work}},
      {{"pace": arguments.pace, "device": "bed"}})
"""


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for other in ("processes", "records"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(tmp_path, monkeypatch):
    module = load("compare", monkeypatch)
    (tmp_path / "peers").mkdir()
    log = tmp_path / "log"
    (tmp_path / "peers" / "sleep.py").write_text(SLEEPER.format(peers=str(FOLDER / "peers"), log=str(log)))
    (tmp_path / "peers" / "broken.py").write_text("import no_such_package")
    monkeypatch.setattr(module, "HERE", tmp_path)
    programs = {
        "fast": ("Fast", "sleep.py", [], "ours"),
        "slow": ("Slow", "sleep.py", ["--pace=3"], "peers"),
        "broken": ("Broken", "broken.py", [], "peers"),
    }
    monkeypatch.setattr(module, "PROGRAMS", programs)
    return module


def run(module, monkeypatch, tmp_path, *flags):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--name=x", f"--results={tmp_path / 'results'}", *flags])
    module.main()
    results = tmp_path / "results"
    return json.loads((results / "x.json").read_text()), (results / "x.md").read_text()


def test_programs_take_turns_and_ratios_are_of_rounds(compare, monkeypatch, tmp_path):
    flags = "--programs=fast,slow,broken", "--rounds=3", "--steps=2", "--calls=train,predict_one"
    outcome, page = run(compare, monkeypatch, tmp_path, *flags)
    # First steps, one warm-up of each call, then rounds of two calls, each round begun by another program.
    turn, other = "1 1 3 3 ", "3 3 1 1 "
    expected = "1 3 " + "1 3 " * 2 + 2 * turn + 2 * other + 2 * turn
    assert (tmp_path / "log").read_text() == expected
    slow = outcome["programs"]["slow"]["calls"]["train"]
    low, high = slow["ratio_range"]
    assert low <= slow["ratio"] <= high and 2 < slow["ratio"] < 4
    assert [len(seconds) for seconds in slow["seconds"]] == [2, 2, 2]
    assert outcome["programs"]["fast"]["calls"]["train"]["ratio_range"] == [1, 1]
    assert outcome["commit"] and "--rounds=3" in outcome["command"] and outcome["machine"]
    assert "no_such_package" in outcome["skipped"]["broken"]
    assert "| Slow |" in page and "Skipped: Broken (status 1: ModuleNotFoundError" in page
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["x.json", "x.md"]


def test_unknown_names_are_refused(compare, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(compare, monkeypatch, tmp_path, "--programs=fast,fats")
    assert "--programs: unknown fats; known are fast" in capsys.readouterr().err


def test_a_path_as_name_is_refused_before_anything_runs(compare, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(compare, monkeypatch, tmp_path, "--name=some/where")
    assert "'some/where' is no name of a file" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(compare, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no program could be started"):
        run(compare, monkeypatch, tmp_path, "--programs=broken")


def test_every_program_has_its_file(monkeypatch):
    module = load("compare", monkeypatch)
    for _, file, flags, environment in module.PROGRAMS.values():
        text = (FOLDER / "peers" / file).read_text()
        assert environment in ("ours", "peers")
        for flag in flags:
            name, value = flag.removeprefix("--").split("=")
            assert f"{name}=(" in text and f'"{value}"' in text


@pytest.fixture
def run_gpu(compare, tmp_path, monkeypatch):
    gpu = load("gpu", monkeypatch)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--name=x", f"--results={tmp_path / 'results'}", *flags])
        gpu.main()
        return json.loads((tmp_path / "results" / "x.json").read_text())["cells"]

    return run


@pytest.mark.parametrize("at_once", [1, 12])
def test_settings_of_a_gpu_comparison(run_gpu, tmp_path, at_once):
    """Settings are timed one by one, whatever there is room for, and what does not start is named."""
    groups = "densenet121/4,8/bfloat16/fast,slow", "resnet50/4/float32/fast,broken"
    cells = run_gpu(*groups, f"--at_once={at_once}")
    cells.sort(key=lambda cell: (cell["backbone"], cell["batch_size"]))
    settings = [(cell["backbone"], cell["batch_size"], cell["dtype"]) for cell in cells]
    assert settings == [("densenet121", 4, "bfloat16"), ("densenet121", 8, "bfloat16"), ("resnet50", 4, "float32")]
    for cell in cells[:2]:
        fast, slow = cell["programs"]["fast"], cell["programs"]["slow"]
        assert fast["ratio"] == 1 and 2 < slow["ratio"] < 3.5
        assert fast["images_per_s"] == pytest.approx(cell["batch_size"] / fast["step_s"])
        assert 0.002 < fast["step_s"] < 0.004  # a call is ten steps
    assert list(cells[2]["programs"]) == ["fast"] and "no_such_package" in cells[2]["skipped"]["broken"]
    page = (tmp_path / "results" / "x.md").read_text()
    assert page.count("| densenet121 |") == 4 and "no_such_package" in page


def write_program(compare, tmp_path, monkeypatch, name, before="", after=""):
    """Add a program that runs `before`, then is as the others, with `after` in each of its later calls."""
    text = (
        (tmp_path / "peers" / "sleep.py")
        .read_text()
        .replace("    time.sleep", f"    {after or 'pass'}\n    time.sleep")
    )
    (tmp_path / "peers" / f"{name}.py").write_text(f"{before}\n{text}")
    monkeypatch.setitem(compare.PROGRAMS, name, (name.title(), f"{name}.py", [], "ours"))


def children():
    """The programs that this process has started and that still run."""
    task = pathlib.Path("/proc/self/task")
    return {pid for path in task.glob("*/children") for pid in path.read_text().split()}


def test_what_is_not_timed_stands_still(compare, run_gpu, tmp_path, monkeypatch):
    """Programs that still compile, and what they have started, do no work while a setting is timed."""
    log = tmp_path / "log"
    write = f"print(end='.', file=open({str(log)!r}, 'a'))"
    busy = f"import time\nfor _ in range(300):\n  {write}\n  time.sleep(.01)"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])"
    write_program(compare, tmp_path, monkeypatch, "starting", before=child)
    wait = f"import os, time\nwhile not os.path.exists({str(log)!r}): time.sleep(.01)"
    write_program(compare, tmp_path, monkeypatch, "waiting", before=wait)
    cells = run_gpu("densenet121/4/bfloat16/waiting,slow", "resnet50/4/float32/starting")
    assert [list(cell["programs"]) for cell in cells] == [["waiting", "slow"], ["starting"]]
    _, timed, after = log.read_text().partition("1 3 1 3 3 1 1 3 ")  # one warm-up, three rounds of one call
    assert timed and "." in after


def test_a_setting_begins_when_there_is_room(compare, run_gpu, tmp_path):
    groups = "densenet121/4/bfloat16/fast,slow", "resnet50/4/float32/fast"
    before = children()
    run_gpu(*groups, "--at_once=2")
    assert (tmp_path / "log").read_text().split()[2:] == "1 3 1 3 3 1 1 3".split() + ["1"] * 5
    assert children() <= before


@pytest.mark.parametrize(
    "death", ["calls.append(1) or len(calls) > 2 and os._exit(3)", "threading.Timer(0.3, os._exit, [3]).start()"]
)
def test_a_program_that_dies_is_a_reason_not_the_end(compare, run_gpu, tmp_path, monkeypatch, death):
    """While it is timed, or while it waits for another of its setting."""
    write_program(compare, tmp_path, monkeypatch, "mortal", "import os, threading; calls = []", death)
    write_program(compare, tmp_path, monkeypatch, "late", "import time; time.sleep(1)")
    cells = run_gpu("densenet121/4/bfloat16/mortal,late", "resnet50/4/float32/fast")
    second, first = sorted(cells, key=lambda cell: len(cell["skipped"]))
    assert not first["programs"] and "mortal ended during 'train_run' with status 3" in first["skipped"]["mortal"]
    assert list(second["programs"]) == ["fast"]


@pytest.mark.parametrize("ending", ["error", "interrupt"])
def test_no_program_is_left_over(compare, run_gpu, tmp_path, monkeypatch, ending):
    """Neither one that still compiles nor what it has started, and nobody waits for it."""
    write_program(compare, tmp_path, monkeypatch, "starting", before="import time; time.sleep(60)")
    failure = {"error": OSError("disk full"), "interrupt": KeyboardInterrupt()}[ending]

    def fail(*_):
        raise failure

    monkeypatch.setattr(sys.modules["gpu"], "write", fail)
    before, start = children(), time.monotonic()
    with pytest.raises(type(failure)):
        run_gpu("densenet121/4/bfloat16/fast", "resnet50/4/float32/starting")
    assert time.monotonic() - start < 10 and children() <= before


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ("densenet121/4/bfloat16/nobody", "programs are fast, slow, broken"),
        ("densenet121/4/float16/fast", "types are float32, bfloat16"),
        ("densenet121/4/bfloat16", "BACKBONES/BATCH_SIZES/TYPES/PROGRAMS"),
        ("densenet121/0/bfloat16/fast", "'0' is no whole number of 1 or more"),
        ("densenet121//bfloat16/fast", "'' is no whole number of 1 or more"),
        ("densenet121/4/bfloat16/fast,fast", "names one twice"),
    ],
)
def test_wrong_groups_are_refused(run_gpu, capsys, group, problem):
    with pytest.raises(SystemExit):
        run_gpu(group)
    assert problem in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flag", ["--rounds=0", "--at_once=-1", "--peers_python=/no/such", "--results=/proc/no", "--name=.."]
)
def test_wrong_flags_are_refused(run_gpu, capsys, flag):
    with pytest.raises(SystemExit):
        run_gpu("densenet121/4/bfloat16/fast", flag)
    assert flag.split("=")[0] in capsys.readouterr().err


def test_time_that_is_over(run_gpu):
    (cell,) = run_gpu("densenet121/4/bfloat16/fast", "--patience=0")
    assert cell["programs"] == {} and cell["skipped"] == {"fast": "not begun within --patience=0"}


def test_a_program_that_does_not_get_ready_is_given_up(compare, tmp_path, monkeypatch):
    (tmp_path / "peers" / "broken.py").write_text("import time; time.sleep(60)")
    outcome, _ = run(compare, monkeypatch, tmp_path, "--programs=fast,broken", "--patience=3", "--rounds=1")
    assert list(outcome["programs"]) == ["fast"]
    assert "not ready within --patience=3" in outcome["skipped"]["broken"]


@pytest.mark.parametrize("script", [["compare.py", "--programs=torch"], ["gpu.py", "resnet50/4/float32/torch"]])
def test_sigterm_ends_what_was_begun(tmp_path, script):
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/pid\nexec sleep 300\n")
    peer.chmod(0o755)
    flags = ["--name=x", f"--results={tmp_path}", f"--peers_python={peer}"]
    command = [sys.executable, str(FOLDER / script[0]), *script[1:], *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if (tmp_path / "pid").exists():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.communicate(timeout=60)[1].endswith("ended by SIGTERM\n")
    assert not pathlib.Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
