"""Statistics of every card against one plain pass over its pixels; labels likewise; what is stopped half way goes on; a cluster gives the same."""
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from test_catalogue import NAMES, broken, opened

import geovision as gv
from geovision.data import counting, labels
from geovision.data.kept import Pen
from geovision.data.stats import edges_for, merge
from geovision.data.summary import known_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("replicas")


def files_of(ds, i):
    "The files behind the main asset of a sample: one, or one a band."
    text = str(ds.root/ds.table.values(f"{ds.main}.path", int(ds.rows["_row"].iat[i])))
    return [text.replace("{band}", b.name) for b in ds.bands] if "{band}" in text else [text]


def values_of(ds, i):
    "The pixels of a sample that count, band by band, by the simplest means there are."
    hooked, about, files = ds.main in ds.card.hooks["read"], ds.card.assets[ds.main], files_of(ds, i)
    if len(files) > 1 and "_x" not in ds.rows:        # each band at its own resolution
        for path in files:
            with rasterio.open(path) as f:
                x, nodata = f.read(1).astype(float).ravel(), about.nodata if about.nodata is not None else f.nodata
                yield x[np.isfinite(x) & (x != (np.nan if nodata is None else nodata))]
        return
    sample, nodata = ds[i], about.nodata
    if nodata is None and not hooked:
        with rasterio.open(files[0]) as f: nodata = f.nodata
    image = np.asarray(sample[ds.main]).astype(float)
    frames = image if image.ndim == 4 else image[None]
    honoured = hooked or ds.card.hooks["fix"] or nodata is None
    valid = np.asarray(sample.get("valid", True)) if honoured else np.True_
    valid = np.broadcast_to(valid if valid.shape[-2:] == frames.shape[-2:] else True, (len(frames), *frames.shape[-2:]))
    for band in np.moveaxis(frames, 1, 0):
        keep = valid & np.isfinite(band) & (band != (np.nan if nodata is None else nodata))
        yield band[keep]


def one_pass(ds, skip=()):
    "All pixels of a selection, one array a band."
    parts = [list(values_of(ds, i)) for i in range(len(ds)) if ds.rows["id"].iat[i] not in skip]
    return [np.concatenate(p) for p in zip(*parts)]


def agree(s, bands, edges):
    "Every figure to 1e-10 of what float64 gives on all pixels at once."
    assert len(s.n) == len(bands)
    hist = s.hist
    for k, x in enumerate(bands):
        assert s.n[k] == len(x)
        if not len(x): continue
        d, scale = x - x.mean(), max(abs(x.mean()), x.std(), 1e-300)
        assert abs(s.mean[k] - x.mean()) <= 1e-10*scale and (s.min[k], s.max[k]) == (x.min(), x.max())
        var = (d**2).mean()
        assert s.var[k] == pytest.approx(var, rel=1e-10, abs=1e-20*scale**2)
        if var > 1e-12*scale**2:
            assert s.skewness[k] == pytest.approx((d**3).mean()/var**1.5, rel=1e-10, abs=1e-10)
            assert s.kurtosis[k] == pytest.approx((d**4).mean()/var**2 - 3, rel=1e-10, abs=1e-10)
        if edges is not None: assert hist[k].tolist() == np.histogram(x.clip(edges[0], edges[-1]), edges)[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_any_selection_is_one_pass_over_its_pixels(folder, name):
    ds = opened(folder, name)
    skip, about = broken(ds), ds.card.assets[ds.main]
    edges = edges_for(about.dtype, about.span)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(ds.stats, one_pass(ds, skip), edges)
        some = ds.take(range(0, len(ds), 2))
        agree(some.stats, one_pass(some, skip), edges)
        if len(ds.bands) > 1:
            fewer = ds.select(bands=[ds.bands[-1].name, ds.bands[0].name])
            whole = one_pass(ds, skip)
            agree(fewer.stats, [whole[-1], whole[0]], edges)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("bigearthnet", "sen12floods")])     # bands of several resolutions have windows of another size
def test_windows_are_one_pass_over_their_pixels(folder, name):
    ds = opened(folder, name)
    shape = ds.table.column(f"{ds.main}.shape")
    if shape is None or min(shape[0].as_py()[-2:]) < 8: return
    tile = min(shape[0].as_py()[-2:])//2
    tiles = ds.tiles(tile)
    bad = broken(ds)
    first = tiles.take([i for i in range(0, len(tiles), 2) if tiles.rows["parent"].iat[i] not in bad][:12])
    boxes = first.rows[["_row", "_x", "_y", "_w", "_h"]].to_numpy()
    apart = not any((abs(a[1] - b[1]) < a[3] and abs(a[2] - b[2]) < a[4]) for i, a in enumerate(boxes) for b in boxes[:i] if a[0] == b[0])
    first = first if apart else first.take([0])
    about = ds.card.assets[ds.main]
    agree(first.stats, one_pass(first), edges_for(about.dtype, about.span))


@pytest.mark.parametrize("name", NAMES)
def test_groups_merge_to_the_whole(folder, name):
    ds = opened(folder, name)
    if broken(ds): return
    by = "split" if "split" in ds.rows else None
    parts = ds.stats_by(by)
    whole, together = ds.stats, merge(parts.values())
    assert together.n.tolist() == whole.n.tolist() and np.allclose(together.var, whole.var, rtol=1e-10, equal_nan=True)
    assert sum(int(s.hist.sum()) for s in parts.values() if s.hist is not None) == (0 if whole.hist is None else whole.hist.sum())


@pytest.mark.parametrize("name", [n for n in NAMES if any(t.kind in ("segmentation", "instance", "classification", "multilabel") for t in gv.card(n).tasks.values())])
def test_labels_are_counted_as_they_are_read(folder, name):
    first = next(k for k, t in gv.card(name).tasks.items() if t.kind in ("segmentation", "instance", "classification", "multilabel"))
    ds = opened(folder, name, task=first)
    found = ds.label_stats
    bad, want, none = broken(ds), np.zeros(len(found.classes)), 0
    for i in range(len(ds)):
        if ds.rows["id"].iat[i] in bad: continue
        sample = ds[i]
        ids = np.asarray(sample["mask"] if "mask" in sample else [] if ds.task.target in ds.card.assets else _ids(sample.get("label")))
        ids = ids.ravel().astype(int)
        good = (ids >= 0) & (ids < len(want))
        want, none = want + np.bincount(ids[good], minlength=len(want)), none + (~good).sum()
    if not (bad and ds.task.target not in ds.card.assets):
        assert (found.pixels if ds.task.target in ds.card.assets else found.samples).tolist() == want.tolist()
    assert (found.objects >= 0).all() and (found.samples <= found.count).all()


def _ids(label):
    "Class ids of a label: one, or those of a multi-hot vector."
    if label is None: return []
    return np.flatnonzero(np.asarray(label)) if label.ndim else [int(label)]


def test_labels_are_read_once(folder, monkeypatch):
    ds = opened(folder, "inria")
    before = ds.label_stats
    monkeypatch.setattr(labels.LabelJob, "__call__", lambda *a: pytest.fail("a label was read again"))
    again = opened(folder, "inria")
    assert again.label_stats.pixels.tolist() == before.pixels.tolist()
    shares = labels.kept_shares(again)
    assert shares.shape == (len(ds), 2) and np.allclose(np.unique(shares.sum(1).round(9)), [0, 1])       # the test split has no labels
    parts = [again.take(np.flatnonzero(again.rows["split"] == s)).label_stats for s in again.rows["split"].unique()]
    assert min(p.count for p in parts) == 0
    assert sum(p.area for p in parts) == pytest.approx(before.area)


def chips(folder, n, side=8):
    "Small generated images."
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        with rasterio.open(folder/f"{i:04d}.tif", "w", driver="GTiff", count=2, height=side, width=side, dtype="uint16",
                           crs="EPSG:32636", transform=rasterio.Affine(1, 0, i*side, 0, -1, 0)) as f: f.write(rng.integers(1, 5000, (2, side, side), "uint16"))
    return str(folder/"{id}.tif")


def counted(monkeypatch):
    "How many images are counted from here on."
    seen, real = [], counting.Job.__call__
    monkeypatch.setattr(counting.Job, "__call__", lambda self, item: seen.append(item) or real(self, item))
    return seen


def test_what_is_killed_half_way_goes_on(tmp_path, monkeypatch):
    template = chips(tmp_path/"chips", 120)
    script = textwrap.dedent(f"""
        import os, signal
        import geovision as gv
        from geovision.data import counting
        from geovision.data.kept import Pen
        Pen.__init__.__defaults__ = (20, 60.)
        real, seen = counting.Job.__call__, []
        def count(self, item):
            if len(seen) == 70: os.kill(os.getpid(), signal.SIGKILL)
            seen.append(1)
            return real(self, item)
        counting.Job.__call__ = count
        gv.from_files({template!r}, bands=["a", "b"]).compute_stats(workers=0)
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == -9
    kept = tmp_path/"chips/.geovision"
    assert len(list(kept.glob("*.parts/*.parquet"))) == 3
    ds, seen = gv.from_files(template, bands=["a", "b"]), counted(monkeypatch)
    agree(ds.stats, one_pass(ds), edges_for("uint16"))
    assert len(seen) == 60 and not list(kept.glob("*.parts"))


def test_an_exception_keeps_what_was_finished(tmp_path, monkeypatch):
    ds = gv.from_files(chips(tmp_path/"chips", 30), bands=["a", "b"])
    seen, real = [], counting.Job.__call__

    def stop(self, item):
        if len(seen) == 11: raise KeyboardInterrupt
        seen.append(1)
        return real(self, item)
    monkeypatch.setattr(counting.Job, "__call__", stop)
    with pytest.raises(KeyboardInterrupt): ds.compute_stats(workers=0)
    monkeypatch.setattr(counting.Job, "__call__", real)
    seen = counted(monkeypatch)
    ds.compute_stats(workers=0)
    assert len(seen) == 19 and known_rows(ds.table, "image").all()


def test_a_rebuild_keeps_what_has_not_changed(tmp_path, monkeypatch):
    template = chips(tmp_path/"chips", 20)
    gv.from_files(template, bands=["a", "b"]).compute_stats(workers=0)
    time.sleep(.02)
    (tmp_path/"chips/0003.tif").write_bytes((tmp_path/"chips/0004.tif").read_bytes())
    chip = tmp_path/"chips/0099.tif"
    chip.write_bytes((tmp_path/"chips/0001.tif").read_bytes())
    ds, seen = gv.from_files(template, bands=["a", "b"]), counted(monkeypatch)
    assert len(ds) == 21
    agree(ds.stats, one_pass(ds), edges_for("uint16"))
    assert sorted(Path(c["image.path"]).stem for c, _ in seen) == ["0003", "0099"]


def test_another_nodata_value_counts_anew(tmp_path):
    template = chips(tmp_path/"chips", 4)
    value = int(gv.from_files(template, bands=["a", "b"]).stats.min[0])
    ds = gv.from_files(template, bands=["a", "b"], nodata=value)
    assert ds.stats.min[0] > value and (ds.stats.nodata_share > 0).any()


def test_a_folder_that_cannot_be_written_has_statistics(tmp_path, monkeypatch):
    template = chips(tmp_path/"chips", 5)
    ds = gv.from_files(template, bands=["a", "b"])
    ds.table.path = None
    ds.table.kept.clear()
    agree(ds.stats, one_pass(ds), edges_for("uint16"))


def test_a_cluster_gives_the_same(tmp_path):
    template = chips(tmp_path/"chips", 40)
    told = tmp_path/"scheduler.json"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = [sys.executable, "-m", "dask"]
    started = [subprocess.Popen([*run, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)], **quiet)]
    try:
        end = time.monotonic() + 60
        while not told.exists() or not told.read_text().strip():
            assert time.monotonic() < end, "the scheduler did not start"
            time.sleep(.1)
        worker = [*run, "worker", "--scheduler-file", str(told), "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path/"work")]
        started += [subprocess.Popen(worker, **quiet) for _ in range(2)]
        import json
        address = json.loads(told.read_text())["address"]
        import distributed
        with distributed.Client(address, set_as_default=False, timeout="30s") as client:
            client.wait_for_workers(2, timeout=60)
            assert len(client.scheduler_info()["workers"]) == 2
        ds = gv.from_files(template, bands=["a", "b"])
        ds.compute_stats(scheduler=address)
        agree(ds.stats, one_pass(ds), edges_for("uint16"))
    finally:
        for p in reversed(started): p.terminate()
        for p in started: p.wait(20)


def test_rows_about_one_thing_stay_in_one_part(tmp_path):
    import pyarrow as pa

    from geovision.data.kept import Store
    store = Store(tmp_path/"a.parquet", {"class": (pa.int16(), 0)})
    with Pen(store, rows=2) as pen:
        for key in "ab":
            for c in range(3): pen.add(key, (1, 1), c)
    assert [sum(map(len, s)) for s in store.sources(["key"])] == [3, 3]
