"""The files at the top of the project agree with each other, and its tasks are real commands."""
import configparser, os, re, shlex, subprocess, sys, time, tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text())
SHARED = Path(os.environ.get("GEOVISION_SHARED", ROOT.parent / "shared"))
HEAVY = set("torch torchvision numpy pandas geopandas shapely rasterio matplotlib pyarrow scipy skimage pydantic".split())
parser = configparser.ConfigParser()
parser.read(ROOT / "settings.ini")
SETTINGS = parser["DEFAULT"]
TASKS = PIXI["tasks"] | {name: task for f in PIXI["feature"].values() for name, task in f.get("tasks", {}).items()}


def run(*args, timeout=120, **env):
    "A command with this environment's programs first on the path."
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env}
    return subprocess.run(args, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)


def test_settings_agree_with_pyproject():
    assert SETTINGS["lib_name"] == PROJECT["name"]
    assert PROJECT["requires-python"] == f">={SETTINGS['min_python']}"
    assert SETTINGS["description"] == PROJECT["description"]
    assert SETTINGS["keywords"].split() == PROJECT["keywords"]
    assert SETTINGS["license"] == "apache2" and PROJECT["license"] == "Apache-2.0"
    assert SETTINGS["console_scripts"] == "\n".join(f"{k}={v}" for k, v in PROJECT["scripts"].items())
    assert not SETTINGS["requirements"], "requirements belong in pyproject.toml"


def test_one_version():
    told = re.search(r'^__version__ = "(.+)"$', (ROOT / "geovision/__init__.py").read_text(), re.M)
    assert told[1] == SETTINGS["version"]
    assert "version" in PROJECT["dynamic"]
    assert f"## {told[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_are_exact_and_have_no_addresses():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9_.-]+==[\w.+!]+( ; .+)?", line)]
    pinned = {line.split("==")[0].replace("_", "-") for line in lines}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = {re.split(r"[<>=\[ ]", d)[0].lower().replace("_", "-") for group in groups for d in group}
    assert wanted - pinned == {"geovision"}


def test_torch_and_torchvision_are_the_tested_pair():
    pins = dict(re.findall(r"^(torch|torchvision)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert pins == {"torch": "2.15.0", "torchvision": "0.29.2"}


def test_nbdev_keeps_its_companions():
    docs = PROJECT["optional-dependencies"]["docs"]
    assert {"nbdev==2.4.14", "fastcore==1.14.5", "execnb==0.1.18", "ghapi==1.1.1", "fastgit==0.1.4"} <= set(docs)
    assert not [d for d in PROJECT["dependencies"] if re.match(r"nbdev|fastcore|execnb|ghapi|fastgit", d)]


def test_the_quarto_link():
    assert (ROOT / "nbs/_quarto.yml").is_symlink() and (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_readme_is_fresh():
    done = run(sys.executable, ".ci/readme.py", "--check")
    assert not done.returncode, done.stderr


def test_import_is_light():
    code = "import sys, geovision; print(*{m.split('.')[0] for m in sys.modules})"
    done = run(sys.executable, "-c", code)
    assert not done.returncode, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_import_is_quick():
    "Under half a second, the start of Python included; the best of three, since others may be at work here."
    def seconds():
        start = time.perf_counter()
        run(sys.executable, "-c", "import geovision")
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 0.5


def test_pixi_manifest_follows_its_schema():
    schema = SHARED / "schemas/pixi.schema.json"
    if not schema.exists(): pytest.skip(f"pixi's schema is not here ({schema}); GEOVISION_SHARED can name its folder")
    done = run("check-jsonschema", "--schemafile", str(schema), "pixi.toml")
    assert not done.returncode, done.stdout + done.stderr


def test_pixi_and_make_say_the_same():
    made = re.findall(r"^(\w+): \$\(READY\).*\n\t(.+?) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.M)
    assert dict(made) == TASKS and TASKS.keys() == {"demo", "test", "lab", "docs", "bench"}


def test_pixi_environments_use_known_features():
    for environment in PIXI["environments"].values(): assert set(environment) <= PIXI["feature"].keys()
    assert {"default", "cuda"} <= PIXI["environments"].keys()
    assert {"linux-64", "osx-arm64"} <= set(PIXI["workspace"]["platforms"])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_strings_are_commands(name):
    "The very strings, asked for their help: the program starts and knows its options."
    done = run(*shlex.split(TASKS[name]), "--help")
    assert not done.returncode and "--help" in done.stdout, done.stderr


def test_a_task_string_does_its_work():
    "As `pixi run test --only ruff` would: what is added to a task goes to its command."
    done = run(*shlex.split(TASKS["test"]), "--only", "ruff", timeout=300)
    assert re.search(r"^\d+ passed, \d+ failed$", done.stdout, re.M), done.stderr


def test_make_says_what_it_would_do():
    for name in [*TASKS, "setup", "clean"]: assert not run("make", "-n", name).returncode


def test_make_explains_an_old_python(tmp_path):
    "In a bare copy, with a Python that refuses: one sentence that says what to do, and no .venv left behind."
    for name in ["Makefile", "pyproject.toml", "constraints.txt"]: (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = run("make", "-C", str(tmp_path), "setup", "PYTHON=false")
    assert done.returncode and "needs Python 3.11 or newer" in done.stdout and not (tmp_path / ".venv").exists()
