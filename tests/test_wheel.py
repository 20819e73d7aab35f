"""The wheel holds every source file, and works where no checkout is near."""

import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"swarm": "swarm", "client": "swarm/client", "server": "swarm/server", "kernels": "swarm/kernels"}
DATA = {"static", "templates"}
"""Folders of the health page that belong to their package."""
IMPORT_ALL = """
import sys, swarm, swarm.client, swarm.server, swarm.kernels, swarm.checkpoint.source, swarm.errors
for module in (swarm, swarm.client, swarm.server, swarm.kernels):
    print(module.__file__)
print(swarm.__version__, "torch" in sys.modules)
"""


def tree() -> set[str]:
    """Paths that the source files must have in an installation."""
    return {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and (path.suffix == ".py" or path.name == "py.typed" or path.parent.name in DATA)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(copy)], check=True, capture_output=True)
    (found,) = target.glob("swarm_llm-*.whl")
    return found


def test_the_packages_listed_are_the_packages_there_are() -> None:
    """A new sub-package that isn't listed in pyproject.toml would be missing from the wheel alone."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(path).parent for path in tree() if Path(path).parent.name not in DATA}
    assert sorted(listed) == sorted(str(folder).replace("/", ".") for folder in folders)


def test_the_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    """No tests, no caches, no file forgotten."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name) for name in archive.namelist() if name.endswith("/METADATA")).decode()
    assert names == tree()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: demo" in metadata


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that has the wheel, and for the rest sees this environment's packages."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    (here,) = site.getsitepackages()
    (packages / "rest.pth").write_text(f"{here}\n")  # plain folders only: our editable install stays out
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return python


@pytest.mark.parametrize("from_checkout", [False, True])
def test_the_four_packages_import_from_the_wheel(installed: Path, tmp_path: Path, from_checkout: bool) -> None:
    """Isolated (-I), so that no folder of the checkout can help, not even the one we stand in."""
    output = subprocess.run(
        [installed, "-I", "-c", IMPORT_ALL],
        cwd=ROOT if from_checkout else tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert all(line.startswith(str(installed.parents[1])) for line in output[:4]), output
    assert output[4].endswith(" False"), "importing swarm must not load torch"


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_the_four_packages_import_here(tmp_path: Path, where: str) -> None:
    """The installation that the tests use gives our own files, wherever Python starts."""
    output = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=ROOT if where == "checkout" else tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert [Path(line).parent.name for line in output[:4]] == ["swarm", "client", "server", "kernels"]


def test_the_checkout_does_not_hide_other_packages() -> None:
    """transformers imports a package called `kernels` where it is installed; our folder must not pass for it."""
    code = "import swarm, importlib.util; spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert str(ROOT / "kernels") not in found.stdout
