"""The site: prepare its pages, check them, and build it where Quarto is installed (`--check`: never build).

Quarto is not on every machine, so the checks do without it: nbdev prepares the notebooks (a stub stands in for Quarto), each page goes
through pandoc, which knows broken markdown when it sees it, and every link and every key of the two YAML files is looked up.
"""
import argparse, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC = ROOT / "nbs", ROOT / "_proc"
# What Quarto 1.9 accepts where we write something; it stops on a key that it does not know.
KEYS = {
    "": "project format website metadata-files execute lang toc",
    "project": "type output-dir render resources preview execute-dir title",
    "format": "html commonmark",
    "format.html": "theme css toc toc-depth toc-expand code-copy code-fold code-overflow keep-md fig-align lightbox highlight-style",
    "website": "title site-url description repo-url repo-branch repo-subdir repo-actions favicon image twitter-card open-graph search "
               "navbar sidebar page-navigation page-footer back-to-top-navigation bread-crumbs",
    "website.navbar": "title logo background foreground search left right pinned collapse",
    "website.sidebar": "id title style background search contents collapse-level pinned align alignment border",
    "item": "text href icon section contents aria-label file menu",
}


def unknown_keys(node, where=""):
    "Keys that the list above does not have, with their place."
    allowed = KEYS.get(where, KEYS["item"] if re.search(r"(contents|left|right|menu)$", where) else None)
    if isinstance(node, list): return [bad for each in node for bad in unknown_keys(each, where)]
    if not isinstance(node, dict) or allowed is None: return []
    bad = [f"{where or 'top'}: {key}" for key in node if key not in allowed.split()]
    return bad + [b for key, value in node.items() for b in unknown_keys(value, f"{where}.{key}".strip("."))]


def hrefs(node):
    "Every page that a navigation file points to."
    if isinstance(node, list): return [h for each in node for h in hrefs(each)]
    if not isinstance(node, dict): return [node] if isinstance(node, str) and node.endswith((".ipynb", ".qmd", ".md")) else []
    own = [node[key] for key in ("href", "file") if isinstance(node.get(key), str)]
    inner = ("contents", "left", "right", "menu", "sidebar", "navbar", "website")
    return own + [h for key, value in node.items() if key in inner for h in hrefs(value)]


def navigation_faults():
    config, sidebar = (yaml.safe_load((NBS / name).read_text()) for name in ("_quarto.yml", "sidebar.yml"))
    faults = [f"_quarto.yml, sidebar.yml: Quarto has no key {key}" for key in unknown_keys(config) + unknown_keys(sidebar)]
    if not (NBS / "_quarto.yml").is_symlink(): faults.append("nbs/_quarto.yml should be a link to ../_quarto.yml")
    local = [h for h in hrefs(config) + hrefs(sidebar) if not urlsplit(h).scheme]
    faults += [f"navigation points to {h}, which is not there" for h in local if not (NBS / h).exists()]
    listed = set(hrefs(sidebar))
    return faults + [f"nbs/sidebar.yml does not list {p}" for p in map(str, pages()) if p not in listed]


def pages():
    return sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb") if not any(part[0] in "_." for part in p.relative_to(NBS).parts))


def prepare(workers):
    "The notebooks as nbdev hands them to Quarto, in _proc; a stub keeps nbdev from downloading Quarto."
    with tempfile.TemporaryDirectory() as tmp:
        stub = Path(tmp) / "quarto"
        stub.write_text("#!/bin/sh\nexit 0\n"); stub.chmod(0o755)
        path = os.pathsep.join([tmp, str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PATH": path, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
        if PROC.exists(): shutil.rmtree(PROC)
        done = subprocess.run(["nbdev_proc_nbs", "--n_workers", str(workers)], cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        told = done.stderr.split("The above exception was the direct cause")   # the worker's own words come first
        print("nbdev_proc_nbs stopped: it runs each cell that imports or is exported, and no other, and one of them failed.")
        sys.exit(told[0][-1600:])


def as_markdown(notebook):
    "A prepared notebook as the markdown that Quarto would hand on; pictures are left out."
    parts = []
    for cell in notebook["cells"]:
        source, shown = "".join(cell.get("source", "")), cell["cell_type"] != "code" or "echo: false" not in "".join(cell.get("source", ""))
        if cell["cell_type"] != "code": parts.append(source); continue
        if shown and source: parts.append(f"````{{.python}}\n{source}\n````")
        for out in cell.get("outputs", []):
            text = out.get("data", {}).get("text/markdown")
            if text: parts.append("".join(text))
    return "\n\n".join(parts)


def converted(page):
    "A prepared page as HTML, and what pandoc had to say about it."
    import pypandoc
    text = as_markdown(json.loads(page.read_text()))
    done = subprocess.run([pypandoc.get_pandoc_path(), "-f", "markdown", "-t", "html", "--mathjax"], input=text, text=True, capture_output=True)
    return done.stdout, [line for line in done.stderr.splitlines() if line.strip()]


def targets(html):
    return {unquote(t) for t in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]+)"', html)}


def link_faults(page, html, site, names):
    "Links to pages and files of our own that lead nowhere; other sites are not visited."
    faults = []
    for target in targets(html):
        path = urlsplit(target.removeprefix(site)).path.lstrip("/" if target.startswith(site) else "")
        if (urlsplit(target).scheme and not target.startswith(site)) or not path: continue
        base = Path() if target.startswith(site) else page.parent
        there = os.path.normpath(base / path)
        if there not in names and not (NBS / there).exists(): faults.append(f"a link to {target} leads nowhere")
    return faults


def page_faults():
    from nbdev.config import get_config
    from nbdev.doclinks import _nbpath2html
    config = get_config()
    site = f"{config.doc_host}{config.doc_baseurl}"
    names = {str(p.parent / Path(_nbpath2html(p)).name) for p in pages()} | {str(p) for p in pages()}
    for page in pages():
        if not (PROC / page).exists(): yield page, ["was not prepared"]; continue
        html, complaints = converted(PROC / page)
        left = ["a directive is left in the text"] if re.search(r"^<p>#\|", html, re.M) else []
        yield page, complaints + link_faults(page, html, site, names) + left


def check():
    found = [("navigation", navigation_faults()), *page_faults()]
    for page, faults in found:
        for fault in faults: print(f"  {page}: {fault}")
    bad = sum(bool(faults) for _, faults in found)
    print(f"pages: {len(found) - bad} good, {bad} bad", flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="prepare and check, build nothing")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    os.chdir(ROOT)
    prepare(options.workers)
    if check(): sys.exit(1)
    if options.check: return
    if not shutil.which("quarto"):
        return print("The pages are fine and wait in _proc. To build the site, install Quarto and say `make docs` again.")
    subprocess.run(["nbdev_docs"], cwd=ROOT, check=True)


if __name__ == "__main__": main()
