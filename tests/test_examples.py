"""Every public function is used in a cell of its own notebook that the tests run; imports have cells of their own.

A class may also be shown through an exported function that makes or takes one.
"""
import ast, configparser, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
SKIPPED = SETTINGS["DEFAULT"]["tst_flags"].split()
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "_." for part in p.relative_to(ROOT).parts))


def cells(path):
    "(directives, source) of the code cells; IPython's own lines are left out."
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            yield re.findall(r"^#\| *(.+?) *$", source, re.M), re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M)


def exported(directives): return any(d.split()[0] in ("export", "exports") for d in directives)


def runs(directives):
    return not any(d.split()[0] in SKIPPED or re.fullmatch(r"eval: *false", d) for d in directives)


def is_hook(node):
    "`@card.fix def f` and `@app.command() def f` are called by others: a test reaches them through the card or the command."
    owners = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name) and o.value.id in ("card", "app") for o in owners)



def public(source):
    "The public functions and classes that a cell defines."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in ast.parse(source).body if isinstance(n, kinds) and not n.name.startswith("_") and not is_hook(n)]


def used(nodes):
    "Names and attributes below some nodes of a syntax tree."
    inner = [n for node in nodes for n in ast.walk(node)]
    return {n.id for n in inner if isinstance(n, ast.Name)} | {n.attr for n in inner if isinstance(n, ast.Attribute)}


def unused(path):
    code = list(cells(path))
    ours = [node for directives, source in code if exported(directives) for node in public(source)]
    shown = used(ast.parse(source) for directives, source in code if not exported(directives) and runs(directives))
    through = {node.name: used(n for n in ours if n is not node) if isinstance(node, ast.ClassDef) else set() for node in ours}
    return [name for name, others in through.items() if name not in shown | others]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_every_export_has_an_example(path):
    assert not unused(path), f"{path.relative_to(ROOT)} shows no use of {', '.join(unused(path))}"


def mixed(path):
    "Cells with an import and something else: preparing the site runs each cell that imports, without the cells before it."
    for directives, source in cells(path):
        nodes = list(ast.walk(ast.parse(source)))
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        others = [n for n in nodes if isinstance(n, ast.stmt) and n not in imports]
        if imports and others and not exported(directives) and not {"eval: false", "hide"} & set(directives): yield source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_imports_have_cells_of_their_own(path):
    assert not list(mixed(path)), f"{path.relative_to(ROOT)} imports among other code:\n" + "\n----\n".join(mixed(path))


def test_no_cell_stores_an_error():
    outputs = [(p, o) for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"] for o in c.get("outputs", [])]
    assert not [str(p) for p, o in outputs if o["output_type"] == "error"]


def test_the_rule_itself(tmp_path):
    "An unused export is found; a use in a skipped cell does not count; hooks of a card are left out."
    export = "#| export\nclass Kind: ...\ndef shown()->Kind: ...\ndef unseen(): ...\n@card.fix\ndef quirk(s): ..."
    code = [export, "shown()", "#| slow\nunseen()"]
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [c]} for c in code]}))
    assert unused(path) == ["unseen"]
