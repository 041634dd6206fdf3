"""The table of rooms: what each may import. It reads the sources; a line in the table is the law."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
NUMERIC = {"torch", "numpy", "pyarrow", "PIL", "safetensors"}
ANY = None

# room or file -> packages that it may import beside the standard library
ROOMS: dict[str, set[str] | None] = {
    "vqvae_core": NUMERIC | {"vqvae_core"},
    "cluster": {"ray", "pyarrow", "cluster"},
    "pipelines": ANY,
    "benchmarks": ANY,
}
EXCEPTIONS = {"vqvae_core/shapes.py": {"jaxtyping"}, "vqvae_core/decoding.py": {"simplejpeg"}}  # both may be missing
# package -> the only files that may import it
CONFINED = {
    "mlflow": {"pipelines/tracking.py"},
    "boto3": {"pipelines/preflight.py"},
    "botocore": {"pipelines/preflight.py"},
    "tyro": {"pipelines/cli.py"},
    "vizdoom": {"pipelines/sources/vizdoom.py"},
    "matplotlib": {"pipelines/report.py", "pipelines/sweep_table.py"},
    "optuna": {"pipelines/optuna_search.py"},
    "simplejpeg": {"vqvae_core/decoding.py"},
    "tqdm": {"pipelines/progress.py"},
    "torchmetrics": {"pipelines/image_metrics.py"},
    "onnxruntime": {"pipelines/extractor.py"},
    "ray": {
        "pipelines/stage.py",
        "pipelines/ray_train.py",
        "pipelines/lean_train.py",
        "pipelines/board.py",
        "pipelines/tune.py",
        "pipelines/trial.py",
        "pipelines/optuna_search.py",
        "cluster/session.py",
        "cluster/local.py",
    },
}
NEVER = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_what_its_room_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = imports(path)
    assert not found & NEVER
    allowed = ROOMS[name.split("/")[0]]
    if allowed is not ANY:
        assert found <= STANDARD | allowed | EXCEPTIONS.get(name, set())
    for package, files in CONFINED.items():
        assert package not in found or name in files or name.startswith("benchmarks/"), f"{name} imports {package}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_a_module_does_nothing(path: Path) -> None:
    """At the top of a module stand imports, definitions and constants; calls only where they make a constant."""
    for node in ast.parse(path.read_text()).body:
        script = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        definition = isinstance(
            node,
            ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Try,
        )
        assert script or text or definition, f"{path}:{node.lineno} does something on import"


def test_there_is_no_room_beside_the_table() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"}
    assert packages == set(ROOMS)


def test_nothing_runs_a_shell_or_evaluates_text() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system", "torch.load", "os.popen"}, f"{path}:{node.lineno}"
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}"
