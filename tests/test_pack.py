"""A pack gives what the folder gives: every miniature, every task, whole samples and windows; and it stands alone, refuses what is foreign, and appears whole or not at all."""
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import geopandas as gpd
import h5py
import numpy as np
import pytest
import replicas
import torch
from replicas import NAMES
from torch.utils.data import DataLoader

import geovision as gv
from geovision.core.errors import BadFile, BadValue, DataError, GeoVisionError, UnknownName
from geovision.data.opening import card as card_of
from geovision.data.chunks import CODECS
from geovision.data.pack import pack
from geovision.geo.write import write_raster

def made(name):
    "A small miniature, written once a process."
    return replicas.small(name)


def packed_of(name, task="default"):
    "A miniature and the pack of it, opened; each is packed once."
    if (name, task) not in PACKED:
        how = {} if task == "default" else {"task": task}
        ds = quietly(gv.open, name, made(name), **how)
        path = replicas.folder()/"packs"/f"{name}-{task}.h5"
        PACKED[name, task] = ds, quietly(gv.open, str(quietly(pack, ds, path)), **how)
    return PACKED[name, task]


PACKED = {}


def quietly(fn, *args, **options):
    "Warnings do not matter here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **options)


def differs(a, b):
    "What differs between two samples; an empty list if they are equal in keys, types and values."
    return [k for k in {**a, **b} if k not in a or k not in b or not _equal(a[k], b[k])]


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
    if isinstance(a, gpd.GeoDataFrame):
        return a.set_geometry(a.normalize()).equals(b.set_geometry(b.normalize())) and (a.crs, a.geometry.name) == (b.crs, b.geometry.name) and list(a.dtypes) == list(b.dtypes)
    if isinstance(a, np.ndarray): return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def got(ds, *key):
    "A sample, or the kind of error it is."
    try: return ds[key if len(key) > 1 else key[0]]
    except GeoVisionError as e: return {"error": type(e).__name__}


def alike(a, b, where):
    found = differs(a, b)
    assert not found, (*where, found, [(a.get(k), b.get(k)) for k in found][:1])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_folder(name):
    for k, task in enumerate(card_of(name).tasks or [None]):
        ds, packed = packed_of(name, task if k else "default")
        assert len(packed) == len(ds) and packed.replica and repr(packed) == repr(ds) and packed.classes == ds.classes and packed.bands == ds.bands
        for i in range(len(ds)): alike(got(ds, i), got(packed, i), (name, task, i))


@pytest.mark.parametrize("name", NAMES)
def test_rows_selections_and_statistics_are_those_of_the_folder(name):
    ds, packed = packed_of(name)
    mine, theirs = packed.index, ds.index
    assert list(mine.columns) == list(theirs.columns) and len(mine) == len(theirs)
    for c in theirs.columns.drop("geometry"): assert [str(v) for v in mine[c]] == [str(v) for v in theirs[c]], c
    assert all(a is b is None or a.equals(b) for a, b in zip(mine.geometry, theirs.geometry))
    for k in ("n", "mean", "m2", "m3", "m4", "min", "max"): np.testing.assert_array_equal(getattr(packed.stats, k), getattr(ds.stats, k))
    if "split" in ds.rows:
        for split in ds.rows["split"].dropna().unique(): assert packed.split(split).rows["id"].tolist() == ds.split(split).rows["id"].tolist()
    first = ds.rows["id"].iat[0]
    assert packed.where(id=first).rows["id"].tolist() == ds.where(id=first).rows["id"].tolist()
    made_ = [d.splits(how="random", val=.3, test=.2, seed=3).rows["split"].tolist() for d in (ds, packed)]
    assert made_[0] == made_[1]


def whole_files(ds, i):
    "Of a file that is cut short, the folder may give some bands where a pack gives none."
    return "error" not in got(ds, i) and not ("damaged" in ds.rows and ds.rows["damaged"].iat[i])


@pytest.mark.parametrize("name", NAMES)
def test_windows_and_bands_are_those_of_the_folder(name):
    ds, packed = packed_of(name)
    some = [i for i in sorted({0, len(ds)//2, len(ds) - 1}) if whole_files(ds, i)]
    bands = [b.name for b in ds.bands][::-1][:2]
    for i in some: alike(got(ds.select(bands=bands), i), got(packed.select(bands=bands), i), (name, "bands", i))
    try: tiles = ds.tiles(24, overlap=8)
    except DataError: return                       # the folder does not say how large its images are
    cut = packed.tiles(24, overlap=8)
    assert cut.rows["id"].tolist() == tiles.rows["id"].tolist()
    for i in sorted({0, 1, len(tiles)//3, len(tiles) - 1}): alike(got(tiles, i), got(cut, i), (name, "tile", i))


@pytest.mark.parametrize("name", ["inria", "spacenet7"])
def test_a_pack_is_plotted_and_looked_through_as_the_folder(name):
    import matplotlib.pyplot as plt

    from geovision.data.checking import check
    ds, packed = packed_of(name)
    pictures = [d.plot(n=2) for d in (ds, packed)]
    assert all(p is None or type(p) is type(pictures[0]) for p in pictures)
    plt.close("all")
    mine, theirs = packed.leaks(), ds.leaks()
    assert mine.drop(columns=[c for c in mine if "path" in c]).equals(theirs.drop(columns=[c for c in theirs if "path" in c]))
    wrong = [f[f["level"] == "wrong"] if len(f) else f for f in (check(packed), check(ds))]
    assert len(wrong[0]) == len(wrong[1])


def test_a_split_of_a_run_from_a_pack_is_told_to_go_to_the_folder():
    from types import SimpleNamespace

    from geovision.cli.jobs import scenes_of
    from geovision.train.config import Config
    _, packed = packed_of("inria")
    path = packed.root/packed.table.values("image.path", 0).partition("#")[0]
    run = SimpleNamespace(config=Config(data={"dataset": str(path)}))
    with pytest.raises(GeoVisionError, match="lie in a pack"): scenes_of(run, "train")


# One pack of somebody's own folder, for the rest: no card knows it, and the folder is gone.

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for i in range(12):
        h, w = (32, 48) if i < 10 else (40, 24)
        picture = rng.integers(1, 4000, (4, h, w)).astype("uint16")
        picture[0, :4] = 0
        write_raster(root/"in"/"chips"/("train" if i < 8 else "val")/f"c{i}.tif", picture, names=("blue", "green", "red", "nir"), nodata=0 if i % 2 else None)
        write_raster(root/"in"/"masks"/("train" if i < 8 else "val")/f"c{i}.tif", rng.integers(0, 3, (1, h, w)).astype("uint8"))
    ds = gv.from_files(str(root/"in/chips/{split}/{id}.tif"), mask=str(root/"in/masks/{split}/{id}.tif"), classes=["a", "b", "c"])
    pack(ds, root/"out/own.h5")
    samples, stats = [ds[i] for i in range(12)], ds.stats
    stats.hist
    tiled = [ds.tiles(16)[i] for i in range(6)]
    pack(ds.tiles(16), root/"out/tiles.h5")
    shutil.rmtree(root/"in")
    return root/"out/own.h5", samples, stats, tiled


def test_it_stands_alone(own):
    path, samples, stats, _ = own
    ds = gv.open(str(path))
    for i in range(12): alike(samples[i], ds[i], (i,))
    assert np.array_equal(ds.stats.mean, stats.mean) and np.array_equal(ds.stats.hist, stats.hist) and ds.stats.hist.sum() == stats.n.sum()
    assert not ds.replica and [b.name for b in ds.select(bands=[850, "red"]).bands] == ["nir", "red"]
    moved = shutil.copy(path, path.with_name("renamed.h5"))
    alike(samples[3], gv.open(str(moved))[3], ("renamed",))
    assert sorted(p.name for p in path.parent.iterdir()) == ["own.h5", "renamed.h5", "tiles.h5"]


def test_packed_tiles_are_samples(own):
    path, _, _, tiled = own
    ds = gv.open(str(path.with_name("tiles.h5")))
    assert len(ds) == 10*6 + 2*6 and {tuple(s["image"].shape) for s in (ds[i] for i in range(len(ds)))} == {(4, 16, 16)}
    for i in range(6): alike(tiled[i], ds[i], (i,))
    assert ds.stats.n[1] > 0 and ds.splits(how="group", by="parent", val=.3).rows.groupby("parent")["split"].nunique().max() == 1


def test_every_codec_gives_the_same(own, tmp_path):
    path, samples, _, _ = own
    sizes = {}
    for codec in CODECS:
        again = pack(gv.open(str(path)), tmp_path/f"{codec}.h5", codec)
        sizes[codec] = again.stat().st_size
        for i in (0, 11): alike(samples[i], gv.open(str(again))[i], (codec, i))
    assert sizes["zstd"] < sizes["none"] and sizes["gzip"] < sizes["none"]
    with pytest.raises(UnknownName, match="zstd"): pack(gv.open(str(path)), tmp_path/"x.h5", "zst")


@pytest.mark.parametrize("workers, how", [(0, None), (2, "fork"), (2, "spawn")])
def test_workers_read_it_together(own, workers, how):
    path, samples, _, _ = own
    ds = gv.open(str(path))
    ds[0]                                               # the parent has the file open
    order = list(range(10))*3
    loader = DataLoader(ds, batch_size=5, sampler=order, collate_fn=gv.data.collate, num_workers=workers, multiprocessing_context=how)
    seen = [b for b in loader]
    assert [i for b in seen for i in b["id"]] == [samples[i]["id"] for i in order]
    assert all(torch.equal(b["image"][k], samples[order[5*n + k]]["image"]) for n, b in enumerate(seen) for k in range(5))
    alike(samples[4], pickle.loads(pickle.dumps(ds))[4], ("pickle",))
    assert len(pickle.dumps(ds)) < 60_000


def test_two_processes_and_threads_read_it_at_once(own):
    path, samples, _, _ = own
    code = f"import geovision as gv; ds = gv.open({str(path)!r}); print(sum(float(ds[i % 12]['image'].double().sum()) for i in range(240)))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    from concurrent.futures import ThreadPoolExecutor
    ds = gv.open(str(path))
    with ThreadPoolExecutor(4) as pool: totals = list(pool.map(lambda i: float(ds[i % 12]["image"].double().sum()), range(240)))
    wanted = 20*sum(float(s["image"].double().sum()) for s in samples)
    assert sum(totals) == pytest.approx(wanted, rel=1e-12)
    assert [float(p.communicate(timeout=60)[0]) for p in running] == pytest.approx([wanted]*2, rel=1e-12)


def test_a_window_reads_only_its_chunks(tmp_path, monkeypatch):
    write_raster(tmp_path/"in/s.tif", np.arange(2000*1500, dtype="uint32").reshape(1, 2000, 1500) % 60_000, names=("red",))
    ds = gv.from_files(str(tmp_path/"in/{id}.tif"))
    wanted = ds.tiles(300)[9]
    packed, chunks = gv.open(str(pack(ds, tmp_path/"s.h5"))).tiles(300), []
    import geovision.data.chunks as module
    real = module.unshuffle
    monkeypatch.setattr(module, "unshuffle", lambda *a: chunks.append(1) or real(*a))
    alike(wanted, packed[9], ("tile",))
    assert 1 <= len(chunks) <= 4                        # of the 12 squares of 512 pixels
    packed[9]
    assert len(chunks) <= 4                             # and they are remembered


# What is foreign, damaged or dangerous is one sentence.

def changed(own, tmp_path, change):
    "A copy of the pack in which something is not as it should be."
    path = Path(shutil.copy(own[0], tmp_path/"x.h5"))
    with h5py.File(path, "r+") as f: change(f)
    return path


def fails(path, words, error=BadFile):
    with pytest.raises(error, match=words) as e:
        ds = gv.open(str(path))
        for i in range(len(ds)): ds[i]
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def newer(f): f.attrs["geovision_pack"] = 99
def nameless(f): del f.attrs["geovision_pack"]
def external(f): del f["shelves/0"]; f["shelves/0"] = h5py.ExternalLink("/etc/passwd", "/x")
def soft(f): del f["about"]; f["about"] = h5py.SoftLink("/stream")
def objects(f): del f["about"]; f.create_dataset("about", data=["x"], dtype=h5py.string_dtype())
def without(f): del f["index"]
def no_json(f): del f["about"]; f["about"] = np.frombuffer(b"{", np.uint8)
def no_table(f): del f["index"]; f["index"] = np.frombuffer(b"PAR1 no", np.uint8)
def noise(f): f["stream"][...] = 7


def elsewhere(f):
    shape = f["shelves/0"].shape
    del f["shelves/0"]
    f["shelves"].create_dataset("0", shape=shape, dtype="uint16", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


def foreign_filter(f):
    shape, chunks = f["shelves/0"].shape, f["shelves/0"].chunks
    del f["shelves/0"]
    f["shelves"].create_dataset("0", shape=shape, chunks=chunks, dtype="uint16", scaleoffset=0)


@pytest.mark.parametrize("change, words", [
    (newer, "version 99.*Update geovision"), (nameless, "but no pack"), (external, "link to somewhere else"), (soft, "link to somewhere else"), (objects, "objects"),
    (without, "'index' is missing"), (no_json, "damaged"), (no_table, "damaged"), (noise, "damaged"), (elsewhere, "another file"), (foreign_filter, "filter")])
def test_strange_packs_are_refused(own, tmp_path, change, words): fails(changed(own, tmp_path, change), words)


def test_files_that_are_no_packs(own, tmp_path):
    whole = own[0].read_bytes()
    for name, raw, words in (("cut", whole[:len(whole)*2//3], "cut short"), ("text", b"hello", "no HDF5 file"), ("empty", b"", "no HDF5 file")):
        (tmp_path/f"{name}.h5").write_bytes(raw)
        fails(tmp_path/f"{name}.h5", words)
    (tmp_path/"d.h5").mkdir()
    fails(tmp_path/"d.h5", "folder")
    fails(tmp_path/"no.h5", "there is no file")
    with pytest.raises(UnknownName): gv.open(str(own[0]), task="roads")


def test_a_damaged_chunk_is_told(own, tmp_path):
    path = Path(shutil.copy(own[0], tmp_path/"x.h5"))
    with h5py.File(path) as f: at = f["shelves/0"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as f: f.seek(at); f.write(b"\xff"*64)
    fails(path, "damaged")


def test_what_cannot_be_packed(own, tmp_path):
    ds = gv.open(str(own[0]))
    with pytest.raises(BadValue, match="does not end in .h5"): pack(ds, tmp_path/"x.hdf")
    with pytest.raises(BadValue, match="empty"): pack(ds.where(id="none"), tmp_path/"x.h5")
    with pytest.raises(BadValue, match="what is packed"): pack(ds, own[0])
    with pytest.raises(BadValue, match="cannot be packed"): pack(ds + ds, tmp_path/"x.h5")
    assert not list(tmp_path.iterdir())


# Whole or not at all.

SLOW = """
import sys, time, geovision as gv
from geovision.data import packing as module
real = module.Writer.sample
def slow(self, i, parts):
    real(self, i, parts); time.sleep(.2 if {slow} else 0); print(i, flush=True)
module.Writer.sample = slow
module.pack(gv.open({source!r}), {out!r})
"""


def stopped(own, tmp_path, number):
    "A process that packs slowly, and is sent a signal in the middle."
    out = tmp_path/"out"/"x.h5"
    p = subprocess.Popen([sys.executable, "-c", SLOW.format(slow=True, source=str(own[0]), out=str(out))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.strip() == "2": break
    p.send_signal(number)
    p.communicate(timeout=60)
    return out


def test_a_killed_writer_leaves_nothing_under_the_name(own, tmp_path):
    out = stopped(own, tmp_path, signal.SIGKILL)
    assert not out.exists() and all(p.name.startswith(".") for p in out.parent.iterdir())
    pack(gv.open(str(own[0])), out)
    alike(own[1][5], gv.open(str(out))[5], ("after",))


def test_ctrl_c_leaves_nothing_at_all(own, tmp_path):
    assert not list(stopped(own, tmp_path, signal.SIGINT).parent.iterdir())


def test_an_old_pack_survives_a_failed_new_one(own, tmp_path, monkeypatch):
    import geovision.data.packing as module
    out = Path(shutil.copy(own[0], tmp_path/"x.h5"))
    monkeypatch.setattr(module.Writer, "sample", lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): pack(gv.open(str(own[0])), out)
    assert out.read_bytes() == own[0].read_bytes() and [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_a_full_disk_is_one_sentence(own, tmp_path):
    "The limit on the size of a file stands for the disk."
    code = SLOW.format(slow=False, source=str(own[0]), out=str(tmp_path/"out/x.h5"))
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    ran = subprocess.run([sys.executable, "-c", limit + code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "NoSpace: no space left while writing" in ran.stderr.strip().splitlines()[-1]
    assert not list((tmp_path/"out").iterdir())
