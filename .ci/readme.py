"""README.md from nbs/index.ipynb: prose as it is, code in fences, text outputs below it. `--check` only compares."""
import argparse, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n"


def text(lines): return "".join(lines)


def output(out):
    "What a reader of plain markdown can see of an output: markdown as it is, text in a fence."
    data = out.get("data", {})
    if "text/markdown" in data: return text(data["text/markdown"])
    if any(kind.startswith("image/") for kind in data): return ""
    plain = text(out.get("text", data.get("text/plain", ""))).rstrip()
    return f"```\n{plain}\n```" if plain else ""


def cell_text(cell):
    source = text(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if cell["cell_type"] != "code" or re.search(r"^#\| *(hide|include: *false)\s*$", source, re.M): return ""
    shown = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")
    quiet = re.search(r"^#\| *(echo: *false|hide_input)\s*$", source, re.M)
    return "\n\n".join(filter(None, ["" if quiet or not shown else f"```python\n{shown}\n```", *map(output, cell.get("outputs", []))]))


def readme(notebook):
    "Links and pictures are relative to nbs/ in the notebook and to the top in the README."
    parts = [part for cell in json.loads(notebook.read_text())["cells"] if (part := cell_text(cell).strip())]
    moved = [re.sub(r"\]\((?!https?:|#|mailto:|\.\./)([^)]+)\)", r"](nbs/\1)", part).replace("](../", "](") for part in parts]
    return NOTE + "\n" + "\n\n".join(moved) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether README.md is fresh, write nothing")
    wanted, path = readme(ROOT / "nbs/index.ipynb"), ROOT / "README.md"
    fresh = path.exists() and path.read_text() == wanted
    if parser.parse_args().check: sys.exit(None if fresh else "README.md is stale: run python .ci/readme.py")
    if not fresh: path.write_text(wanted)
    print("README.md", "was fresh" if fresh else "written")


if __name__ == "__main__": main()
