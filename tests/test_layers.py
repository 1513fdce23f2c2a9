"""Imports go downward only through LAYERS.

Only a command may import inside a function, so that its --help starts without torch. Within the fourth layer
the families import neither each other nor `data` and `train`, and those two import the first two layers only
(`data` also the shapes). `dalle/__init__.py`, which re-exports lazily, is exempt.
"""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"lazy", "config", "help", "types", "__version__"},
    {"compile", "diffusion", "io", "layout", "masks", "meta_device", "precision", "sampling", "schedules"},
    {"nn", "shapes"},
    {"text", "dvae", "vqgan", "transformer", "clip", "unet", "data", "train"},
    {"hub", "pretrained", "evals", "pipelines", "planner", "viz"},
    {"runs", "commands", "benchmarks", "report", "app"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if importer in ("data", "train"):
        return LEVEL[imported] <= 1 or (importer, imported) == ("data", "shapes")
    return LEVEL[imported] < LEVEL[importer] or LEVEL[imported] == LEVEL[importer] != 3


def targets(node: ast.AST, package: str) -> list[list[str]]:
    """The dalle modules that one statement of a module in `package` imports, as parts of their names."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        names = [f"{module}.{alias.name}" for alias in node.names]
    return [parts for parts in (name.split(".") for name in names) if parts[0] == "dalle"]


def violations(root: Path) -> list[str]:
    """One line for each import under root/dalle that breaks the rules."""
    wrong = []
    for file in sorted((root / "dalle").rglob("*.py")):
        name = file.relative_to(root)
        parts = name.with_suffix("").parts
        if parts == ("dalle", "__init__"):
            continue
        if parts[1] not in LEVEL:
            wrong.append(f"{name}: {parts[1]} has no layer; give it one in LAYERS")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        hidden = {id(inner) for function in functions for inner in ast.walk(function)}
        for node in ast.walk(tree):
            for target in targets(node, ".".join(parts[:-1])):
                place = f"{name}:{getattr(node, 'lineno', 0)}: {'.'.join(target)}"
                if id(node) in hidden and parts[1] != "commands":
                    wrong.append(f"{place} is imported inside a function")
                elif len(target) < 2 or target[1] not in LEVEL:
                    wrong.append(f"{place} is no module with a layer; import from the module that defines it")
                elif not may_import(parts[1], target[1]):
                    wrong.append(f"{place} may not be imported by {parts[1]}")
    return wrong


def test_the_package_keeps_its_layers() -> None:
    assert (ROOT / "dalle" / "__init__.py").is_file()
    assert violations(ROOT) == []


def plant(root: Path, name: str, code: str) -> Path:
    file = root / "dalle" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    return root


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("layout.py", "from dalle.nn.kv_cache import Cache"),  # upward
        ("nn/blocks.py", "import dalle.transformer.model"),
        ("text/bpe.py", "from ..dvae import model"),  # family to family
        ("clip/__init__.py", "from .. import text"),
        ("dvae/model.py", "from dalle.train.trainer import fit"),  # family to service
        ("train/loop.py", "from dalle import data"),  # service to service
        ("data/pairs.py", "from ..nn import resnet"),  # a service above L1
        ("pipelines/dalle.py", "from dalle.commands.sample import run"),
        ("app/ui.py", "def run():\n    import dalle.pipelines"),  # downward, but hidden
        ("hub/registry.py", "class A:\n    async def f(self):\n        import dalle.dvae"),
        ("evals/fid.py", "from dalle import DALLE"),  # the package's front door
        ("viz/masks.py", "import dalle"),
        ("gadgets.py", "import math"),  # a module without a layer
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, name: str, code: str) -> None:
    assert len(violations(plant(tmp_path, name, code))) == 1
