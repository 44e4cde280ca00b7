"""The three packages, their version, and which of them may import which."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("pallas_kernels", "quota_jax", "converters")

# package, or a part of it -> top-level names that it must not import
FORBIDDEN = {
    "pallas_kernels": {"quota_jax", "converters", "flax", "transformers", "tests", "torch"},
    "quota_jax": {"converters", "tests", "torch"},
    "quota_jax/cli": {"tests", "torch"},
    "converters": {"tests", "torch"},
    "converters/verify.py": {"tests"},
}


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every absolute import, at any depth of the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value.split(".")[0]


def _rule(relative: str) -> set[str]:
    """The most specific rule that covers a file."""
    covering = [k for k in FORBIDDEN if relative == k or relative.startswith(k + "/")]
    return FORBIDDEN[max(covering, key=len)]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str, root: Path) -> None:
    files = sorted((root / package).rglob("*.py"))
    assert files, f"{package} holds no source file"
    wrong = [
        f"{file.relative_to(root)}:{line} imports {name}"
        for file in files
        for line, name in _imports(file)
        if name in _rule(file.relative_to(root).as_posix())
    ]
    assert not wrong, "\n".join(wrong)


def test_import_scan_sees_hidden_imports(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "import torch.nn as nn\nfrom . import torch_free\n"
        "def f():\n    from converters.hf import x\n    importlib.import_module('tests.a')\n"
    )
    assert sorted(_imports(file)) == [(1, "torch"), (4, "converters"), (5, "tests")]
    assert "torch" in _rule("converters/rules.py")
    assert "torch" not in _rule("converters/verify.py")
    assert "converters" not in _rule("quota_jax/cli/convert.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_from_this_checkout(package: str, root: Path) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == root / package


def test_importing_the_library_needs_neither_torch_nor_jax_triton() -> None:
    code = (
        "import sys, quota_jax, pallas_kernels, converters; "
        "print(sorted({'torch', 'jax_triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wheel_holds_the_packages_and_the_small_models(tmp_path: Path, root: Path) -> None:
    import quota_jax

    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"quota_jax-{quota_jax.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())

    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    models = root / "quota_jax" / "testbed" / "models"
    shipped = {p.relative_to(root).as_posix() for p in models.rglob("*") if p.is_file()}
    assert shipped <= names
    sources = {
        p.relative_to(root).as_posix() for name in PACKAGES for p in (root / name).rglob("*.py")
    }
    assert sources <= names


def test_supported_versions_agree(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    requires = project["project"]["requires-python"]
    assert requires == ">=3.11,<3.14"
    assert project["project"]["optional-dependencies"]["oracle"] == ["torch==2.13.0"]
    # scripts/environment repeats the range, since it runs before anything is installed.
    assert (
        "(3, 11) <= sys.version_info[:2] < (3, 14)"
        in (root / "scripts" / "environment").read_text()
    )
