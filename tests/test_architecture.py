"""The house rules that a reader relies on: imports flow one way, importing is cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfstep

SOURCE = Path(halfstep.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each part of the house, and what it may import. Upwards only: a part sees nothing below itself.
BASE = {"version", "transfer", "transaction", "formats", "hardware", "policy", "split"}
STEP = BASE | {"autocast", "scale", "optim"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "transfer": set(),
    "transaction": set(),
    "formats": set(),
    "hardware": {"version", "formats"},
    "policy": {"formats", "hardware"},
    "split": {"formats"},
    "autocast": BASE,
    "scale": BASE | {"autocast"},
    "optim": BASE | {"autocast"},
    "checkpoint": {"split"},
    "record": set(),
    "processes": set(),
    "observe": BASE | {"autocast", "record"},
    "engine": STEP | {"observe", "checkpoint", "record"},
    "doctor": STEP | {"observe", "checkpoint", "record", "engine"},
    "compare": BASE | {"record", "observe", "processes"},
    "report": BASE | {"record", "observe", "compare", "doctor"},
    "launch": STEP | {"engine", "record", "observe", "doctor", "processes"},
    "cli": STEP | {"engine", "record", "observe", "compare", "doctor", "report", "launch"},
    "workloads": set(),
    "__main__": {"cli"},
    "__init__": STEP | {"engine", "checkpoint", "observe", "record", "doctor", "compare"},
}
#: Single modules that may import more than their part.
EXCEPTIONS = {"cli.demo": {"workloads"}}


def module_of(path: Path) -> str:
    """``cli/demo.py`` -> ``cli.demo``; a package's ``__init__.py`` is the package."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_parts(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and part of every halfstep import, also inside functions and ``if TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                package = ["halfstep", *module.split(".")] if module != "__init__" else ["halfstep", ""]
                base = package if is_package and module != "__init__" else package[:-1]
                name = ".".join([*base[: len(base) - node.level + 1], *([name] if name else [])])
            targets = [f"{name}.{alias.name}" for alias in node.names] if name == "halfstep" else [name]
        else:
            continue
        for target in targets:
            root, _, rest = target.partition(".")
            if root == "halfstep":
                yield node.lineno, rest.partition(".")[0]


def violations(sources: dict[Path, str]) -> list[str]:
    """Imports that go the wrong way, as ``file:line: part imports part``."""
    found = []
    for path, source in sources.items():
        module = module_of(path)
        part = module.partition(".")[0]
        if part not in ALLOWED:
            found.append(f"{path}: {part} has no place in the order")
            continue
        # Every part may ask the package for its version.
        allowed = ALLOWED[part] | EXCEPTIONS.get(module, set()) | {part, "__version__"}
        found += [
            f"{path}:{line}: {module} imports {target or 'halfstep'}"
            for line, target in imported_parts(source, module, path.name == "__init__.py")
            if target not in allowed
        ]
    return found


def test_imports_flow_one_way() -> None:
    assert violations({path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in FILES}) == []


def test_the_order_has_no_cycle() -> None:
    placed: set[str] = set()
    remaining = dict(ALLOWED)
    while remaining:
        free = {part for part, above in remaining.items() if above <= placed}
        assert free, f"a cycle among {sorted(remaining)}"
        placed |= free
        remaining = {part: above for part, above in remaining.items() if part not in free}


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("policy.py", "from halfstep.engine import MixedPrecision", "engine"),
        ("policy.py", "from halfstep import engine", "engine"),
        ("policy.py", "import halfstep.engine as e", "engine"),
        ("policy.py", "from .engine import MixedPrecision", "engine"),
        ("policy.py", "from . import engine", "engine"),
        ("policy.py", "def f():\n    from halfstep.engine import x", "engine"),
        ("policy.py", "import halfstep", "halfstep"),
        ("compare/verdict.py", "from halfstep.report import html", "report"),
        ("compare/verdict.py", "from ..launch import run", "launch"),
        ("compare/__init__.py", "from ..cli import main", "cli"),
        ("report/html.py", "from halfstep.cli import main", "cli"),
        ("launch/run.py", "from halfstep.compare import compare", "compare"),
        ("compare/verdict.py", "from halfstep.doctor import examine", "doctor"),
        ("doctor/lint.py", "from halfstep.launch import run", "launch"),
        ("engine.py", "from halfstep.doctor import replay", "doctor"),
        ("launch/run.py", "import halfstep.cli.run", "cli"),
        ("cli/run.py", "import halfstep.workloads", "workloads"),
        ("workloads/gpt.py", "from halfstep import MixedPrecision", "MixedPrecision"),
        ("__init__.py", "from halfstep.cli import main", "cli"),
        ("__init__.py", "from .cli import main", "cli"),
        ("newcomer.py", "", "no place in the order"),
    ],
)
def test_the_checker_finds_what_it_is_for(file: str, source: str, found: str) -> None:
    result = violations({Path(file): source})
    assert len(result) == 1 and result[0].endswith(found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine.py", "from halfstep import hardware\nfrom halfstep.optim import MasterWeights\nfrom torch import nn"),
        ("optim/__init__.py", "from halfstep.optim.plain import export_fp32\nfrom .plain import export_fp32"),
        ("cli/demo.py", "import halfstep.workloads"),
        ("__main__.py", "from halfstep.cli import main"),
        ("hardware.py", "from halfstep import __version__"),
        ("report/html.py", "from . import svg\nfrom ..compare import to_json"),
    ],
)
def test_the_checker_lets_through_what_is_right(file: str, source: str) -> None:
    assert violations({Path(file): source}) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None and len(docstring) > 20


def test_every_test_file_has_a_name_of_its_own() -> None:
    # Test folders are no packages, so pytest collects no second file of one name: it stops there.
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_import_loads_no_plotting_no_compiler_and_no_command_line() -> None:
    # sympy comes with torch's compiler, which takes as long to import as torch itself.
    heavy = {"matplotlib", "scipy", "jinja2", "rich", "typer", "sklearn", "pandas", "sympy"}
    program = f"import sys, halfstep; print(*sorted({heavy!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    command = [sys.executable, "-W", "error", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (run.stdout.split(), run.stderr) == ([], "")


def test_what_is_public_exists() -> None:
    assert len(set(halfstep.__all__)) == len(halfstep.__all__)
    for name in halfstep.__all__:
        assert hasattr(halfstep, name)
