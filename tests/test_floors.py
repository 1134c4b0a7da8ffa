"""A module imports from lower floors, and in its own room from earlier notebooks only (see the plan in CONTRIBUTING.md).

All imports count, those inside functions too.
"""
import ast, re, sys, tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = dict(core=0, geo=1, data=2, world=3, viz=3, datasets=4, models=4, train=5, analysis=5, widgets=5, urban=6, agri=6, cli=7)
# Rooms on one floor see each other one way only, and only where this table says so: room -> the neighbours it may import.
ONE_WAY = {"analysis": {"train"}, "widgets": {"analysis", "train"}}
# Modules that a tool imports, never the package itself: they may use that tool.
FOR_TOOLS = {"geovision/core/showdoc.py": {"nbdev", "fastcore"}}
# Names of imports that differ from the names of the packages that bring them.
COMES_FROM = {"PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml", "segmentation_models_pytorch": "segmentation-models-pytorch"}
MODULES = sorted(p for p in (ROOT / "geovision").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


@cache
def tree(path): return ast.parse(path.read_text())


@cache
def number(path):
    "The number of the notebook that a module comes from; None for a notebook without one (a dataset)."
    source = re.search(r"File to edit: (\S+)\.", path.read_text())
    found = re.match(r"(\d+)_", Path(source[1]).name) if source else None
    return int(found[1]) if found else None


def imports(path, nodes=None):
    "(line, module) for every import, relative ones made absolute; `from a.b import c` counts as a.b.c where that is a module."
    package = ("geovision", *path.relative_to(ROOT / "geovision").parts[:-1])
    for node in nodes or ast.walk(tree(path)):
        if isinstance(node, ast.Import): yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT / f"{base.replace('.', '/')}/{alias.name}"
                yield node.lineno, f"{base}.{alias.name}" if inner.with_suffix(".py").exists() or inner.is_dir() else base


def fault(path, module):
    "What is wrong with `path` importing `module`, or None."
    if module == "geovision": return None if room_of(path) == "cli" else "imports the front door, which opens every room"
    me, other = room_of(path), module.split(".")[1]
    if other not in FLOOR: return f"{other} is no room"
    if me == other: return same_room(path, module)
    if FLOOR[other] < FLOOR[me] or other in ONE_WAY.get(me, ()): return None
    return f"{me} (floor {FLOOR[me]}) may not import {other} (floor {FLOOR[other]})"


def same_room(path, module):
    there = ROOT / f"{module.replace('.', '/')}.py"
    if not there.exists(): return f"{module} is not a module"
    mine, theirs = number(path), number(there)
    earlier = theirs is not None and (mine is None or theirs < mine)
    return None if earlier else f"{path.stem} ({mine}) may import earlier notebooks of its room only, not {there.stem} ({theirs})"


def room_of(path): return path.relative_to(ROOT / "geovision").parts[0].removesuffix(".py")


def test_there_are_modules():
    assert len(MODULES) > 5


def test_imports_go_down():
    faults = [f"{path.relative_to(ROOT)}:{line}: {why}" for path in MODULES for line, module in imports(path)
              if module.split(".")[0] == "geovision" and (why := fault(path, module))]
    assert not faults, "\n".join(faults)


def test_rooms_are_known():
    assert {room_of(p) for p in MODULES} <= FLOOR.keys()


def test_one_way_edges_are_one_way():
    for room, others in ONE_WAY.items():
        assert all(FLOOR[room] == FLOOR[o] and room not in ONE_WAY.get(o, ()) for o in others)


def test_no_star_imports():
    stars = [f"{p.relative_to(ROOT)}:{n.lineno}" for p in MODULES for n in ast.walk(tree(p))
             if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]
    assert not stars


def test_what_is_imported_at_the_top_is_a_dependency():
    "Optional packages are imported where they are used; the tools of development are not imported at all."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {re.split(r"[<>=\[ ]", d)[0].lower() for d in project["dependencies"]}
    faults = [f"{path.relative_to(ROOT)}:{line}: {top}" for path in MODULES for line, module in imports(path, tree(path).body)
              if (top := module.split(".")[0]) not in sys.stdlib_module_names and top != "geovision"
              and COMES_FROM.get(top, top) not in promised and top not in FOR_TOOLS.get(str(path.relative_to(ROOT)), ())]
    assert not faults, "\n".join(faults)


def test_the_package_needs_no_nbdev():
    faults = [f"{path.relative_to(ROOT)}:{line}: {module}" for path in MODULES if str(path.relative_to(ROOT)) not in FOR_TOOLS
              for line, module in imports(path) if module.split(".")[0] in ("nbdev", "fastcore", "execnb", "geovision.core.showdoc")]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("module, wrong", [
    ("geovision.core.errors", False), ("geovision.cli.main", True), ("geovision.world.noise", True), ("geovision.geo.window", False)])
def test_the_rule_itself(module, wrong):
    "`viz` stands beside `world`, above `geo` and `core`, below `cli`."
    assert bool(fault(ROOT / "geovision/viz/nowhere.py", module)) == wrong
