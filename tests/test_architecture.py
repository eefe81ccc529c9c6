"""Holds the layer table of docs/architecture.md, and the house rules that a linter cannot know, by reading the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanotrain"

LAZY_ALLOWED = ("cli.py", "engines/__init__.py", "ops/backends.py", "runtime/")
PRINT_ALLOWED = ("cli.py", "report/")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MEGATRON_ALLOWED = tuple(f"engines/megatron_{part}.py" for part in ("engine", "layers", "model"))
FULL_INITS = ("stages/__init__.py", "engines/__init__.py")
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


def layer_table() -> dict[str, int]:
    """Read package -> rank from the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("## Layers", 1)[1].split("```")[1]
    lines = [re.sub(r"\(.*", "", line).split()[1:] for line in block.splitlines() if line.startswith("L")]
    return {package: rank for rank, packages in enumerate(reversed(lines)) for package in packages}


def modules(package: Path) -> dict[str, ast.Module]:
    """Return every module's syntax tree by its path relative to the package."""
    files = sorted(p for p in package.rglob("*.py") if not {"recipes", "configs"} & set(p.relative_to(package).parts))
    return {f.relative_to(package).as_posix(): ast.parse(f.read_text(encoding="utf-8")) for f in files}


def imports(tree: ast.AST, *, typing_only: bool = False) -> Iterator[tuple[str, ast.stmt]]:
    """Yield (dotted name, statement) of every import, those for type checkers only when asked for."""
    skipped = set()
    if not typing_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def package_of(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def layer_violations(trees: dict[str, ast.Module], table: dict[str, int]) -> list[str]:
    """A module imports lower layers and its own package only."""
    found = []
    for path, tree in trees.items():
        own = package_of(path)
        if own in ("__init__", "__main__"):
            continue
        if own not in table:
            found.append(f"{path}: package {own} is not in the layer table")
            continue
        for name, _ in imports(tree, typing_only=True):
            parts = name.split(".")
            if parts[0] != "nanotrain" or len(parts) == 1 or parts[1] == own:
                continue
            if parts[1] not in table or table[parts[1]] >= table[own]:
                found.append(f"{path} imports {name}")
    return found


def cycles(trees: dict[str, ast.Module]) -> list[str]:
    """Import cycles between modules, lazy imports counted."""
    dotted = {
        "nanotrain." + path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in trees
    }
    graph = {}
    for module, path in dotted.items():
        targets = set()
        for name, _ in imports(trees[path]):
            target = name if name in dotted else name.rsplit(".", 1)[0]
            if target in dotted and target != module:
                targets.add(target)
        graph[module] = targets
    found, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def lazy_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports inside functions, outside the places that may have them."""
    return [
        f"{path}:{statement.lineno} {ast.unparse(statement)}"
        for path, tree in trees.items()
        if not path.startswith(LAZY_ALLOWED)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for _, statement in imports(function)
    ]


def torch_below_ops(trees: dict[str, ast.Module], table: dict[str, int]) -> list[str]:
    """The layers below ops must not import PyTorch when they are imported."""
    low = {package for package, rank in table.items() if rank < table["ops"]}
    return [
        f"{path} imports {name}"
        for path, tree in trees.items()
        if package_of(path) in low
        for name, statement in imports(tree)
        if name.split(".")[0] in ("torch", "transformers") and statement in tree.body
    ]


def hydra_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Only config/load.py knows Hydra."""
    return [
        f"{path} imports {name}"
        for path, tree in trees.items()
        if path != "config/load.py"
        for name, _ in imports(tree)
        if name.split(".")[0] == "hydra"
    ]


def megatron_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Megatron-Core stays behind three files."""
    return [
        f"{path} imports {name}"
        for path, tree in trees.items()
        if path not in MEGATRON_ALLOWED
        for name, _ in imports(tree, typing_only=True)
        if name.split(".")[0] == "megatron"
    ]


def stage_imports(trees: dict[str, ast.Module]) -> list[str]:
    """No stage imports another stage; what several share does not define a stage."""
    found = []
    for path, tree in trees.items():
        if not path.startswith("stages/") or path == "stages/__init__.py":
            continue
        for name, _ in imports(tree):
            parts = name.split(".")
            target = f"stages/{parts[2]}.py" if parts[:2] == ["nanotrain", "stages"] and len(parts) > 2 else ""
            if target in trees and target != path and _defines_stage(trees[target], parts[2]):
                found.append(f"{path} imports {name}")
    return found


def _defines_stage(tree: ast.Module, name: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def calls(trees: dict[str, ast.Module], names: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """Calls of plain functions by name."""
    return [
        f"{path}:{node.lineno} {ast.unparse(node)[:60]}"
        for path, tree in trees.items()
        if not path.startswith(allowed or ("\0",))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def config_probes(trees: dict[str, ast.Module]) -> list[str]:
    """getattr, hasattr and .get with a default on configs: a key either exists in the schema or is a mistake."""
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr") and node.args:
                subject = ast.unparse(node.args[0])
            elif isinstance(function, ast.Attribute) and function.attr == "get" and len(node.args) == 2:
                subject = ast.unparse(function.value)
            else:
                continue
            if re.search(r"(^|[._])(config|cfg|stage|training)$", subject):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)[:60]}")
    return found


def broad_excepts(trees: dict[str, ast.Module]) -> list[str]:
    """`except:`, `except Exception` and `except BaseException` that do not raise again."""
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                handled = any(isinstance(n, ast.Raise) for n in ast.walk(node)) or "handleError" in ast.unparse(node)
                if broad and not handled:
                    found.append(f"{path}:{node.lineno}")
    return found


def oversized(trees: dict[str, ast.Module], package: Path) -> list[str]:
    """Files and functions beyond the house's size."""
    found = []
    for path, tree in trees.items():
        lines = len((package / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    return found


def bad_names(trees: dict[str, ast.Module], package: Path) -> list[str]:
    """Vague file names, and __init__ files that hold code."""
    found = [path for path in trees if set(Path(path).with_suffix("").parts) & FORBIDDEN_NAMES]
    inits = [path for path in trees if path.endswith("__init__.py") and path not in FULL_INITS]
    return found + [path for path in inits if (package / path).read_text(encoding="utf-8").strip()]


TREES = modules(PACKAGE)
TABLE = layer_table()


def test_the_table_names_every_package():
    assert TABLE["config"] == 0 and TABLE["cli"] == max(TABLE.values())
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} <= set(TABLE)


def test_imports_point_down():
    assert layer_violations(TREES, TABLE) == []


def test_there_are_no_import_cycles():
    assert cycles(TREES) == []


def test_lazy_imports_live_where_they_may():
    assert lazy_imports(TREES) == []


def test_low_layers_start_without_pytorch():
    assert torch_below_ops(TREES, TABLE) == []


def test_only_the_loader_knows_hydra():
    assert hydra_imports(TREES) == []


def test_three_files_know_megatron():
    assert megatron_imports(TREES) == []
    assert set(MEGATRON_ALLOWED) <= set(TREES)


def test_no_stage_imports_another():
    assert stage_imports(TREES) == []


def test_print_is_for_the_command_line_and_the_report():
    assert calls(TREES, {"print"}, PRINT_ALLOWED) == []


def test_configs_are_not_probed():
    assert config_probes(TREES) == []


def test_no_exception_is_swallowed():
    assert broad_excepts(TREES) == []


def test_sizes():
    assert oversized(TREES, PACKAGE) == []


def test_names_and_empty_inits():
    assert bad_names(TREES, PACKAGE) == []


def test_the_project_names_no_path_of_a_machine():
    """Nothing outside the checkout is needed, and no registry's or machine's address is written down."""
    pattern = re.compile(r"/work/|/opt/nt|/root/|/home/\w+/")
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".yaml", ".jinja", ".html", ".css")]
    files += [
        p for folder in ("recipes", "configs", "launch", ".ci") for p in (ROOT / folder).rglob("*") if p.is_file()
    ]
    files += [ROOT / name for name in ("constraints.txt", "pyproject.toml", "README.md", "CONTRIBUTING.md")]
    found = [p.relative_to(ROOT).as_posix() for p in files if pattern.search(p.read_text(encoding="utf-8"))]
    assert found == []


BROKEN = {
    "ops/up.py": "from nanotrain.model.hybrid import HybridModel\n",
    "losses/side.py": "import nanotrain.data.loader\n",
    "mystery/x.py": "",
    "config/loud.py": "import torch\nimport hydra\nprint('x')\n",
    "model/a.py": "from nanotrain.model import b\n",
    "model/b.py": "def late():\n    from nanotrain.model.a import thing\n",
    "model/utils.py": "",
    "training/spread.py": "from megatron.core import parallel_state\n",
    "model/__init__.py": "x = 1\n",
    "stages/sft.py": "from nanotrain.stages.prune import prune\n",
    "stages/prune.py": "def prune(): ...\n",
    "stages/probe.py": "def f(config):\n    try:\n        getattr(config, 'x', 1)\n    except Exception:\n        pass\n",
    "stages/probe2.py": "value = run.config.get('x', 3)\n",
    "stages/long.py": "def f(a, b, c, d, e, f, g, h, i):\n" + "    x = 1\n" * 70,
}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for path, text in BROKEN.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_the_checks_find_what_is_broken(broken):
    trees = modules(broken)
    assert layer_violations(trees, TABLE) == [
        "losses/side.py imports nanotrain.data.loader",
        "mystery/x.py: package mystery is not in the layer table",
        "ops/up.py imports nanotrain.model.hybrid.HybridModel",
    ]
    assert cycles(trees) == ["nanotrain.model.a -> nanotrain.model.b -> nanotrain.model.a"]
    assert [line.split(":")[0] for line in lazy_imports(trees)] == ["model/b.py"]
    assert torch_below_ops(trees, TABLE) == ["config/loud.py imports torch"]
    assert hydra_imports(trees) == ["config/loud.py imports hydra"]
    assert megatron_imports(trees) == ["training/spread.py imports megatron.core.parallel_state"]
    assert stage_imports(trees) == ["stages/sft.py imports nanotrain.stages.prune.prune"]
    assert calls(trees, {"print"}, PRINT_ALLOWED) == ["config/loud.py:3 print('x')"]
    assert [line.split(":")[0] for line in config_probes(trees)] == ["stages/probe.py", "stages/probe2.py"]
    assert broad_excepts(trees) == ["stages/probe.py:4"]
    assert [line.split(":")[0] for line in oversized(trees, broken)] == ["stages/long.py"]
    assert bad_names(trees, broken) == ["model/utils.py", "model/__init__.py"]
