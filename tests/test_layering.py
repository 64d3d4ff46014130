"""A package imports only packages below it: every file under ``dual_loop/`` is parsed and its imports are looked up.

Imports inside functions, under ``TYPE_CHECKING``, relative ones and ``import_module("dual_loop...")`` count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dual_loop"

# From the ground up. A unit is a module or a package directly under dual_loop/.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors", "html", "drawing", "iteration"),
    ("config",),
    ("data", "losses", "points", "metrics", "caption_metrics"),
    ("model", "accelerate", "checkpoint"),
    ("loop", "testing"),
    ("training", "evaluation"),
    ("preflight", "serve"),
    ("cli", "commands", "train_dual_loop", "__main__"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Inside a layer, nobody imports a neighbour, but for these (importer, imported) pairs, each in one direction:
# importing a checkpoint needs the model's names and the model knows nothing of files; what makes a model faster
# replaces its methods; `dual-loop train` reads the flags of the training entry, which hands over to it when it is
# started as a program.
NEIGHBOURS = {
    ("checkpoint", "model"),
    ("commands", "train_dual_loop"),
    ("train_dual_loop", "commands"),
    ("accelerate", "model"),
    ("cli", "commands"),
    ("__main__", "cli"),
}


def _lazy_names(package: Path) -> dict[str, str]:
    """Return the names that ``dual_loop/__init__.py`` offers lazily, with the module that holds each."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_LAZY":
            return dict(ast.literal_eval(node.value))
    return {}


def _imported_modules(tree: ast.Module, package_of_file: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything imported; ``from a import b`` yields ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package_of_file[: len(package_of_file) - node.level + 1] if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


# Whoever else imports it could not run without it, and it must be possible to delete it.
ACCELERATES = Path("model/build.py")
# Generated data: only what writes or shows demo data needs it.
USES_TESTING = ("testing", "preflight", "serve", "commands")


def _problem(importer: str, imported: str) -> str | None:
    """Return why the unit ``importer`` may not import the unit ``imported``, None where it may."""
    for unit in (importer, imported):
        if unit not in LEVEL:
            return f"{unit!r} is in no layer; add it to LAYERS in tests/test_layering.py"
    if imported == "testing" and importer not in USES_TESTING:
        return f"{importer!r} imports {imported!r}; only {', '.join(USES_TESTING[1:])} may import it"
    is_below = LEVEL[imported] < LEVEL[importer] and imported != "accelerate"
    if importer == imported or is_below or (importer, imported) in NEIGHBOURS:
        return None
    if imported == "accelerate" and LEVEL[importer] > LEVEL[imported]:
        return f"{importer!r} imports {imported!r}; only {ACCELERATES} may import it"
    relation = "beside" if LEVEL[imported] == LEVEL[importer] else "above"
    return f"{importer!r} imports {imported!r}, which is {relation} it"


def layering_problems(package: Path) -> list[str]:
    """Return one line for every import in ``package`` that goes up or sideways."""
    lazy = _lazy_names(package)
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        unit = relative.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in _imported_modules(tree, ["dual_loop", *relative.parts[:-1]]):
            parts = name.split(".")
            if parts[0] != "dual_loop" or name == "dual_loop.__version__":
                continue
            imported = lazy.get(parts[1], name).split(".")[1] if len(parts) > 1 else "dual_loop"
            if imported == "accelerate" and relative == ACCELERATES:
                continue
            problem = _problem(unit, imported)
            if problem:
                problems.append(f"{relative}:{line}: {problem}")
    return problems


def test_every_import_goes_down() -> None:
    problems = layering_problems(PACKAGE)
    assert not problems, "\n".join(problems)


def test_the_package_is_seen() -> None:
    """Guards the test above: an empty folder would pass it."""
    units = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert {"types", "errors", "config", "data", "losses", "model"} <= units


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("data/reader.py", "import dual_loop.model.build\n", "'data' imports 'model', which is above it"),
        ("data/reader.py", "from dual_loop.losses import dice\n", "'data' imports 'losses', which is beside it"),
        ("data/reader.py", "from dual_loop import metrics\n", "'data' imports 'metrics', which is beside it"),
        ("data/reader.py", "from dual_loop import build_model\n", "'data' imports 'model', which is above it"),
        ("data/reader.py", "from ..losses import dice\n", "'data' imports 'losses', which is beside it"),
        ("data/reader.py", "from .. import losses\n", "'data' imports 'losses', which is beside it"),
        ("losses.py", "def f():\n    from dual_loop.model import build\n", "'losses' imports 'model'"),
        ("losses.py", "if TYPE_CHECKING:\n    from dual_loop.loop import captioner\n", "'losses' imports 'loop'"),
        ("losses.py", "import_module('dual_loop.training.trainer')\n", "'losses' imports 'training'"),
        ("model/build.py", "from dual_loop.checkpoint import store\n", "'model' imports 'checkpoint'"),
        ("training/trainer.py", "from dual_loop.evaluation import evaluate\n", "'training' imports 'evaluation'"),
        ("html.py", "from dual_loop.drawing import x\n", "'html' imports 'drawing', which is beside it"),
        ("model/sa2va.py", "from dual_loop import accelerate\n", "'accelerate', which is beside it"),
        ("loop/x.py", "from dual_loop.accelerate import lora\n", "only model/build.py may import it"),
        ("training/x.py", "from dual_loop.testing import scenes\n", "only preflight, serve, commands may import it"),
        ("data/x.py", "from dual_loop.testing import scenes\n", "only preflight, serve, commands may import it"),
        ("helpers.py", "from dual_loop.errors import explain\n", "'helpers' is in no layer"),
        ("loop/x.py", "from dual_loop import nonsense\n", "'nonsense' is in no layer"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, file: str, source: str, expected: str) -> None:
    problems = _problems_of(tmp_path, file, source)
    assert len(problems) == 1
    assert expected in problems[0]
    assert problems[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("checkpoint/importer.py", "from dual_loop.model.build import build_model\n"),
        ("data/reader.py", "from .masks import decode\nfrom dual_loop import __version__\nimport torch\n"),
        ("training/trainer.py", "from dual_loop import checkpoint, losses, metrics\nfrom dual_loop.data import sav\n"),
        ("commands/train.py", "from dual_loop.train_dual_loop import main\n"),
        ("model/build.py", "def f():\n    from dual_loop import accelerate\n"),
        ("testing/demo_data.py", "from dual_loop.data.masks import encode_rle\n"),
        ("serve/demo_app.py", "from dual_loop.testing.scenes import generate_scene\n"),
        ("accelerate/sam2.py", "from dual_loop.model.sa2va import GroundingDecoder\n"),
    ],
)
def test_imports_from_below_pass(tmp_path: Path, file: str, source: str) -> None:
    assert _problems_of(tmp_path, file, source) == []


def _problems_of(folder: Path, file: str, source: str) -> list[str]:
    package = folder / "dual_loop"
    (package / file).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("_LAZY = {'build_model': 'dual_loop.model.build'}\n", encoding="utf-8")
    (package / file).write_text(source, encoding="utf-8")
    return layering_problems(package)
