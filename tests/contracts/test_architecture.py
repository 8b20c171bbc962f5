"""The order of CONTRIBUTING.md, enforced: which folder may import what, and what is light."""

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import msn_export

PACKAGE = Path(msn_export.__file__).parent
# from the bottom up: folders and the modules beside them; each may import those before it, in its
# functions too
ORDER = (
    "errors", "input_files", "spec", "progress", "schema", "host", "preprocessing",
    "fit_record", "version_table", "onnx_header", "onnx_loops", "manifest", "files", "images",
    "picture_table", "image_folder", "labelled", "engine_header", "golden", "models",
    "processor_config", "hub_folder", "options", "metrics", "logistic_regression", "graph",
    "runtime", "mixed_precision", "feed", "artifact", "engine", "benchmark", "calibration",
    "baseline", "compare", "reporting", "embedding", "cluster", "triton_server", "commands",
    "cli", "api", "__main__",
)  # fmt: skip
HEAVY = frozenset(
    {"torch", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "transformers",
     "safetensors", "huggingface_hub", "PIL", "click", "rich", "tensorrt", "tensorrt_lean",
     "tensorrt_rtx", "cuda", "openvino", "tritonclient", "ray", "starlette", "pyarrow", "sklearn",
     "usearch"}
)  # fmt: skip
# folder -> the packages of others that its modules may import; at import, or inside a function
MAY_IMPORT = {
    "models": ({"numpy", "torch", "safetensors"}, {"huggingface_hub"}),
    "metrics": ({"numpy"}, set()),
    "graph": ({"numpy", "onnx", "onnx_ir", "onnxscript", "onnxsim", "ml_dtypes"}, set()),
    "runtime": ({"numpy"}, set()),
    "engine": ({"numpy"}, set()),
    "benchmark": ({"numpy"}, {"torch"}),
    "calibration": ({"numpy", "onnxruntime", "onnx_ir", "onnx"}, set()),
    "compare": ({"numpy", "onnx_ir"}, set()),
    "reporting": ({"numpy"}, {"PIL"}),
    "embedding": ({"numpy"}, {"PIL", "pyarrow", "usearch"}),
    "cluster": ({"numpy"}, {"pyarrow"}),
    "triton_server": ({"numpy", "onnx", "onnx_ir"}, set()),
    "commands": ({"numpy", "onnx_ir"}, {"jinja2", "matplotlib", "pyarrow"}),
    "cli": ({"click", "rich"}, set()),
}
# module -> what it may import beyond its folder's row, each for the reason that is its subject
EXCEPTIONS = {
    "graph/torch_reference.py": {"torch"},  # walks the module and shares its weights
    "graph/torch_ops.py": {"torch"},
    "graph/simplify.py": {"onnxruntime"},  # computes constants, and runs what came of it
    "triton_server/config.py": {"tritonclient"},
    "reporting/hub_card.py": {"huggingface_hub"},  # inside its functions: the hub's YAML
    "commands/hub.py": {"huggingface_hub"},  # inside its functions: uploads
    "commands/report.py": {"huggingface_hub"},  # inside its functions: asks for it
    "cluster/cluster.py": {"ray"},  # inside its functions: loaded when a cluster is joined
    "cluster/serve.py": {"ray", "starlette"},
    "runtime/onnxruntime.py": {"onnxruntime"},
    "runtime/providers.py": {"onnxruntime"},
    "runtime/runner.py": {"PIL"},  # named in annotations
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), path


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Give each imported module's full name, and whether importing the file imports it."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside and id(node) not in typing
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", at_import
            for alias in node.names:
                yield f"{node.module}.{alias.name}", at_import


def folder_of(name: str) -> str:
    """Name the folder, or the module beside the folders, that a path or a full name is in."""
    return name.removeprefix("msn_export.").removesuffix(".py").replace("/", ".").split(".")[0]


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_packages_of_others_are_those_of_the_table(name: str) -> None:
    folder = folder_of(name)
    if folder not in MAY_IMPORT:
        return
    at_import, later = MAY_IMPORT[folder]
    at_import = at_import | EXCEPTIONS.get(name, set())
    for module, eager in imports(MODULES[name]):
        root = module.partition(".")[0]
        if root in HEAVY:
            assert root in (at_import if eager else at_import | later), f"{name}: {module}"


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_points_upwards(name: str) -> None:
    folder = folder_of(name)
    if folder == "__init__":
        return
    for module, _ in imports(MODULES[name]):
        below = folder_of(module) if module.startswith("msn_export.") else folder
        if below not in {folder, "__version__"}:
            assert ORDER.index(below) < ORDER.index(folder), f"{name}: {module}"


def test_no_module_imports_one_that_imports_it() -> None:
    """Nor through others, in functions and for types alone included."""
    paths = {f"msn_export.{name[:-3].replace('/', '.')}": path for name, path in MODULES.items()}
    graph = {}
    for module, path in paths.items():
        names = [name for name, _ in imports(path)]
        inside = {name.rpartition(".")[0] for name in names if name not in paths}
        packages = {f"{package}.__init__" for package in inside}  # not of modules in them alone
        graph[module] = (packages | {*names}) & paths.keys() - {module, "msn_export.__init__"}
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_no_two_classes_have_one_name() -> None:
    classes = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in classes.items() if count > 1} == set()


def test_every_module_is_in_the_order() -> None:
    assert {folder_of(name) for name in MODULES} - {"__init__"} == set(ORDER)


def test_models_know_nothing_of_the_exporter_but_its_errors_and_how_files_are_read() -> None:
    below = ("msn_export.models", "msn_export.errors", "msn_export.input_files")
    for name, path in MODULES.items():
        if name.startswith("models/"):
            for module, _ in imports(path):
                if module.startswith("msn_export."):
                    assert module.startswith(below), name


def loaded_by(statement: str) -> set[str]:
    """List the top-level modules that a statement loads, in a process of its own."""
    show = "print(*(set(sys.modules) - before), file=sys.stderr)"
    code = f"import sys; before = set(sys.modules); {statement}; {show}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stderr.split()}


def test_importing_the_runtime_loads_numpy_and_the_standard_library_alone() -> None:
    loaded = loaded_by("import msn_export.runtime")
    ours = loaded - sys.stdlib_module_names - {"msn_export", "numpy"}
    # numpy's compiled parts register helpers of Cython
    assert {name for name in ours if not name.startswith(("_cython", "cython_runtime"))} == set()


def test_only_their_own_commands_load_ray_and_tritonclient() -> None:
    commands = [name for name in MODULES if name.startswith("commands/")]
    names = ["msn_export." + name.removesuffix(".py").replace("/", ".") for name in commands]
    names.remove("msn_export.commands.triton")
    assert len(names) >= 9
    assert loaded_by(f"import {', '.join(names)}") & {"ray", "starlette", "tritonclient"} == set()


def test_embed_and_bench_need_no_onnx() -> None:
    """[ort] alone runs them."""
    modules = "msn_export.commands.embed, msn_export.commands.bench, msn_export.benchmark.worker"
    modules += ", msn_export.cli.tables"
    assert loaded_by(f"import {modules}") & {"onnx", "onnx_ir", "onnxsim", "torch"} == set()


def test_what_a_cluster_needs_of_us_loads_without_ray() -> None:
    on_ray = {"cluster/serve.py"}
    light = [name for name in MODULES if name.startswith("cluster/") and name not in on_ray]
    names = ", ".join("msn_export." + name.removesuffix(".py").replace("/", ".") for name in light)
    assert loaded_by(f"import {names}") & {"ray", "starlette", "tritonclient"} == set()


def test_help_loads_no_framework() -> None:
    loaded = loaded_by("from msn_export.cli import main; main(['--help'], standalone_mode=False)")
    assert loaded & (HEAVY - {"click", "rich"}) == set()


TESTS = Path(__file__).parent.parent
APART = {
    "builders",
    "clients",
    "contracts",
    "fakes",
    "gpu",
}  # folders of tests that mirror no folder


def test_tests_mirror_the_tree() -> None:
    """``graph/test_fuse_heads.py`` tests ``graph/fuse.py``: a module's name begins a test's."""
    stray = []
    for path in sorted(TESTS.rglob("test_*.py")):
        folder = str(path.parent.relative_to(TESTS)).replace(".", "")
        stems = {p.stem for p in (PACKAGE / folder).glob("*.py")}
        name = path.stem.removeprefix("test_")
        if folder not in APART and not any(f"{name}_".startswith(f"{stem}_") for stem in stems):
            stray.append(str(path.relative_to(TESTS)))
    assert stray == []


def test_every_module_of_60_lines_has_its_tests() -> None:
    without = set()
    for name, path in MODULES.items():
        path_of_tests = name.removesuffix(".py").replace("__init__", "").rpartition("/")
        own = list(TESTS.glob(f"{path_of_tests[0] or '.'}/test_{path_of_tests[2]}*.py"))
        if len(path.read_text().splitlines()) >= 60 and not own:
            without.add(name)
    assert without == set()
