"""All tests of the project, cheap ones first: what `make test` runs.

Each step prints what it found and how long it took; the last line counts everything. `--only notebooks pytest` runs some of the steps.
"""
import argparse, concurrent.futures as cf, filecmp, multiprocessing, os, re, shutil, subprocess, sys, tempfile, time
import xml.etree.ElementTree as xml
from pathlib import Path

from one_notebook import test_notebook

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EARLY = ["tests/test_project.py", "tests/test_floors.py", "tests/test_examples.py"]  # they read files and import nothing heavy

MINIATURES = [f"tests/test_{name}.py" for name in ("catalogue", "pack", "stats", "bad_input")]  # they share the miniatures of all datasets


def say(ok, text):
    "One line for one check; returns what it adds to the count."
    if not ok: print(f"  FAILED  {text}", flush=True)
    return (1, 0) if ok else (0, 1)


def total(counts):
    return tuple(map(sum, zip(*counts))) if counts else (0, 0)


def command(*args, cwd=ROOT, **env):
    "Run a command of this environment; its output comes back as text."
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env}
    env.pop("IN_TEST", None)                      # nbdev_export silently does nothing where this is set
    return subprocess.run(args, cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def files(root, *patterns):
    found = {p.relative_to(root) for pattern in patterns for p in root.glob(pattern) if p.is_file()}
    return {p for p in found if not any(part[0] in "_." and part != "__init__.py" for part in p.parts[:-1])}


def changed(copy, *patterns):
    "The files that differ between the project and a copy of it that a tool has worked on."
    ours, theirs = files(ROOT, *patterns), files(copy, *patterns)
    return sorted((ours ^ theirs) | {p for p in ours & theirs if not filecmp.cmp(ROOT / p, copy / p, shallow=False)})


def step_export(options):
    "An export and a clean change nothing: tried on a copy, so that the tree is left alone."
    with tempfile.TemporaryDirectory(prefix="geovision-export-") as tmp:
        copy = Path(tmp)
        shutil.copytree(ROOT / "nbs", copy / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.nbt"))
        (copy / "geovision").mkdir()
        for name in ["settings.ini", "geovision/__init__.py"]: shutil.copy(ROOT / name, copy / name)
        tools = [(tool, command(tool, cwd=copy)) for tool in ["nbdev_export", "nbdev_clean"]]
        modules, notebooks = changed(copy, "geovision/**/*.py"), changed(copy, "nbs/**/*.ipynb")
    return total([say(not done.returncode, f"{tool} stopped:\n{done.stdout[-2000:]}") for tool, done in tools] + [
        say(not modules, f"nbdev_export would change: {' '.join(map(str, modules))}"),
        say(not notebooks, f"nbdev_clean would change: {' '.join(map(str, notebooks))}")])


def step_ruff(options):
    done = command("ruff", "check", "--output-format", "concise", "geovision", "nbs", "tests", ".ci")
    return say(not done.returncode, done.stdout)


def pytest(*args, threads=2):
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.xml"
        done = command(sys.executable, "-m", "pytest", "-q", "--junitxml", str(report), *args, OMP_NUM_THREADS=str(threads))
        lines = done.stdout.splitlines()
        if done.returncode or any(" skipped" in line for line in lines[-1:]): print("\n".join(lines[-400:]), flush=True)
        if not report.exists(): return say(False, f"pytest did not finish (exit code {done.returncode})")
        suite = xml.parse(report).getroot().find("testsuite")
    ran, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    if skipped: print(f"  {skipped} skipped")
    return max(ran - failed - skipped, 0), failed or int(done.returncode not in (0, 5))


def step_project(options):
    return pytest(*[f for f in EARLY if (ROOT / f).exists()])


def step_pytest(options):
    "Two processes where there are two cores: the tests that share the miniatures of all datasets, and the others."
    rest = ["tests", *[f"--ignore={f}" for f in [*EARLY, *MINIATURES]]]
    if options.workers < 2: return pytest("tests", *[f"--ignore={f}" for f in EARLY])
    with cf.ThreadPoolExecutor(2) as pool: return total(list(pool.map(lambda files: pytest(*files, threads=1), [MINIATURES, rest])))


def notebooks(names):
    "Tutorials and upper floors first: the long ones should not be left for the end."
    order = "tutorials cli urban agri train analysis widgets datasets models world data viz geo core .".split()
    found = [ROOT / p for p in files(ROOT, "nbs/**/*.ipynb") if not names or any(n in str(p) for n in names)]
    rank = lambda p: (order.index(room) if (room := p.relative_to(ROOT / "nbs").parts[0]) in order else len(order), str(p))
    return sorted(found, key=rank)


def step_notebooks(options):
    counts = []
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="agg", MKL_NUM_THREADS="1")
    with cf.ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(test_notebook, path): path.relative_to(ROOT) for path in notebooks(options.notebook)}
        for job in cf.as_completed(jobs):
            try: ok, seconds = job.result()
            except Exception as e: ok, seconds = False, print(f"  {jobs[job]}: {type(e).__name__}: {e}") or 0.
            print(f"  {'ok' if ok else 'FAILED':7} {seconds:6.1f} s  {jobs[job]}", flush=True)
            counts.append((int(ok), int(not ok)))
    return total(counts)


def step_docs(options):
    done = command(sys.executable, ".ci/docs.py", "--check")
    print(done.stdout, end="", flush=True)
    found = re.search(r"pages: (\d+) good, (\d+) bad", done.stdout)
    return tuple(map(int, found.groups())) if found else say(False, "the pages could not be prepared")


STEPS = {name.removeprefix("step_"): step for name, step in list(globals().items()) if name.startswith("step_")}
ORDER = ["export", "ruff", "project", "notebooks", "pytest", "docs"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="steps to run (default: all, in this order)")
    parser.add_argument("--notebook", nargs="+", default=[], help="notebooks whose path contains one of these words")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes for the notebooks")
    options, counts, begin = parser.parse_args(), [], time.time()
    os.chdir(ROOT)
    for name in [n for n in ORDER if n in options.only]:
        start = time.time()
        print(f"== {name}", flush=True)
        counts.append(STEPS[name](options))
        print(f"== {name}: {counts[-1][0]} good, {counts[-1][1]} bad, {time.time() - start:.1f} s", flush=True)
    passed, failed = total(counts)
    print(f"All steps took {time.time() - begin:.0f} s.\n{passed} passed, {failed} failed", flush=True)
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__": main()
