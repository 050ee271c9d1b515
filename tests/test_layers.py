"""The import rule of the house: packages import downwards only, entries are not imported, config needs no jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "maxtrain"
RANK = {
    name: rank
    for rank, names in enumerate(
        [["config"], ["parallel"], ["ops"], ["models", "data"], ["checkpoint"], ["training", "serving"], ["posttrain"], ["llm"]]
    )
    for name in names
}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path):
    """Names of the maxtrain modules a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "maxtrain":
            yield from ([node.module] if node.module != "maxtrain" else [f"maxtrain.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "maxtrain")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        target = [*module.split("."), ""][1]
        assert target in RANK, f"{path.name} imports the entry {module}"
        if own in RANK and target != own:
            assert RANK[target] < RANK[own], f"{path.relative_to(ROOT)} imports {module}"


def test_config_files_do_not_import_jax():
    for path in (ROOT / "config").glob("*.py"):
        assert "jax" not in {name.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) for name in names(node)}, path


def names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_import_and_help_load_no_jax():
    code = "import sys, maxtrain, maxtrain.train, maxtrain.decode, maxtrain.evaluate, maxtrain.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_size():
    """Files stay below 450 lines, so that each is read in one sitting."""
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not [path for path, count in lines.items() if count > 450]
