"""Rules that hold for the package as a whole: free imports, layers, names, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qscope_trl

ROOT = Path(qscope_trl.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
# A module may import its own folder and anything of a higher number. `demo` uses everything but the command line.
LAYERS = {
    "__main__": -1, "cli": 0, "demo": 1, "planning": 1,
    "training": 2, "analysis": 2, "steering": 2,
    "monitor": 3, "activations": 3,
    "sae": 4, "hooks": 4,
    "config": 5, "rules": 5, "parsing": 5,
    "features": 6,
    "ops": 7, "files": 7, "bundled": 7,
    "errors": 8, "_version": 8,
}  # fmt: skip
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "matplotlib", "wandb", "numpy")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def place(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_their_own_folder_and_lower_layers_only(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if relative == Path("__init__.py"):
        pytest.skip("the package's own lazy names")
    own = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        if not name.startswith("qscope_trl."):
            continue
        other = place(name)
        assert other == own or LAYERS[other] > LAYERS[own], f"{relative} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "ops").glob("*.py")), ids=lambda p: p.name)
def test_ops_import_torch_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "qscope_trl"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_no_heavy_module() -> None:
    code = "import sys, qscope_trl, qscope_trl.features, qscope_trl.config, qscope_trl.cli; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert loaded.isdisjoint(HEAVY)


def test_lazy_names_equal_the_typed_ones_and_exist() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == qscope_trl._PUBLIC
    assert sorted([*typed, "__version__"]) == qscope_trl.__all__
    for name in qscope_trl.__all__:
        assert getattr(qscope_trl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SAEPenaltyCalback'"):
        qscope_trl.SAEPenaltyCalback  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_every_public_name_is_documented() -> None:
    docs = "".join(p.read_text(encoding="utf-8") for p in [ROOT.parent / "README.md", *ROOT.parent.glob("docs/*.md")])
    missing = [name for name in qscope_trl.__all__ if name not in docs]
    assert not missing
