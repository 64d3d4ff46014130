"""Rules of the house that a parser can check: sizes, unsafe loading, machine paths, the constraints file."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
SOURCE_FOLDERS = ("dual_loop", "configs", "scripts")

# Calls that run code from a data file, whatever their arguments.
FORBIDDEN_CALLS = {
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "dill", "cloudpickle") for name in ("load", "loads")),
    "pickle.Unpickler",
    "joblib.load",
    "pandas.read_pickle",
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")),
    "eval",
    "exec",
}
# Calls that are safe only with this keyword, written out as this constant.
REQUIRED_KEYWORDS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
UNPICKLERS = {"pickle.Unpickler", "pickle._Unpickler", "_pickle.Unpickler"}


def source_files() -> list[Path]:
    return sorted(path for folder in SOURCE_FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))


def size_problems(source: str) -> list[str]:
    """Return what is too long in ``source``: the file, and functions with their decorators left out."""
    problems = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        problems.append(f"the file has {num_lines} lines (at most {MAX_FILE_LINES})")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                problems.append(f"line {node.lineno}: {node.name} has {num_lines} lines (at most {MAX_FUNCTION_LINES})")
    return problems


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Return the dotted name behind each imported name (``np`` -> ``numpy``)."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _call_problems(node: ast.Call, name: str) -> Iterator[str]:
    keywords = {word.arg: word.value for word in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"{name}( runs code from the data"
    if name in REQUIRED_KEYWORDS:
        keyword, value = REQUIRED_KEYWORDS[name]
        given = keywords.get(keyword)
        if not (isinstance(given, ast.Constant) and given.value is value):
            yield f"{name}( without {keyword}={value}"
    for keyword, unsafe in (("trust_remote_code", True), ("shell", True)):
        given = keywords.get(keyword)
        if given is not None and not (isinstance(given, ast.Constant) and given.value is not unsafe):
            yield f"{name}( with a {keyword} that is not plainly False"


def unsafe_problems(source: str) -> list[str]:
    """Return the calls and classes in ``source`` that could run code from a data file, a hub or a shell."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found = _call_problems(node, _dotted(node.func, aliases))
            problems += [f"line {node.lineno}: {problem}" for problem in found]
        elif isinstance(node, ast.ClassDef) and UNPICKLERS & {_dotted(base, aliases) for base in node.bases}:
            if "find_class" not in {item.name for item in node.body if isinstance(item, ast.FunctionDef)}:
                problems.append(f"line {node.lineno}: {node.name} unpickles without a find_class of its own")
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            if any(getattr(key, "value", "") == "trust_remote_code" and getattr(v, "value", 1) for key, v in pairs):
                problems.append(f"line {node.lineno}: trust_remote_code that is not plainly False")
    return problems


def machine_paths(text: str) -> list[str]:
    """Return the lines of ``text`` that name a folder which only one machine has."""
    # Written in two halves, so that this file passes its own test.
    folders = "|".join(
        ["wo" + "rk", "fa" + "rm", "ro" + "ot", "tm" + "p", "ho" + "me", "opt" + "/wheels", "opt" + "/pypi"]
    )
    pattern = re.compile(rf"(?<![\w.)}}\]*/-])/(?:{folders})/\w")
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_source_is_small_and_safe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert size_problems(source) + unsafe_problems(source) == []


def test_long_code_is_caught() -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert size_problems(function) == ["line 1: f has 81 lines (at most 80)"]
    assert size_problems(function.replace("    pass\n", "", 1)) == []
    assert size_problems("x = 1\n" * 501) == ["the file has 501 lines (at most 500)"]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load as read\nread(path, weights_only=flag)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(data)",
        "import pickle as p\np.Unpickler(file).load()",
        "import pickle\nclass Reader(pickle.Unpickler):\n    pass",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_unsafe_code_is_caught(source: str) -> None:
    assert len(unsafe_problems(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import json\njson.load(file)\nmodel.eval()",
        "import pickle\nclass Reader(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
        "import yaml\nyaml.safe_load(text)",
    ],
)
def test_safe_code_passes(source: str) -> None:
    assert unsafe_problems(source) == []


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, timeout=60)
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    found = []
    for name in listing.stdout.decode().split("\0"):
        path = REPOSITORY / name
        data = path.read_bytes() if name and path.is_file() else b""
        if b"\0" not in data:  # binary files have no lines
            found += [f"{name}: {line}" for line in machine_paths(data.decode("utf-8", errors="replace"))]
    assert found == []


def test_machine_paths_are_caught() -> None:
    work = "/wo" + "rk/"
    assert machine_paths(f"data = '{work}main'\ncd {work}main\nPATH=a:{work}bin") != []
    assert len(machine_paths(f"data = '{work}main'\ncd {work}main")) == 2
    assert machine_paths(f"$OUT{work}x\nhttps://host{work}x\n{{folder}}{work}x\n../shared{work}x\n{work} alone") == []


def constraint_lines() -> list[str]:
    text = (REPOSITORY / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_constraints_are_plain_versions() -> None:
    plain = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(; python_version >= \"3\.\d+\")?")
    assert [line for line in constraint_lines() if not plain.fullmatch(line)] == []


def test_constraints_hold_every_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement

    pins = {
        Requirement(line).name.lower(): next(iter(Requirement(line).specifier)).version for line in constraint_lines()
    }
    metadata = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"^dependencies = \[(.*?)^\]", metadata, re.DOTALL | re.MULTILINE)
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", metadata, re.DOTALL | re.MULTILINE)
    assert core
    assert extras
    needed = [Requirement(text) for text in re.findall(r'"([^"]+)"', core[1] + extras[1])]
    needed = [item for item in needed if item.name != "dual-loop"]  # dev asks for the other extras
    assert len(needed) >= 20
    assert [str(item) for item in needed if not item.specifier.contains(pins.get(item.name, "0"))] == []


def test_the_lock_is_of_the_public_index_and_has_the_tested_versions() -> None:
    text = (REPOSITORY / "uv.lock").read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://[^/\"]+", text))
    assert hosts == {"https://pypi.org", "https://files.pythonhosted.org"}
    assert "path = " not in text
    locked: dict[str, set[str]] = {}
    for name, version in re.findall(r'^name = "(.+)"\nversion = "(.+)"', text, re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    pins = [re.split(r"==|;", line)[:2] for line in constraint_lines()]
    other = [(n, v) for n, v in pins if v not in locked.get(re.sub(r"[-_.]+", "-", n).lower(), {v})]
    assert other == [], "uv lock --upgrade-package NAME==VERSION"


def test_the_citation_has_the_version() -> None:
    from dual_loop import __version__

    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their bare name, and leaves the second out with an error."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
