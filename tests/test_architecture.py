"""The house: which rooms may look into which, and what stays out."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "cxa_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own floor and below.
FLOORS = [
    {"errors", "array_types", "interruption", "file_lock", "digests", "device_memory", "garbage"},
    {"atomic_files", "console", "masked_cells", "findings", "hlo", "flops", "usage", "distributed"},
    {"companion_files", "weights_registry"},
    {
        "pooling",
        "losses",
        "metrics",
        "heat_maps",
        "map_mass",
        "boxes",
        "predictions",
        "optimizer",
        "workdir",
        "model_names",
        "weights_file",
    },
    {"weighted_statistics", "attention_statistics", "ridge"},
    {"intervals"},
    {"evidence", "statistics", "calibration", "thumbnail"},
    {"comparison", "prevalence", "seed_comparison", "process_pool", "data", "models", "strata"},
    {"group_statistics", "averaged_copies", "cardiothoracic"},
    {"localization", "threshold_free"},
    {"scored_maps"},
    {"classification", "localization_table", "paper_tables"},
    {"box_reader", "map_verdict", "agreement"},
    {"ratio_fit"},
    {"metric_writer", "progress", "sharding", "config_checks", "runtime"},
    {"attribute_baseline", "map_energy"},
    {"short_cut_lines"},
    {"train_state", "timing", "starting_weights"},
    {"steps", "checkpointing"},
    {"evaluate", "run", "background_saves"},
    {"warm_up", "moments"},
    {"map_controls", "saved_maps", "trained_network"},
    {"short_cuts"},
    {"map_rules", "weights"},
    {"map_evaluation"},
    {"phantom_readers"},
    {
        "figures",
        "run_metrics",
        "ratio_metrics",
        "summary",
        "ablation_arms",
        "ablation_table",
        "finding_metrics",
        "measurements",
    },
    {"results", "panels"},
    {"predict", "export", "weights_export", "selftest"},
    {"report_tables", "report_numbers"},
    {"report_localization", "report_runs", "report_ratio"},
    {"report_figures", "report_cards"},
    {"report_pictures", "report_page"},
    {"report"},
    {"outputs", "ablation_figure"},
    {"epoch_end"},
    {"train", "benchmark"},
    {"ablation_member"},
    {"ablation_plan"},
    {"ablation"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The only importers of heavy or fragile libraries, below cxa_jax/.
ONLY_IMPORTERS = {
    "orbax": {"checkpointing.py"},
    "matplotlib": {"ablation_figure.py", "figures.py", "report_figures.py", "report_pictures.py"},
    "jinja2": {"report_page.py"},
    "tensorboardX": {"metric_writer.py"},
    "pydicom": {"data/dicom.py"},
    "safetensors": {"models/torch_files.py", "weights_file.py"},
    "h5py": {"models/keras_h5.py", "models/keras_import.py", "models/keras_layout.py"},
}
BANNED = {"tensorflow", "torch", "keras", "pandas"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "cxa_jax" and len(parts) > 1 and parts[1] != room:
            assert FLOOR[parts[1]] <= FLOOR[room], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path):
    top_level = {module.split(".")[0] for module in imported_modules(path)}
    assert not top_level & BANNED
    for library, importers in ONLY_IMPORTERS.items():
        if library in top_level:
            assert str(path.relative_to(PACKAGE)) in importers


# Pipes between a process and the workers it starts; and the unpickler that refuses every name but tensors'.
PICKLING = {"data/parallel.py", "process_pool.py", "models/torch_files.py"}
RUNNING_CODE = {"eval", "exec", "compile", "__import__"}
UNPACKING = {"extract", "extractall", "unpack_archive"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_read_from_disk_is_run_or_unpacked(path):
    tree = ast.parse(path.read_text())
    top_level = {module.split(".")[0] for module in imported_modules(path)}
    assert not top_level & {"marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile", "yaml"}
    if "pickle" in top_level:
        assert str(path.relative_to(PACKAGE)) in PICKLING
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name):
            assert call.func.id not in RUNNING_CODE, f"{path}, line {call.lineno}"
        if isinstance(call.func, ast.Attribute):
            assert call.func.attr not in UNPACKING, f"{path}, line {call.lineno}"
            if ast.unparse(call.func) in ("np.load", "numpy.load"):
                said = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert said.get("allow_pickle") == "False", f"{path}, line {call.lineno}"


@pytest.mark.parametrize("name", sorted(PICKLING - {"models/torch_files.py"}))
def test_pickles_come_through_pipes_alone(name):
    for call in (node for node in ast.walk(ast.parse((PACKAGE / name).read_text())) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) in ("pickle.load", "pickle.loads"):
            assert ast.unparse(call.args[0]) in ("sys.stdin.buffer", "worker.stdout")


def test_models_see_no_data():
    for path in FILES:
        if room_of(path) == "models":
            assert not [m for m in imported_modules(path) if m.startswith("cxa_jax.data")], path


def test_the_order_of_the_data_knows_no_device():
    assert not [module for module in imported_modules(PACKAGE / "data/pipeline.py") if module.split(".")[0] == "jax"]


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    tree = ast.parse(text)
    if path.name == "__init__.py" and not text.strip():
        return
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_launch_has_no_logic():
    lines = (PACKAGE.parent / "launch.py").read_text().splitlines()
    assert len(lines) <= 90
