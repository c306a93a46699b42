"""The direction of imports, and which heavy library may be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "corun"

LEVELS = {
    0: {"clock", "errors", "flags", "process"},
    1: {"wire", "run", "stats", "arrivals", "registry", "images", "torch_tools", "weights"},
    2: {"serve", "train", "load", "share", "profile", "predict"},
    3: {"llm", "ectrans", "tasks"},
    4: {"launch", "report", "plan"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
SAME_LEVEL_ALLOWED = {
    ("run", "wire"),  # the stamp columns of the tables are the protocol's
    ("run", "registry"),  # result/ lies beside models/ and datasets/
    ("torch_tools", "images"),
    ("registry", "images"),
}

HOMES = {
    "torch": {"torch_tools", "serve", "train", "predict", "llm", "ectrans"},
    "pynvml": {"profile"},
    "ray": {"launch"},
    "matplotlib": {"report", "predict"},
    "pandas": {"report", "predict", "run"},
    "pyarrow": {"report"},
    "pydantic": {"run"},
    "docker": {"tasks"},
}
ANYWHERE = {"testing", "__init__"}


def _imports(path: Path) -> set[str]:
    """Every absolute module name imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if _package_of(path) not in ANYWHERE)


def test_every_package_has_a_level() -> None:
    """A new package must be given its place in the order before it can be used."""
    assert {_package_of(path) for path in FILES} <= set(LEVEL_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_from_lower_levels(path: Path) -> None:
    """No package imports one of its own level or above, `corun.testing` not at all."""
    own = _package_of(path)
    for module in _imports(path):
        parts = module.split(".")
        if parts[0] != "corun" or len(parts) < 2 or parts[1] in (own, "__version__"):
            continue
        assert parts[1] in LEVEL_OF, f"{path} imports {module}"
        allowed = LEVEL_OF[parts[1]] < LEVEL_OF[own] or (own, parts[1]) in SAME_LEVEL_ALLOWED
        assert allowed, f"{path} (level {LEVEL_OF[own]}) imports {module} (level {LEVEL_OF[parts[1]]})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_place(path: Path) -> None:
    """torch, pynvml, ray, matplotlib, pandas, pyarrow and pydantic are imported only where the design puts them."""
    own = _package_of(path)
    for module in _imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or own in homes, f"{path} imports {module}"


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_corun_loads_nothing_else() -> None:
    """`import corun` imports no third-party module."""
    loaded = _loaded_by("import corun")
    assert not loaded & {"numpy", "torch", "pydantic", "msgspec", "rich", "typer", "pandas"}


@pytest.mark.parametrize(
    "statement",
    [
        "import corun.load.sender, corun.load.ring, corun.load.closed",
        "import corun.serve.server, corun.serve.engine",
        "import corun.profile",
        "import corun.train.session",
    ],
)
def test_measured_processes_stay_light(statement: str) -> None:
    """Clients, servers, trainer and profiler never load pandas, matplotlib, pyarrow or pydantic."""
    assert not _loaded_by(statement) & {"pandas", "matplotlib", "pyarrow", "pydantic"}


@pytest.mark.parametrize(
    "statement",
    ["from corun import registry; registry.models(); registry.datasets()", "import corun.load.sender, corun.profile"],
)
def test_listing_plugins_and_sending_never_load_torch(statement: str) -> None:
    """The model table, a client and the profiler do not pay for torch, scikit-learn or ultralytics."""
    assert not _loaded_by(statement) & {"torch", "torchvision", "sklearn", "ultralytics"}
