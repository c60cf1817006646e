"""Three folders, one import name: what is installed, linked and imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"privfed": "privfed", "privacy": "privfed.privacy", "crypto": "privfed.crypto"}


def test_the_listed_packages_are_the_folders_with_an_init() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            if not (folder == "privfed" and inside[:1] in [("privacy",), ("crypto",)]):  # the links
                found.add(".".join((package, *inside)))
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_the_links_are_relative_and_lead_to_the_layers() -> None:
    for layer in ("privacy", "crypto"):
        link = ROOT / "privfed" / layer
        assert link.is_symlink()
        assert link.readlink() == Path("..") / layer
        assert (link / "__init__.py").samefile(ROOT / layer / "__init__.py")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    return done.stdout.strip()


def test_no_module_imports_a_layer_by_its_bare_name() -> None:
    everything = """
import importlib, pkgutil, sys
import privfed
for module in pkgutil.walk_packages(privfed.__path__, "privfed."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("nvflare", "flwr", "anyio", "sse_starlette", "starlette"):  # extras
            raise
print(sorted({"crypto", "privacy"} & set(sys.modules)), sum(name.startswith("privfed.") for name in sys.modules) > 40)
"""
    assert run(everything) == "[] True"


def test_importing_privfed_and_its_command_line_is_light() -> None:
    heavy = '{"torch", "opacus", "sklearn", "dp_accounting", "matplotlib"}'
    assert run(f"import sys, privfed, privfed.cli; print(sorted({heavy} & set(sys.modules)))") == "[]"
