"""The arrows between the rooms: experiments to profiling and model; profiling to model.scopes; model to nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"model"},
    "profiling": {"profiling", "model.scopes"},
    "experiments": {"experiments", "profiling", "model"},
}
FILES = [path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py"))]


def project_imports(path: Path) -> set[str]:
    """Dotted names, below `stepbill`, of what a file of the project imports from the project."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
            names |= {name.removeprefix("stepbill.") for name in absolute if name.split(".")[0] == "stepbill"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            elif node.module and node.module.split(".")[0] == "stepbill":
                base = node.module.split(".")[1:]
            else:
                continue
            base = ".".join(part for part in base if part)
            names |= {f"{base}.{alias.name}" if base else alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
    for name in project_imports(path):
        assert any(name == room or name.startswith(room + ".") for room in allowed), f"{path} imports {name}"


def test_the_check_sees_every_way_to_write_an_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "model").mkdir()
    wrong = tmp_path / "model" / "wrong.py"
    wrong.write_text(
        "import jax\nfrom .axes import spec\nfrom . import cache\nfrom .. import profiling\n"
        "from ..profiling import hlo\n"
        "import stepbill.experiments.steps\nfrom stepbill.profiling.bill import Bill\n"
    )
    assert project_imports(wrong) == {
        *("model.axes.spec", "model.cache", "profiling", "profiling.hlo", "experiments.steps", "profiling.bill.Bill")
    }


def test_scopes_do_not_import_jax():
    tree = ast.parse((ROOT / "model" / "scopes.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "jax" not in imported
