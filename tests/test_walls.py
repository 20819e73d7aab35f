"""Each source folder imports only what its room has (docs/architecture.md has the picture and the reasons)."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"swarm": "swarm", "client": "swarm.client", "server": "swarm.server", "kernels": "swarm.kernels"}

ROOMS = {
    "kernels": {"torch", "triton", "swarm.kernels"},
    "swarm": {"torch", "numpy", "hivemind", "msgspec", "cryptography", "uvloop", "base58", "shtab", "swarm"},
    "swarm/adapters": {"torch", "numpy", "safetensors", "huggingface_hub", "msgspec", "swarm"},
    "swarm/api": {"torch", "transformers", "jinja2", "msgspec", "cryptography", "starlette", "uvicorn", "swarm"},
    "swarm/checkpoint": {
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "gguf",
        "tokenizers",
        "numpy",
        "tqdm",
        "swarm",
    },
    "swarm/health": {"starlette", "uvicorn", "jinja2", "prometheus_client", "msgspec", "rich", "uvloop", "swarm"},
    "swarm/web": {"uvicorn", "h11", "swarm"},
    "swarm/top": {"prometheus_client", "rich", "uvloop", "swarm"},
    "server": {
        "torch",
        "transformers",
        "bitsandbytes",
        "uvloop",
        "msgspec",
        "numpy",
        "prometheus_client",
        "tqdm",
        "rich",
        "swarm",
    },
    "client": {
        "torch",
        "transformers",
        "peft",
        "uvloop",
        "msgspec",
        "numpy",
        "tqdm",
        "rich",
        "datasets",
        "trl",
        "matplotlib",
        "swarm",
    },
}
"""Third-party packages, and ours, that a folder may use; a deeper folder's own entry counts."""
WALLS = {
    "kernels": set[str](),
    "swarm": {"swarm.api", "swarm.client", "swarm.server", "swarm.kernels"},
    "swarm/api": {"swarm.server", "swarm.kernels"},
    "server": {"swarm.api", "swarm.client"},
    "client": {"swarm.api", "swarm.server", "swarm.kernels"},
}
"""Packages of ours that a folder must not enter; a deeper folder's own entry counts here, too."""
DOORS = {
    "swarm/__init__.py": {"swarm.client"},  # the lazy public name, loaded when somebody asks for it
    "swarm/health/canary.py": {"swarm.client"},  # what a client would find, it finds out as a client
}
NOWHERE = {"pickle", "hivemind.DHT", "hivemind.dht.dht", "hivemind.moe", "hivemind.utils.mpfuture"}
"""Pickles run code; hivemind's multi-process layers can wedge a peer for good."""


def sources() -> list[str]:
    """Every source file, as a path from the root."""
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, package: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere, in functions too: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    """Whether `name` is one of the packages, or lies inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def package_of(source: str) -> str:
    """swarm.server.blocks for server/blocks/span.py"""
    folder, *rest = Path(source).parent.parts
    return ".".join([FOLDERS[folder], *rest])


def nearest(table: dict[str, set[str]], source: str) -> set[str]:
    """The entry of the nearest folder."""
    return next(table[str(folder)] for folder in Path(source).parents if str(folder) in table)


@pytest.mark.parametrize("source", sources())
def test_a_file_imports_what_its_room_has(source: str) -> None:
    """Neither a package that belongs elsewhere nor another folder behind a wall."""
    walls = nearest(WALLS, source) - DOORS.get(source, set())
    for name in imports(ROOT / source, package_of(source)):
        if name.split(".")[0] not in sys.stdlib_module_names:
            assert within(name, nearest(ROOMS, source)), f"{source} imports {name}, which its room doesn't have"
        assert not within(name, walls), f"{source} imports {name} through a wall"
        assert not within(name, NOWHERE), f"{source} imports {name}, which is used nowhere"


@pytest.mark.parametrize("source", sources())
def test_a_file_says_what_it_is(source: str) -> None:
    """A newcomer knows any file's job from its first lines."""
    assert ast.get_docstring(ast.parse((ROOT / source).read_text(encoding="utf-8"))), f"{source} has no docstring"


def test_what_rooms_have_is_what_the_project_depends_on() -> None:
    """A package that only comes along with another one may stay away with its next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["demo"], *extras["train"]]
    declared = {re.split(r"[^\w.\-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}
    used = set.union(*ROOMS.values()) - {"swarm", "swarm.kernels"}
    distributions = packages_distributions()
    for name in sorted(used):
        owners = {owner.lower().replace("_", "-") for owner in distributions[name]}
        assert owners & declared, f"{name} (from {owners}) is not in pyproject.toml"


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """In functions, under conditions, relative ones, several to a line: else the walls have holes."""
    path = tmp_path / "module.py"
    path.write_text("if a:\n    import x.y, z\ndef f():\n    from ..b import c as d\n    from . import e\n")
    found = set(imports(path, "swarm.server.blocks"))
    assert found == {"x.y", "z", "swarm.server.b", "swarm.server.b.c", "swarm.server.blocks", "swarm.server.blocks.e"}
