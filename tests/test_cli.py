"""The command: instant help, every verb on a tiny replica, one sentence and an exit code for whatever goes wrong."""
import re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import yaml

from geovision.cli.main import app, main

GEOVISION = [sys.executable, "-c", "import sys; from geovision.cli.main import main; sys.exit(main())"]
VERBS = [c.callback.__name__ for c in app.registered_commands]
HEAVY = ("numpy", "torch", "pandas", "rasterio", "geopandas", "shapely", "matplotlib", "pydantic")


def shell(*words, **options): return subprocess.run([*GEOVISION, *map(str, words)], capture_output=True, text=True, **options)


def left(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A replica, a config and a run of it."
    home = tmp_path_factory.mktemp("home")
    assert main(["replica", "inria", str(home / "inria"), "--size", "64"]) == 0
    config = {"name": "tiny", "data": {"dataset": "inria", "root": str(home / "inria"), "batch_size": 5}, "optimise": {"epochs": 1},
              "model": {"name": "unet", "encoder": "tu-mobilenetv3_small_050", "decoder_channels": [16] * 5}}
    (home / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "--config", str(home / "tiny.yaml"), "--root", str(home / "runs")]) == 0
    return home


@pytest.fixture
def told(capfd):
    def tell(*words):
        code = main([str(w) for w in words])
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capfd.readouterr())
        return code, out, err
    return tell


def one_sentence(err):
    "Exactly one line of ours, no frames."
    ours = [line for line in err.splitlines() if line.startswith("geovision: ")]
    return len(ours) == 1 and ours[0].endswith(".") and "Traceback" not in err


# ---------------------------------------------------------------- help

def test_help_is_instant():
    "CPU time of the fastest of three, since a busy machine slows the clock but not the work."
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert shell("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.7, spent


def test_help_imports_nothing_heavy():
    code = "import sys; from geovision.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split())
    assert not loaded & set(HEAVY), loaded & set(HEAVY)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_gives_an_example(verb, told):
    code, out, _ = told(verb, "--help")
    assert code == 0 and re.search(rf"Example:\s+geovision\s+{verb}", out)


def test_the_verbs_of_the_plan():
    assert {"demo", "datasets", "replica", "check", "index", "stats", "run", "predict", "doctor", "lab"} <= set(VERBS)


def test_version(told):
    import geovision
    assert told("--version")[1].strip() == geovision.__version__


# ---------------------------------------------------------------- verbs

def test_datasets(told):
    assert all(name in told("datasets")[1] for name in ("inria", "ramp", "spacenet2", "hyspecnet11k"))
    assert "IGARSS" in told("datasets", "inria")[1]


def test_check(told, home, tmp_path):
    assert told("check", "inria", home / "inria")[0] == 0
    shutil.copytree(home / "inria", tmp_path / "x")
    victim = next((tmp_path / "x").rglob("images/vienna6.tif"))
    victim.write_bytes(victim.read_bytes()[:-500])
    code, out, err = told("check", "inria", tmp_path / "x")
    assert code == 1 and "vienna6" in out and "Traceback" not in err


def test_index_and_stats(told, home):
    code, out, _ = told("index", "inria", home / "inria", "--by", "location", "--where", "split == 'val'")
    assert code == 0 and "vienna" in out and "sfo" not in out
    code, out, _ = told("stats", "inria", home / "inria", "--by", "split")
    assert code == 0 and out.count("red") == 3


def test_modes_of_run(told, home):
    words = "run", "--config", home / "tiny.yaml", "--root", home / "runs"
    assert told(*words, "--mode", "validate")[0] == 0
    code, _, err = told(*words, "--mode", "test")             # the test labels are withheld
    assert code in (1, 2) and one_sentence(err)
    code, out, _ = told(*words, "--mode", "predict")
    assert code == 0 and len(list((home / "runs/tiny/predictions").glob("*.tif"))) == 3
    assert told(*words)[0] == 2 and told(*words, "--resume")[0] == 0 and told(*words, "--reset-logs", "--yes", "optimise.lr=1e-3")[0] == 0


def test_plugins(told, home, tmp_path):
    (tmp_path / "mine.py").write_text("""from geovision.core.registry import register
@register("loss")
def mine(logits, target, valid, ignore): return logits.square().sum(), (target >= 0).sum()
""")
    words = "run", "--config", home / "tiny.yaml", "--root", tmp_path / "runs", "loss=mine"
    code, _, err = told(*words)
    assert code == 2 and one_sentence(err) and "mine" in err
    assert told(*words, "--plugin", tmp_path / "mine.py")[0] == 0


def test_predict(told, home, tmp_path):
    scenes = sorted((home / "inria").rglob("test/images/*.tif"))
    code, out, _ = told("predict", home / "runs/tiny", *scenes, "--out", tmp_path, "--vectors", "--output", "classes", "--blend", "centre")
    assert code == 0 and len(list(tmp_path.glob("*.tif"))) == len(list(tmp_path.glob("*.gpkg"))) == 3
    code, _, _ = told("predict", home / "runs/tiny", scenes[0], "--out", tmp_path / "p", "--output", "probabilities", "--scale", "0.5", "--offset", "3", "--nodata", "0")
    assert code == 0


def test_doctor_and_lab(told, tmp_path):
    code, out, _ = told("doctor")
    assert code in (0, 1) and "torch" in out and "hdf5" in out
    assert told("lab", tmp_path / "nowhere")[0] == 2


# ---------------------------------------------------------------- endings

@pytest.mark.parametrize("words, hint", [
    (("statz",), "stats"), (("stats",), "--help"), (("replica", "inriaa", "OUT"), "inria"), (("replica", "inria", "OUT", "--size", "big"), "size"),
    (("run", "--config", "OUT/none.yaml"), "config"), (("predict", "OUT/run", "OUT/scene.tif", "--out", "OUT/maps"), "scene.tif"),
    (("demo", "--images", "OUT/{id}.tif", "--out", "OUT/demo"), "--masks"), (("index", "inria", "OUT", "--by", "splitt"), "OUT"),
    (("run", "--config", "OUT", "--mode", "fly"), "fit")])
def test_mistakes_are_one_sentence(words, hint, told, tmp_path):
    code, _, err = told(*(w.replace("OUT", str(tmp_path)) for w in words))
    assert code == 2 and one_sentence(err) and hint.replace("OUT", str(tmp_path)) in err, err
    assert left(tmp_path) == []


def test_our_own_mistakes_are_admitted(told, home, monkeypatch):
    import geovision.data.opening as opening
    def broken(): raise ZeroDivisionError("division by zero")
    monkeypatch.setattr(opening, "catalog", broken)
    code, _, err = told("datasets")
    assert code == 1 and one_sentence(err) and "--debug" in err
    code, _, err = told("--debug", "datasets")
    assert code == 1 and "Traceback" in err
    monkeypatch.setenv("GEOVISION_DEBUG", "1")
    assert "Traceback" in told("datasets")[2]


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_leaves_nothing(sent, code, tmp_path):
    "Stopped while a replica is half drawn."
    work = subprocess.Popen([*GEOVISION, "replica", "inria", str(tmp_path / "inria"), "--size", "600"], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not left(tmp_path) and time.time() < deadline: time.sleep(0.05)
    assert left(tmp_path), "it never began"
    work.send_signal(sent)
    _, err = work.communicate(timeout=60)
    assert work.returncode == code and left(tmp_path) == [] and "Traceback" not in err
    if sent is signal.SIGINT: assert one_sentence(err) and "stopped by Ctrl-C" in err


def test_a_closed_pipe_is_no_failure_of_ours():
    done = subprocess.run(f"'{sys.executable}' -c '{GEOVISION[2]}' datasets | head -1", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_warnings_are_lines(told, home, tmp_path):
    shutil.copytree(home / "inria", tmp_path / "x")
    next((tmp_path / "x").rglob("gt/vienna6.tif")).unlink()
    code, _, err = told("index", "inria", tmp_path / "x")
    assert code == 0 and err.startswith("note: 22 of 23 samples of inria can be used: 1 has no mask") and "UserWarning" not in err
