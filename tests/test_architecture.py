"""The table in CONTRIBUTING.md, enforced: which folder may import what, and what is light."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import msn_export

PACKAGE = Path(msn_export.__file__).parent
FOLDERS = ("cli", "engine", "check", "graph", "proof", "report", "runtime", "embed", "cluster",
           "bench", "doctor", "triton", "trt", "quantise", "models", "calibration")  # fmt: skip
HEAVY = frozenset(
    {"torch", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "transformers",
     "safetensors", "huggingface_hub", "PIL", "click", "rich", "tensorrt", "tensorrt_lean",
     "tensorrt_rtx", "cuda", "tritonclient", "ray", "starlette", "pyarrow"}
)  # fmt: skip
# folder -> the packages of others that its modules may import; at import, or inside a function
MAY_IMPORT = {
    "cli": ({"click", "rich"}, set()),
    "graph": ({"numpy", "onnx", "onnx_ir", "onnxscript", "onnxsim", "ml_dtypes"}, set()),
    "engine": ({"numpy"}, set()),
    "check": ({"numpy"}, set()),
    "proof": ({"numpy", "onnx_ir"}, set()),
    "report": ({"numpy", "PIL"}, set()),
    "embed": ({"numpy"}, {"PIL", "pyarrow"}),
    "cluster": ({"numpy"}, {"pyarrow"}),
    "bench": ({"numpy"}, {"torch"}),
    "doctor": (set(), set()),
    "runtime": ({"numpy"}, set()),
    "trt": ({"numpy", "onnx_ir"}, set()),
    "quantise": ({"numpy", "onnx_ir"}, set()),
    "triton": ({"numpy", "onnx", "onnx_ir"}, set()),
    "models": ({"numpy", "torch", "safetensors"}, {"huggingface_hub"}),
    "calibration": ({"numpy", "onnxruntime", "onnx_ir", "onnx"}, set()),
}
# module -> what it may import beyond its folder's row, each for the reason that is its subject
EXCEPTIONS = {
    "graph/trace.py": {"torch"},  # walks the module and shares its weights
    "graph/translate.py": {"torch"},
    "graph/operators.py": {"torch"},
    "graph/draft.py": {"torch"},
    "graph/fold.py": {"torch"},
    "graph/module.py": {"torch"},
    "graph/reference.py": {"torch"},
    "graph/simplify.py": {"onnxruntime"},  # runs what came of it
    "graph/shapes.py": {"onnxruntime"},  # computes constants
    "triton/messages.py": {"tritonclient"},
    "cluster/connect.py": {"ray"},  # inside its functions: loaded when a cluster is joined
    "cluster/embed.py": {"ray"},
    "cluster/serve.py": {"ray", "starlette"},
    "bench/torch_reference.py": {"torch"},  # the model beside its artifacts
    "runtime/ort.py": {"onnxruntime"},
    "runtime/ort_session.py": {"onnxruntime"},
    "runtime/runner.py": {"PIL"},  # named in annotations
}
# folder -> the sibling folders it may use: the gates judge what the runtime's selftest finds;
# Q/DQ is written with the graph's own steps; embed is given a runner, on a cluster too; a
# benchmark's contenders are artifacts and the reference; what is compared, compiled or quantised
# goes through all of them
SIBLINGS = {
    "runtime": {"check"},
    "embed": {"runtime"},
    "cluster": {"embed", "runtime"},
    "graph": {"models"},
    "calibration": {"graph"},
    "bench": {"check", "graph", "models", "runtime"},
    "proof": {"check", "engine", "graph", "models", "report", "runtime", "trt"},
    "trt": {"check", "engine", "graph", "runtime"},
    "quantise": {"bench", "calibration", "check", "engine", "graph", "runtime"},
}
# module -> the commands it is made of: a report is of what validate and drift found, and to look
# into an engine drift compiles it once more
COMPOSED = {
    "run_report.py": {"run_drift", "run_validate"},
    "proof/marked.py": {"run_trt"},
}
# the modules at the root, from the bottom up; each may use those before it, whatever its own rank
BOTTOM = ("errors", "sidecar", "spec", "progress", "records", "preprocessing", "files", "driver",
          "images", "manifest_records", "manifest", "engine_header", "golden")  # fmt: skip


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


def folder_of(name: str) -> str | None:
    """Tell which folder of ours a module is in, from its path or its full name."""
    parts = name.removeprefix("msn_export.").replace("/", ".").split(".")
    return parts[0] if parts[0] in FOLDERS else None


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_packages_of_others_are_those_of_the_table(name: str) -> None:
    folder = folder_of(name)
    if folder is None:
        return
    at_import, later = MAY_IMPORT[folder]
    at_import = at_import | EXCEPTIONS.get(name, set())
    for module, eager in imports(MODULES[name]):
        root = module.partition(".")[0]
        if root in HEAVY:
            assert root in (at_import if eager else at_import | later), f"{name}: {module}"


@pytest.mark.parametrize("name", MODULES)
def test_sibling_folders_do_not_import_each_other(name: str) -> None:
    folder = folder_of(name)
    if folder in {None, "cli"}:
        return
    for module, _ in imports(MODULES[name]):
        other = folder_of(module) if module.startswith("msn_export.") else None
        if other is not None:
            assert other in {folder, *SIBLINGS.get(folder or "", set())}, f"{name}: {module}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_below_the_commands_imports_a_command(name: str) -> None:
    root = name.removesuffix(".py").partition("/")[0]
    is_command = root.startswith("run_") or root == "cli"
    for module, _ in imports(MODULES[name]):
        target = module.removeprefix("msn_export.").partition(".")[0]
        if not module.startswith("msn_export."):
            continue
        assert target != "cli" or root == "cli", f"{name}: {module}"
        if target in COMPOSED.get(name, set()):
            continue
        assert not target.startswith("run_") or is_command, f"{name}: {module}"
        assert not (root.startswith("run_") and target.startswith("run_") and target != root)


def test_the_bottom_modules_import_only_what_is_below_them() -> None:
    for rank, name in enumerate(BOTTOM):
        for module, _ in imports(PACKAGE / f"{name}.py"):
            if module.startswith("msn_export."):
                target = module.removeprefix("msn_export.").partition(".")[0]
                if target != "__version__":
                    assert target in BOTTOM[:rank], f"{name}: {module}"


def test_models_know_nothing_of_the_exporter_but_its_errors() -> None:
    for name, path in MODULES.items():
        if name.startswith("models/"):
            for module, _ in imports(path):
                if module.startswith("msn_export."):
                    assert module.startswith(("msn_export.models", "msn_export.errors")), name


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
    commands = [name.removesuffix(".py") for name in MODULES if name.startswith("run_")]
    names = [f"msn_export.{name}" for name in commands if name != "run_triton"]
    assert len(names) >= 9
    assert loaded_by(f"import {', '.join(names)}") & {"ray", "starlette", "tritonclient"} == set()


def test_what_a_cluster_needs_of_us_loads_without_ray() -> None:
    on_ray = {"cluster/embed.py", "cluster/serve.py"}
    light = [name for name in MODULES if name.startswith("cluster/") and name not in on_ray]
    names = ", ".join("msn_export." + name.removesuffix(".py").replace("/", ".") for name in light)
    assert loaded_by(f"import {names}") & {"ray", "starlette", "tritonclient"} == set()


def test_help_loads_no_framework() -> None:
    loaded = loaded_by("from msn_export.cli import main; main(['--help'], standalone_mode=False)")
    assert loaded & (HEAVY - {"click", "rich"}) == set()
