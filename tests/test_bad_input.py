"""Section 7: whatever is wrong with files, folders or words is told in one sentence, with an exit code, and leaves nothing half-written.

Every case goes through the library (which error, naming what) and, where there is a verb for it, through the command (which exit code).
"""
import os, pickle, shutil, subprocess, sys, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_catalogue import NAMES, made

import geovision as gv
from geovision.cli.main import main
from geovision.core.errors import BadFile, BadValue, DataError, GeoVisionError, NoSpace, NotFound, UnknownName
from geovision.data.checking import check
from geovision.data.dataset import open_dataset
from geovision.geo.raster import forget, info, read
from geovision.geo.write import write_raster

PLACE = dict(crs="EPSG:32736", transform=(1, 0, 450000, 0, -1, 9960000))
MODEL = {"name": "unet", "encoder": "tu-mobilenetv3_small_050", "decoder_channels": [16] * 5}
GEOVISION = [sys.executable, "-c", "import sys; from geovision.cli.main import main; sys.exit(main())"]


def pixels(seed=0, bands=3, size=64, dtype="uint8"): return np.random.default_rng(seed).integers(1, 200, (bands, size, size)).astype(dtype)


def roofs(size=64, value=1):
    mask = np.zeros((1, size, size), "uint8")
    mask[0, 10:30, 10:30] = value
    return mask


def files(root, image=None, mask=None, n=3, **place):
    "Chips with masks in train and val; `image` and `mask` replace those of the first training chip."
    place = place or PLACE
    for k in range(n + 1):
        split, where = "val" if k == n else "train", dict(place)
        if "transform" in where: where["transform"] = (1, 0, 450000 + 70 * k, 0, -1, 9960000)
        write_raster(root / split / f"source/{k}.tif", pixels(k) if k or image is None else image, **where)
        write_raster(root / split / f"masks/{k}.tif", roofs() if k or mask is None else mask, **where)
    return dict(images=str(root / "{split}/source/{id}.tif"), mask=str(root / "{split}/masks/{id}.tif"))


def opened(root, **options): return gv.from_files(**files(root, **options), classes=["ground", "roof"])


def left(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if ".geovision" not in p.parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A tiny trained run that takes red, green, blue."
    home = tmp_path_factory.mktemp("run")
    config = {"name": "tiny", "data": {"from_files": {**files(home / "own"), "classes": ["ground", "roof"]}, "batch_size": 3}, "model": MODEL, "optimise": {"epochs": 1}}
    return gv.fit(config, root=home)


@pytest.fixture
def told(capfd):
    def tell(*words):
        capfd.readouterr()
        code = main([str(w) for w in words])
        return code, capfd.readouterr().err
    return tell


@pytest.fixture
def refuses(told):
    "The command ends with this code and one sentence of ours that holds these words."
    def check_it(code, *words, says=()):
        found, err = told(*words)
        ours = [line for line in err.splitlines() if line.startswith("geovision: ")]
        assert found == code and len(ours) == 1 and "Traceback" not in err, (found, err)
        for word in [says] if isinstance(says, str) else says: assert word in ours[0], ours[0]
    return check_it


@pytest.fixture
def train(tmp_path):
    "The words that train on own files; the run folder would be tmp_path/runs/own."
    def words(templates, **settings):
        config = {"name": "own", "data": {"from_files": {**templates, "classes": ["ground", "roof"]}, "batch_size": 2, **settings}, "model": MODEL, "optimise": {"epochs": 1}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
        return "run", "--config", tmp_path / "own.yaml", "--root", tmp_path / "runs"
    return words


def fails(kind, fn, *words):
    with pytest.raises(kind) as caught: fn()
    assert isinstance(caught.value, GeoVisionError)
    for word in words: assert word in str(caught.value), str(caught.value)


# ---------------------------------------------------------------- folders

def test_missing_root(tmp_path, refuses):
    fails(BadFile, lambda: gv.open("inria", tmp_path / "none"), "there is no folder", "geovision replica")
    fails(BadFile, lambda: gv.from_files(str(tmp_path / "none/{id}.tif")), "there is no folder")
    for verb in ("index", "stats", "check"): refuses(2, verb, "inria", tmp_path / "none", says="there is no folder")
    refuses(2, "demo", "--images", tmp_path / "none/{id}.tif", "--masks", tmp_path / "none/{id}.png", "--out", tmp_path / "demo", says="there is no folder")
    assert left(tmp_path) == []


def test_empty_folder(tmp_path, refuses):
    fails(NotFound, lambda: gv.open("inria", tmp_path), "holds no image of inria", "images/")
    fails(NotFound, lambda: gv.from_files(str(tmp_path / "{id}.tif")), "no file follows")
    refuses(2, "index", "inria", tmp_path, says="holds no image")
    refuses(2, "demo", "--images", tmp_path / "{id}.tif", "--masks", tmp_path / "{id}.m.tif", "--out", tmp_path / "demo", says="no file follows")
    assert list(tmp_path.iterdir()) == []


def test_read_only_root(tmp_path, refuses, monkeypatch):
    "Reading works, the index goes to the user's cache; writing is refused."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "root"
    templates = files(root)
    with read_only(root):
        assert len(gv.from_files(**templates, classes=["ground", "roof"])) == 4
        assert list((tmp_path / "cache").rglob("*.parquet")) and not (root / ".geovision").exists()
        refuses(2, "replica", "inria", root / "replica", "--size", "64", says="cannot be written")
        refuses(2, "predict", tmp_path / "norun", root / "train/source/0.tif", "--out", root / "maps", says="there is no run")


class read_only:
    "A folder that cannot be written: a read-only mount for root, whom permissions do not stop, else permissions."
    def __init__(self, folder): self.folder, self.root = str(folder), os.geteuid() == 0

    def __enter__(self):
        if not self.root: return os.chmod(self.folder, 0o555)
        for words in (["--bind", self.folder, self.folder], ["-o", "remount,ro,bind", self.folder]):
            if not shutil.which("mount") or subprocess.run(["mount", *words], capture_output=True).returncode: pytest.skip("cannot mount a folder read-only here")

    def __exit__(self, *_):
        forget()
        subprocess.run(["umount", "-l", self.folder], check=True) if self.root else os.chmod(self.folder, 0o755)


# ---------------------------------------------------------------- files

def test_truncated_tiff(tmp_path, run, refuses, told, train):
    ds = opened(tmp_path / "own")
    victim = tmp_path / "own/train/source/0.tif"
    victim.write_bytes(victim.read_bytes()[:6000])
    fails(BadFile, lambda: read(victim), "0.tif", "cut short")
    fails(BadFile, lambda: ds.where(id="0")[0], "0.tif")
    findings = check(ds)
    assert findings[["level", "what", "id"]].values.tolist() == [["wrong", "unreadable", "0"]]
    fails(BadFile, lambda: gv.predict(run, victim, tmp_path / "maps/0.tif"), "0.tif")
    refuses(2, "predict", run.path, victim, "--out", tmp_path / "maps", says=("0.tif", "cut short"))
    assert not list((tmp_path / "maps").glob("*")) if (tmp_path / "maps").exists() else True


def test_not_an_image(tmp_path, run, refuses):
    text = tmp_path / "scene.tif"
    text.write_text("this is a letter, not a picture")
    fails(BadFile, lambda: read(text), "is not an image")
    fails(BadFile, lambda: gv.predict(run, text, tmp_path / "map.tif"), "is not an image")
    fails(GeoVisionError, lambda: gv.from_files(str(tmp_path / "{id}.tif")), "is not an image")
    refuses(2, "predict", run.path, text, "--out", tmp_path / "maps", says="is not an image")
    assert left(tmp_path) == ["scene.tif"]


def test_vrt_that_points_elsewhere(tmp_path, run, refuses):
    secret = tmp_path / "elsewhere/secret.tif"
    write_raster(secret, pixels(), **PLACE)
    (tmp_path / "here").mkdir()
    for k, source in enumerate((secret, "/vsicurl/http://127.0.0.1:9/x.tif", "../elsewhere/secret.tif")):
        vrt = tmp_path / f"here/{k}.vrt"
        band = f'<SimpleSource><SourceFilename relativeToVRT="{int(k == 2)}">{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
        vrt.write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1">{band}</VRTRasterBand></VRTDataset>')
        fails(BadFile, lambda: read(vrt), "points at")
        refuses(2, "predict", run.path, vrt, "--out", tmp_path / "maps", says="points at")
    assert not (tmp_path / "maps").exists()


def test_pickled_npy(tmp_path, run, refuses):
    "Nothing in it is executed."
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "pwned"),)
    np.save(tmp_path / "x.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Evil()))
    fails(BadFile, lambda: read(tmp_path / "x.npy"), "pickled")
    fails(BadFile, lambda: read(tmp_path / "y.npy"), "is not an image")
    refuses(2, "predict", run.path, tmp_path / "x.npy", "--out", tmp_path / "maps", says="pickled")
    assert left(tmp_path) == ["x.npy", "y.npy"]


# ---------------------------------------------------------------- what is in them

def test_mask_of_another_size(tmp_path, refuses, told, train):
    templates = files(tmp_path / "own", mask=roofs()[:, :, :60])
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    fails(DataError, lambda: ds.where(id="0")[0], "64 x 60", "64 x 64")
    assert check(ds)["what"].tolist() == ["mask of another size"]
    refuses(2, *train(templates), says="64 x 60")
    assert not (tmp_path / "runs").exists()


def test_labels_out_of_range(tmp_path, refuses, train):
    templates = files(tmp_path / "own", mask=roofs(value=7))
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    fails(DataError, lambda: ds.where(id="0")[0], "label 7", "from 0 to 1")
    assert check(ds)["what"].tolist() == ["labels out of range"]
    refuses(2, *train(templates), says="label 7")
    assert not (tmp_path / "runs").exists()


def test_masks_of_0_and_255_ask_what_255_means(tmp_path):
    for k in range(4): files(tmp_path / "own")
    templates = dict(images=str(tmp_path / "own/{split}/source/{id}.tif"), mask=str(tmp_path / "own/{split}/masks/{id}.tif"))
    for path in (tmp_path / "own").rglob("masks/*.tif"): write_raster(path, roofs(value=255), **PLACE)
    fails(DataError, lambda: gv.from_files(**templates), "0 and 255", "values=")


def test_no_crs(tmp_path, run, refuses, told, train):
    "Pixels are enough to learn from and to map; places are not known, and whoever needs them is told."
    templates = files(tmp_path / "own", crs=None)
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    assert ds[0]["image"].shape == (3, 64, 64) and ds.index.geometry.isna().all()
    assert check(ds)[["level", "what"]].values.tolist() == [["note", "no CRS"]]
    fails(NotFound, lambda: ds.splits(how="block"), "no footprint", "no CRS")
    fails(GeoVisionError, lambda: ds.grid(30), "CRS")
    refuses(2, *train(templates, splits={"how": "block"}), says="no footprint")
    assert not (tmp_path / "runs").exists()
    assert told("predict", run.path, tmp_path / "own/val/source/3.tif", "--out", tmp_path / "maps", "--vectors")[0] == 0
    assert info(tmp_path / "maps/3.tif").crs is None


def test_mixed_crs(tmp_path, run):
    "Samples may differ (a world-wide dataset does); the files of one scene may not."
    write_raster(tmp_path / "a.tif", pixels(0, 2), **PLACE)
    write_raster(tmp_path / "b.tif", pixels(1, 1), **{**PLACE, "crs": "EPSG:32735"})
    fails(DataError, lambda: gv.predict(run, {"image": [tmp_path / "a.tif", tmp_path / "b.tif"]}, tmp_path / "map.tif"), "lies on another grid")
    assert left(tmp_path) == ["a.tif", "b.tif"]
    files(tmp_path / "own")
    write_raster(tmp_path / "own/train/source/0.tif", pixels(), **{**PLACE, "crs": "EPSG:32735"})
    ds = gv.from_files(str(tmp_path / "own/{split}/source/{id}.tif"))
    west = ds.where(id="0").index.geometry.iloc[0].centroid.x
    assert abs(west - ds.where(id="1").index.geometry.iloc[0].centroid.x) > 5          # six degrees apart, both placed rightly


def test_wrong_band_count(tmp_path, run, refuses, train):
    templates = files(tmp_path / "own", image=pixels(0, 2))
    fails(BadValue, lambda: gv.from_files(**templates, classes=["ground", "roof"], bands=["red", "green", "blue"]), "3 band names for 2 bands")
    two = tmp_path / "own/train/source/0.tif"
    fails(DataError, lambda: gv.predict(run, two, tmp_path / "map.tif"), "3 bands", "2")
    refuses(2, "predict", run.path, two, "--out", tmp_path / "maps", says="3 bands")
    three = opened(tmp_path / "other")
    write_raster(tmp_path / "other/train/source/1.tif", pixels(0, 4), **PLACE)
    fails(DataError, lambda: three.where(id="1")[0], "has 4 bands", "has 3")
    assert "number of bands" in check(three)["what"].tolist()
    assert not (tmp_path / "map.tif").exists() and not (tmp_path / "maps").exists()


def test_bands_that_do_not_exist(tmp_path, run, refuses, train):
    templates = files(tmp_path / "own")
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    fails(UnknownName, lambda: ds.select(bands=["grene"]), "'grene'", "mean green")
    fails(GeoVisionError, lambda: ds.select(bands=[1200.]), "1200")
    refuses(2, *train(templates, select={"bands": ["grene"]}), says="mean green")
    refuses(2, "predict", run.path, tmp_path / "own/val/source/3.tif", "--out", tmp_path / "maps", "--bands", "red,grene,blue", says="grene")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "maps").exists()


def test_nan(tmp_path, run, told, train):
    "NaN is missing: out of statistics, losses and maps; a map says nothing there."
    image = pixels(dtype="float32")
    image[:, :20] = np.nan
    for k in range(4): files(tmp_path / "own", image=image)
    for path in (tmp_path / "own").rglob("source/*.tif"): write_raster(path, image, **PLACE)
    templates = dict(images=str(tmp_path / "own/{split}/source/{id}.tif"), mask=str(tmp_path / "own/{split}/masks/{id}.tif"))
    ds = gv.from_files(**templates, classes=["ground", "roof"], name="nan")
    assert np.isfinite(ds.stats.mean).all() and ds[0]["valid"][:20].sum() == 0 and ds[0]["valid"][20:].all()
    assert set(check(ds)["what"]) == {"NaN"}
    assert told(*train(templates))[0] == 0 and np.isfinite(gv.Run(tmp_path / "runs/own").metrics.query("metric == 'loss'")["value"]).all()
    assert told("predict", run.path, tmp_path / "own/val/source/3.tif", "--out", tmp_path / "maps")[0] == 0
    answer = read(tmp_path / "maps/3.tif")[0]
    assert (answer[:20] == 255).all() and (answer[20:] < 2).all()


def test_nodata_everywhere(tmp_path, run, refuses, told, train):
    "A dead image is a finding; a map of it is empty; nothing can be learnt from nothing but such images."
    empty = np.zeros((3, 64, 64), "uint8")
    files(tmp_path / "own")
    for path in (tmp_path / "own").rglob("source/*.tif"): write_raster(path, empty, nodata=0, **PLACE)
    templates = dict(images=str(tmp_path / "own/{split}/source/{id}.tif"), mask=str(tmp_path / "own/{split}/masks/{id}.tif"))
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    assert set(check(ds)["what"]) == {"nothing but nodata"} and np.isnan(ds.stats.mean).all()
    assert told("predict", run.path, tmp_path / "own/val/source/3.tif", "--out", tmp_path / "maps", "--vectors")[0] == 0
    assert (read(tmp_path / "maps/3.tif") == 255).all()
    refuses(2, *train(templates))
    assert not (tmp_path / "runs").exists()


def test_scene_smaller_than_a_tile(tmp_path, run, told):
    for h, w in ((1, 1), (7, 45), (31, 33)):
        write_raster(tmp_path / "small.tif", pixels(size=64)[:, :h, :w], **PLACE)
        code, err = told("predict", run.path, tmp_path / "small.tif", "--out", tmp_path / "maps", "--tile", "512")
        assert code == 0, err
        assert info(tmp_path / "maps/small.tif").shape == (1, h, w)


# ---------------------------------------------------------------- the disk, the query

def small_disk(folder, bytes_):
    "A file system of a few bytes, where we may mount one."
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and shutil.which("mount") and subprocess.run(words, capture_output=True).returncode == 0


def with_limit(words, bytes_):
    "The command in a process whose files may not grow beyond some bytes."
    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
    return subprocess.run([*GEOVISION, *map(str, words)], capture_output=True, text=True, preexec_fn=limit)


def test_no_space_on_the_disk(tmp_path, run, refuses):
    rng, scene, disk = np.random.default_rng(0), tmp_path / "noise.tif", tmp_path / "disk"
    write_raster(scene, rng.integers(0, 255, (3, 700, 700)).astype("uint8"), **PLACE)
    if not small_disk(disk, "64k"): pytest.skip("cannot mount a small file system here")
    try:
        fails(NoSpace, lambda: gv.predict(run, scene, disk / "map.tif", output="logits"), "no space left")
        assert left(disk) == []
        refuses(1, "predict", run.path, scene, "--out", disk / "maps", "--output", "logits", says="no space left")
        refuses(1, "replica", "inria", disk / "inria", "--size", "200", says="no space left")
        assert [p for p in left(disk) if (disk / p).is_file()] == []
    finally:
        forget()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_no_space_by_a_limit(tmp_path):
    done = with_limit(("replica", "inria", tmp_path / "inria", "--size", "256"), 100_000)
    assert done.returncode == 1 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert left(tmp_path) == []


@pytest.mark.parametrize("query", [
    "__import__('os').system('touch pwned')", "id == open('pwned', 'w')", "split == 'train'; import os", "(lambda: 0)()", "@pd.eval('1')", "id.__class__ == 'x'"])
def test_a_query_that_tries_to_run_code(query, tmp_path, refuses, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    templates = files(tmp_path / "own")
    ds = gv.from_files(**templates, classes=["ground", "roof"])
    fails(GeoVisionError, lambda: ds.where(query))
    assert not (tmp_path / "pwned").exists() and len(ds.where("split == 'train'")) == 3


def test_a_query_on_the_command_line(tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (1, 6):
        for kind, image in (("images", pixels(n)), ("gt", roofs(value=255))): write_raster(tmp_path / f"data/train/{kind}/austin{n}.tif", image, **PLACE)
    assert main(["index", "inria", "data", "--where", "split == 'train' and n == '6'"]) == 0
    for verb in ("index", "stats"): refuses(2, verb, "inria", "data", "--where", "__import__('os').system('touch pwned')", says="cannot read the condition")
    assert not (tmp_path / "pwned").exists()


def test_a_config_runs_nothing(tmp_path, refuses):
    "YAML that would make objects, names that would be imported."
    (tmp_path / "evil.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'pwned'}']\n")
    refuses(2, "run", "--config", tmp_path / "evil.yaml", says="is not YAML")
    (tmp_path / "evil.yaml").write_text("name: x\nloss: os.system\ndata: {dataset: inria, root: nowhere}\n")
    refuses(2, "run", "--config", tmp_path / "evil.yaml", "--root", tmp_path / "runs")
    assert left(tmp_path) == ["evil.yaml"]


# ---------------------------------------------------------------- a folder that is nearly right

SOME = ["inria", "ramp", "spacenet2", "landcover_ai", "bigearthnet", "pastis_r", "massachusetts_roads", "crowdai", "ftw", "deepglobe_roads", "hyspecnet11k", "so2sat_pop"]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory): return tmp_path_factory.mktemp("replicas")


@pytest.fixture
def copied(replicas, tmp_path):
    "A miniature of one's own to break."
    def copy(name, to="data"):
        shutil.copytree(made(replicas, name)[0], tmp_path / to, ignore=shutil.ignore_patterns(".geovision"))
        return tmp_path / to
    return copy


def warned(fn):
    "What it gives, and the words of its warnings."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = fn()
    return out, [str(w.message) for w in seen]


def kinds(ds, level=None): return {r.what for r in check(ds).itertuples() if level in (None, r.level)}


@pytest.mark.parametrize("name", SOME)
def test_one_level_too_high_or_too_low(name, copied, tmp_path):
    "The folder is found, one warning says which."
    root = copied(name, "outer/data")
    ds, _ = warned(lambda: gv.open(name, root))
    above, said = warned(lambda: gv.open(name, tmp_path / "outer"))
    assert len(above) == len(ds)
    if above.root != tmp_path / "outer": assert above.root == root and sum("was found in" in w for w in said) == 1     # some layouts allow a folder more
    inner = next(p.split("/")[0] for p in ds.table.column(f"{ds.main}.path").to_pylist() if "/" in p)
    below, said = warned(lambda: gv.open(name, root / inner))
    assert len(below) == len(ds)
    if below.root != root / inner: assert below.root == root and sum("was found in" in w for w in said) == 1


@pytest.mark.parametrize("name", ["inria", "landcover_ai", "bigearthnet"])
def test_two_copies_are_ambiguous(name, copied, tmp_path):
    copied(name, "outer/one"), copied(name, "outer/two")
    fails(NotFound, lambda: gv.open(name, tmp_path / "outer"), "more than once", "outer/one", "outer/two", "ame one")


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_another_dataset_is_named(name, replicas):
    root = made(replicas, name)[0]
    for other in ("inria", "pastis_r", "landcover_ai"):
        if other != name: fails(NotFound, lambda: gv.open(other, root), f"it looks like {name}", f"pen it as {name}")


@pytest.mark.parametrize("name", ["inria", "bigearthnet", "crowdai"])
def test_the_command_names_it_too(name, replicas, refuses):
    refuses(2, "check", "ramp", made(replicas, name)[0], says=f"it looks like {name}")


@pytest.mark.parametrize("name", SOME)
def test_a_file_instead_of_a_folder_and_an_empty_one(name, tmp_path, refuses):
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    fails(BadFile, lambda: gv.open(name, tmp_path / "x.zip"), "x.zip is a file", "by its folder")
    fails(NotFound, lambda: gv.open(name, tmp_path / "empty"), "holds no", "the folder is empty", "geovision fetch")
    assert left(tmp_path) == ["empty", "x.zip"]


@pytest.mark.parametrize("name", ["inria", "bigearthnet", "pastis_r", "spacenet2"])
def test_a_folder_nobody_may_enter(name, copied, monkeypatch):
    "The superuser may enter everything, so the refusal is played: the root is an error, a folder within is left out and said."
    root, real = copied(name), os.scandir
    (root / "locked").mkdir()
    def closed(folder):
        def scandir(path="."):
            if str(path).rstrip("/") == str(folder): raise PermissionError(13, "Permission denied", str(path))
            return real(path)
        monkeypatch.setattr(os, "scandir", scandir)
    closed(root)
    fails(BadFile, lambda: gv.open(name, root), "cannot be read", "Permission denied")
    closed(root / "locked")
    ds, said = warned(lambda: gv.open(name, root))
    assert len(ds) and any("folder cannot be read" in w for w in said) and "folder cannot be read" in kinds(ds, "wrong")


# ---------------------------------------------------------------- what is missing, what is odd

def half_zip(root, pattern, remove):
    "Pack the files of a pattern into an archive beside them, and remove the first so many (-1 for all)."
    paths = sorted(p for p in root.glob(pattern) if p.is_file())
    with zipfile.ZipFile(root / "part.zip", "w") as z:
        for p in paths: z.write(p, p.relative_to(root))
    for p in paths[:remove if remove >= 0 else None]: p.unlink()


PACKED = [("inria", "**/gt/*.tif"), ("ramp", "*/source/*.tif"), ("landcover_ai", "output/*_m.png"), ("bigearthnet", "BigEarthNet-S1/**/*.tif"), ("pastis_r", "ANNOTATIONS/*.npy")]


@pytest.mark.parametrize("name,pattern", PACKED)
def test_a_half_unpacked_archive(name, pattern, copied):
    root = copied(name)
    half_zip(root, pattern, 2)
    ds, said = warned(lambda: gv.open(name, root))
    assert any("half unpacked" in w and "gv.data.check" in w for w in said), said
    found = check(ds).query("what == 'half unpacked'")
    assert found.file.tolist() == ["part.zip"] and found.level.tolist() == ["wrong"] and "2 of its" in found.detail.iloc[0]


@pytest.mark.parametrize("name", ["inria", "ramp", "bigearthnet", "crowdai"])
def test_an_archive_that_was_never_unpacked(name, copied):
    root = copied(name)
    half_zip(root, "**/*", -1)
    fails(GeoVisionError, lambda: gv.open(name, root), "part.zip in it: still packed", f"geovision fetch {name}")
    (root / "part.zip").write_bytes((root / "part.zip").read_bytes()[:100])
    fails(GeoVisionError, lambda: gv.open(name, root), "archive cannot be opened")


MISSING = [
    ("inria", "**/gt", "a mask", "mask"),
    ("landcover_ai", "*.txt", "a split", None),
    ("bigearthnet", "BigEarthNet-S1", "a sar", "sar"),
    ("pastis_r", "ANNOTATIONS", "a mask", "mask"),
    ("ramp", "*/labels", "polygons", "mask"),
    ("kenya", "**/binarymasks", "a mask", "mask"),
    ("crowdai", "**/*.json", "polygons", "polygons"),
    ("spacenet2", "**/geojson", "polygons", "mask"),
    ("cv4a_kenya", "**/*label.tif", "a mask", "mask"),
    ("ai4boundaries", "**/masks", "an extent", "mask"),
    ("hyspecnet11k", "splits", "a split", None),
    ("ftw", "**/chips_*", "a split", None),
]


@pytest.mark.parametrize("name,gone,words,key", MISSING)
def test_labels_modalities_and_split_files_may_be_missing(name, gone, words, key, copied):
    "It opens, keys are absent, splits null, and one warning says so."
    root = copied(name)
    before, _ = warned(lambda: gv.open(name, root))
    keys = {k for i in range(len(before)) for k in before[i]}
    for p in list(root.glob(gone)): shutil.rmtree(p) if p.is_dir() else p.unlink()
    ds, said = warned(lambda: gv.open(name, root))
    told = [w for w in said if "no sample of" in w]
    assert len(ds) == len(before) and len(told) == 1 and words in told[0], said
    if key: assert key in keys and not any(key in ds[i] for i in range(len(ds)))
    else: assert "split" not in ds.rows or ds.rows["split"].isna().all()
    assert ("no split" if key is None else f"no {words.split()[-1]}") in kinds(ds)


@pytest.mark.parametrize("name", ["inria", "ramp", "spacenet2", "landcover_ai", "massachusetts_roads", "deepglobe_roads"])
def test_corrupt_rasters_and_names_that_are_not_utf8(name, copied):
    root = copied(name)
    before, _ = warned(lambda: gv.open(name, root))
    names = [p for p in before.table.column("image.path").to_pylist()]
    victim, odd = root / names[0], os.path.join(os.fsencode((root / names[0]).parent), b"caf\xe9" + os.fsencode(Path(names[0]).suffix))
    shutil.copy(victim, odd)
    victim.write_bytes(victim.read_bytes()[:60])
    ds, said = warned(lambda: gv.open(name, root))
    assert len(said) == 1 and f"{len(ds) - 1} of {len(ds)} samples" in said[0] and "1 cannot be read" in said[0] and "name is not UTF-8" in said[0], said
    assert len(ds) == len(before)                      # nothing is dropped in silence
    found = check(ds)
    assert {"unreadable", "name is not UTF-8"} <= set(found["what"][found["level"] == "wrong"])
    assert names[0] in set(found.query("what == 'unreadable'").file) and any("caf\\xe9" in f for f in found.file)
    again, said = warned(lambda: gv.open(name, root))   # the second time from the index, and said again
    assert len(said) == 1 and "1 cannot be read" in said[0] and len(again) == len(ds)


@pytest.mark.parametrize("name,label", [("inria", "**/gt/*.tif"), ("ramp", "*/labels/*.geojson"), ("massachusetts_roads", "**/map/*.tif"), ("deepglobe_roads", "train/*_mask.png")])
def test_labels_without_images_and_images_without_labels(name, label, copied):
    root = copied(name)
    before, _ = warned(lambda: gv.open(name, root))
    target = before.task.target
    paths = [(i, p, m) for i, p, m in zip(before.table.frame["id"], before.table.column("image.path").to_pylist(), before.table.column(f"{target}.path").to_pylist()) if m]
    (root / paths[0][1]).unlink()                      # its label is left alone
    (root / paths[1][2]).unlink()                      # its image is
    ds, said = warned(lambda: gv.open(name, root))
    assert any(f"1 has no {target}" in w for w in said), said
    found = check(ds)
    assert found.query(f"what == '{target} without image'").file.tolist() == [paths[0][2]]
    assert found.query(f"what == 'no {target}' and level == 'wrong'").id.tolist() == [paths[1][0]]
    assert len(ds) == len(before) - 1


@pytest.mark.parametrize("name", ["inria", "landcover_ai", "massachusetts_roads"])
def test_copies_among_the_images_are_listed(name, copied):
    root = copied(name)
    ds, _ = warned(lambda: gv.open(name, root))
    path = root / ds.table.column("image.path").to_pylist()[0]
    shutil.copy(path, path.with_name(f"{path.stem} (copy){path.suffix}"))
    found = check(warned(lambda: gv.open(name, root))[0])
    stray, kept = found[found["what"] == "image that no sample uses"], warned(lambda: gv.open(name, root))[0]
    assert len(stray) == 1 and "(copy)" in stray.file.iloc[0] or len(kept) == len(ds) + 1      # a layout may take any name


def test_names_met_twice_stay_apart(tmp_path):
    "Two folders with the same file names, and a scan that calls two samples the same."
    for place in ("a", "b"): write_raster(tmp_path / place / "x.tif", pixels(), **PLACE)
    assert gv.from_files(str(tmp_path / "{place}/{id}.tif")).rows["id"].tolist() == ["a/x", "b/x"]
    twins = gv.data.Card("twins", assets={"image": gv.data.Asset(gv.data.Band("grey"))})
    twins.hook("scan", "scan", lambda root: [{"id": "x", "image.path": p} for p in ("a/x.tif", "b/x.tif")])
    ds, said = warned(lambda: open_dataset(twins, tmp_path))
    assert ds.rows["id"].tolist() == ["a/x", "b/x"] and "name met twice" in said[0] and "name met twice" in kinds(ds, "note")


@pytest.mark.parametrize("name,pattern", [("spacenet2", "**/PAN/*.tif"), ("hyspecnet11k", "**/*QL_PIXELMASK.TIF"), ("bigearthnet", "Reference_Maps/**/*.tif"),
                                          ("ftw", "**/instance/*.tif")])
def test_optional_assets_are_checked_too(name, pattern, copied):
    root = copied(name)
    victim = sorted(root.glob(pattern))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    found = check(warned(lambda: gv.open(name, root))[0])
    assert str(victim.relative_to(root)) in set(found.query("what == 'unreadable'").file)


@pytest.mark.parametrize("world_file,placed", [(True, True), (False, False)])
def test_a_world_file_and_the_crs_of_the_card(world_file, placed, tmp_path):
    "A .tfw says where the corner lies, the card says on which map; without the .tfw nobody knows the place."
    card = gv.data.Card("old_maps", assets={"image": gv.data.Asset(gv.data.Band("grey"), gsd=.5, crs="EPSG:32633")}, layout=gv.data.Layout(image="{id}.tif"))
    write_raster(tmp_path / "a.tif", pixels(bands=1))
    if world_file: (tmp_path / "a.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n4999999.75\n")
    ds = open_dataset(card, tmp_path)
    assert (ds.table.values("image.crs", 0) == "EPSG:32633") == placed and ("no CRS" in kinds(ds)) != placed
    if placed:
        assert abs(ds.index.geometry.iloc[0].centroid.x - 15) < .01 and ds[0]["crs"].to_epsg() == 32633 and ds[0]["transform"].c == 500000
    else: assert "crs" not in ds[0] and ds.index.geometry.isna().all()
