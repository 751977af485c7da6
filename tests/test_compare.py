"""benchmarks/compare.py with programs that only sleep: turns, ratios, what cannot start, and what is written."""

import importlib.util
import json
import pathlib
import sys

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


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = load("compare")
    monkeypatch.setitem(sys.modules, "compare", module)
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
    monkeypatch.syspath_prepend(FOLDER)
    module = load("compare")
    for _, file, flags, environment in module.PROGRAMS.values():
        text = (FOLDER / "peers" / file).read_text()
        assert environment in ("ours", "peers")
        for flag in flags:
            name, value = flag.removeprefix("--").split("=")
            assert f"{name}=(" in text and f'"{value}"' in text


@pytest.fixture
def run_gpu(compare, tmp_path, monkeypatch):
    gpu = load("gpu")
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


def test_what_is_not_timed_stands_still(compare, run_gpu, tmp_path, monkeypatch):
    """Programs that still compile, and what they have started, do no work while a setting is timed."""
    write = f"print(end='.', file=open({str(tmp_path / 'log')!r}, 'a'))"
    busy = f"import time\nfor _ in range(300):\n  {write}\n  time.sleep(.01)"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])\n"
    (tmp_path / "peers" / "starting.py").write_text(child + (tmp_path / "peers" / "sleep.py").read_text())
    monkeypatch.setitem(compare.PROGRAMS, "starting", ("Starting", "starting.py", [], "ours"))
    cells = run_gpu("densenet121/4/bfloat16/fast,slow", "resnet50/4/float32/starting")
    assert [list(cell["programs"]) for cell in cells] == [["fast", "slow"], ["starting"]]
    log = (tmp_path / "log").read_text()
    before, timed, after = log.partition("1 3 1 3 3 1 1 3 ")  # one warm-up, three rounds of one call
    assert timed and "." in before and "." in after


def test_unknown_programs_and_times_that_are_over(run_gpu, capsys):
    with pytest.raises(SystemExit):
        run_gpu("densenet121/4/bfloat16/nobody")
    assert "programs are fast, slow, broken" in " ".join(capsys.readouterr().err.split())
    (cell,) = run_gpu("densenet121/4/bfloat16/fast", "--patience=0")
    assert cell["programs"] == {} and cell["skipped"] == {"fast": "not begun in the time there was"}


def test_a_program_that_does_not_get_ready_is_given_up(compare, tmp_path, monkeypatch):
    (tmp_path / "peers" / "broken.py").write_text("import time; time.sleep(60)")
    outcome, _ = run(compare, monkeypatch, tmp_path, "--programs=fast,broken", "--patience=3", "--rounds=1")
    assert list(outcome["programs"]) == ["fast"]
    assert "not ready after 3 s; give it more by --patience" in outcome["skipped"]["broken"]
