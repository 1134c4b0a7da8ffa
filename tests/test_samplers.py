"""Selections and samplers by their laws: splits keep apart what belongs together, folds partition, choices commute, and none of it opens an image."""
import hashlib
import os
import subprocess
import sys
import warnings
from itertools import permutations

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

import geovision as gv
from geovision.core.errors import BadValue
from geovision.data.bands import AERIAL
from geovision.data.card import Asset, Card, Task
from geovision.data.combine import _grounds, common
from geovision.data.dataset import GROUND, Dataset, open_dataset
from geovision.data.index import Table
from geovision.data.layout import Layout
from geovision.data.splits import near_pairs
from geovision.data.time import each_season, evenly, near
from geovision.geo.crs import as_crs, transformer, utm_crs
from geovision.geo.window import Box, box_bounds

gv.catalog()
CARD = Card("laws", assets={"image": Asset(AERIAL["red", "green", "blue", "nir"])})
QUICK = settings(max_examples=30, deadline=None)


def table_of(frame):
    "A dataset that has rows and no files."
    return Dataset(CARD, None, Table(frame, {}, {"replica": False}), frame.assign(_row=np.arange(len(frame))))


def rows_of(n, groups, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"id": [f"s{i}" for i in range(n)], "town": [f"t{g}" for g in rng.integers(0, groups, n)], "kind": rng.choice(["a", "b", "c"], n)})


def squares_of(x, y, side, crs):
    "A dataset of squares of ground."
    frame = pd.DataFrame({"id": [f"s{i}" for i in range(len(x))]})
    ground = dict(zip(GROUND, (x, y, x + side, y + side, 8, 8, crs)))
    return Dataset(CARD, None, Table(frame, {}, {"replica": False}), frame.assign(_row=np.arange(len(frame)), **ground))


@given(st.integers(12, 300), st.integers(4, 9), st.integers(0, 99))
@QUICK
def test_groups_are_never_shared(n, groups, seed):
    ds = table_of(rows_of(n, groups, seed))
    if ds.rows.town.nunique() < 3: return
    for how in ({"how": "group"}, {"how": "random"}):
        rows = ds.splits(by="town", val=.2, test=.2, seed=seed, **how).rows
        assert rows.groupby("town").split.nunique().max() == 1 and set(rows.split) == {"train", "val", "test"}
    rows = ds.splits(by="town", how="kfold", k=3, seed=seed).rows
    assert rows.groupby("town").fold.nunique().max() == 1 and set(rows.fold) == {0, 1, 2}


@given(st.integers(2, 400), st.integers(2, 12), st.integers(0, 99))
@QUICK
def test_folds_partition_and_are_of_one_size(n, k, seed):
    ds = table_of(rows_of(n, 3, seed))
    if k > n:
        with pytest.raises(BadValue): ds.splits(how="kfold", k=k)
        return
    folded = ds.splits(how="kfold", k=k, seed=seed)
    sizes = folded.rows.fold.value_counts()
    assert sizes.sum() == n and len(sizes) == k and sizes.max() - sizes.min() <= 1
    held = [set(folded.fold(i).split("val").rows.id) for i in range(k)]
    assert set().union(*held) == set(ds.rows.id) and sum(map(len, held)) == n


@given(st.integers(30, 300), st.floats(.05, .4), st.floats(.05, .4), st.integers(0, 99))
@QUICK
def test_shares_are_kept(n, val, test, seed):
    counts = table_of(rows_of(n, 3, seed)).splits(val=val, test=test, how="random", seed=seed).rows.split.value_counts()
    assert abs(counts.get("val", 0) - val*n) <= 1 and abs(counts.get("test", 0) - test*n) <= 1 and counts.sum() == n


@given(st.integers(60, 300), st.integers(1, 4), st.integers(0, 99))
@QUICK
def test_equal_is_equal(n, each, seed):
    ds = table_of(rows_of(n, 3, seed))
    fewest = ds.rows.kind.value_counts().min()
    assert set(ds.equal("kind", seed=seed).rows.kind.value_counts()) == {fewest}
    if fewest <= 2*each: return
    held = ds.splits(by="kind", how="equal", val=3*each/n, test=3*each/n, seed=seed).rows
    assert (held.groupby(["split", "kind"]).size().unstack(0)[["val", "test"]] == each).all().all()
    some = ds.sample(n//2, by="kind", seed=seed).rows.kind.value_counts()
    assert (abs(some - ds.rows.kind.value_counts()*(n//2)/n) <= 1.5).all()


def metres_between(a, b):
    "Distance of two footprints in the UTM zone of the first; the oracle."
    at = a.centroid
    move = transformer(as_crs(4326), utm_crs(at.x, at.y))
    return shapely.distance(*(shapely.transform(g, lambda p: np.column_stack(move.transform(*p.T))) for g in (a, b)))


@given(st.floats(20, 300), st.integers(0, 99), st.sampled_from(["narrow", "wide"]))
@settings(max_examples=12, deadline=None)
def test_buffers_keep_their_distance(buffer, seed, span):
    rng = np.random.default_rng(seed)
    if span == "narrow": ds = squares_of(500_000 + rng.uniform(0, 2_000, 120), 40_000 + rng.uniform(0, 2_000, 120), 100, "EPSG:32636")
    else:
        x, y = np.repeat(rng.uniform(3e6, 5e6, 12), 10), np.repeat(rng.uniform(2e6, 5e6, 12), 10)
        ds = squares_of(x + rng.uniform(0, 1_500, 120), y + rng.uniform(0, 1_500, 120), 100, "EPSG:3035")
    prints, split = ds.footprints(), ds.splits(how="block", size_m=400, buffer=buffer, seed=seed).rows.split
    kept = np.flatnonzero(split.notna())
    assert len(kept) > 10 and split.iloc[kept].nunique() > 1
    near = [(i, j) for i in kept for j in kept if i < j and split[i] != split[j] and shapely.distance(prints[i], prints[j]) < .05]
    assert all(metres_between(prints[i], prints[j]) > buffer*.995 for i, j in near)
    a, b = near_pairs(prints[:40], buffer)
    brute = {(i, j) for i in range(40) for j in range(i + 1, 40) if shapely.distance(prints[i], prints[j]) < .1 and metres_between(prints[i], prints[j]) < buffer*.99}
    assert brute <= set(zip(a.tolist(), b.tolist()))


@given(st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_blocks_share_no_ground(seed):
    rng = np.random.default_rng(seed)
    ds = squares_of(500_000 + rng.uniform(0, 2_000, 150), 40_000 + rng.uniform(0, 2_000, 150), 100, "EPSG:32636").splits(how="block", size_m=300, seed=seed)
    assert len(ds.leaks()) == 0
    assert len(ds.with_rows(ds.rows.assign(split=rng.choice(["train", "val"], 150))).leaks()) > 0     # and the question can be answered with yes
    folds = ds.splits(how="kfold", k=4, size_m=300, seed=seed)
    assert len(folds.with_rows(folds.rows[folds.rows.fold >= 0]).leaks(by="fold")) == 0 and set(folds.rows.fold) >= {0, 1, 2, 3}


@given(st.lists(st.integers(0, 1500), min_size=1, max_size=40), st.integers(1, 5))
@QUICK
def test_dates_are_chosen_once_and_in_bounds(days, n):
    dates = pd.DatetimeIndex(np.datetime64("2018-01-01", "D") + np.array(days))
    for keep in (evenly(dates, n), near(dates, list(dates[:n])), each_season(dates, n)): assert len(set(keep.tolist())) == len(keep) and (np.diff(keep) > 0).all()
    assert len(evenly(dates, n)) == min(n, len(dates))
    season = (dates.month % 12)//3 + 4*(dates.year + (dates.month == 12))
    wanted = pd.Series(season).value_counts().clip(upper=n).sum()
    assert len(each_season(dates, n)) == wanted


@given(st.integers(0, 30), st.integers(0, 30), st.sampled_from([1, 2, 4]), st.booleans())
@QUICK
def test_aligned_parts_show_the_same_ground(right, down, ratio, odd):
    def one(name, gsd, x, y, size):
        arrow = {"image.shape": pa.array([[4, size, size]]), "image.crs": pa.array(["EPSG:32636"]), "image.transform": pa.array([[gsd, 0., x, 0., -gsd, y]])}
        frame = pd.DataFrame({"id": [name]})
        return Dataset(CARD, None, Table(frame, arrow, {"replica": False}), frame.assign(_row=[0]))
    off = .3 if odd else 0.
    parts = {"low": one("a", 2., 500_000., 40_000., 40), "high": one("b", 2./ratio, 500_000. + right + off, 40_000. - down, 40*ratio)}
    pair = common(parts, np.zeros((1, 2), int))
    low, high = (_grounds(p, [0])[0] for p in pair.parts.values())
    bounds = [box_bounds(t, Box(0, 0, w, h)) for _, t, (h, w) in (low, high)]
    np.testing.assert_allclose(*bounds, atol=1e-6 if not odd else .02)
    assert (high[2][0], high[2][1]) == (low[2][0]*ratio, low[2][1]*ratio)
    assert bounds[0][0] >= 500_000 + right - 1e-6 and bounds[0][3] <= 40_000 - down + 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Generated pictures: 3 places, 4 dates, with masks and a vector file each."
    root, rng = tmp_path_factory.mktemp("towns"), np.random.default_rng(0)
    for kind in ("img", "lbl", "vec"): (root/kind).mkdir()
    for p, place in enumerate("abc"):
        for d, date in enumerate(("20190115", "20190420", "20190718", "20200125")):
            where = dict(driver="GTiff", height=32, width=48, dtype="uint8", crs="EPSG:32636", transform=rasterio.Affine(1, 0, 500_000 + 100*p, 0, -1, 40_000))
            with rasterio.open(root/f"img/{place}_{date}.tif", "w", count=4, **where) as f: f.write(rng.integers(1, 255, (4, 32, 48), "uint8"))
            with rasterio.open(root/f"lbl/{place}_{date}.tif", "w", count=1, **where) as f: f.write((rng.random((1, 32, 48)) > .1*d).astype("uint8"))
            walls = [shapely.box(x + 100*p, y, x + 4 + 100*p, y + 4) for x, y in ((500_010, 39_980), (500_030, 39_990))]
            houses = gpd.GeoDataFrame({"id": [1, 2]}, geometry=walls, crs=32636)
            houses.to_file(root/f"vec/{place}_{date}.geojson", driver="GeoJSON")
    return root


def towns(root):
    card = Card("towns", assets={"image": Asset(AERIAL["red", "green", "blue", "nir"]), "mask": Asset(), "polygons": Asset(reader="vector", default=False)},
                tasks={"t": Task("segmentation", classes=("ground", "building"))},
                layout=Layout(image="img/{location}_{date}.tif", mask="lbl/{location}_{date}.tif", polygons="vec/{location}_{date}.geojson"))
    return open_dataset(card, root)


CHOICES = {
    "where": lambda ds: ds.where(location=["a", "b"]), "months": lambda ds: ds.months(1, 4), "between": lambda ds: ds.between("2019", "2019"),
    "within": lambda ds: ds.within(shapely.box(500_090, 39_000, 500_300, 41_000), crs="EPSG:32636"), "bands": lambda ds: ds.select(bands=["nir", "red"]),
    "drop": lambda ds: ds.drop_bands("blue"), "assets": lambda ds: ds.select(assets=["image"])}


@pytest.mark.parametrize("three", [("where", "months", "bands"), ("within", "between", "assets"), ("where", "within", "between"), ("months", "between", "drop")])
@pytest.mark.parametrize("shape", [lambda ds: ds, lambda ds: ds.tiles(16), lambda ds: ds.series()])
def test_selections_commute(folder, three, shape):
    told = set()
    for order in permutations([*three, "shape"]):
        ds = towns(folder)
        for name in order: ds = shape(ds) if name == "shape" else CHOICES[name](ds)
        first = ds[0]
        told.add((tuple(ds.rows.id), tuple(b.name for b in ds.bands), tuple(sorted(first)), len(ds), hashlib.sha1(first["image"].numpy().tobytes()).hexdigest()))
    assert len(told) == 1 and len(next(iter(told))[0])


def opened(monkeypatch):
    "A list that grows with every raster that is opened."
    seen, real = [], rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path, *a, **k: (seen.append(str(path)), real(path, *a, **k))[1])
    return seen


def test_no_selection_opens_an_image(folder, monkeypatch, tmp_path):
    towns(folder)                                                                       # the index is there
    import shutil
    fresh = shutil.copytree(folder, tmp_path/"towns")
    ds, seen = towns(fresh), opened(monkeypatch)
    for k in list(CHOICES): CHOICES[k](ds)
    shares, yours = dict(val=.3, test=.3), gpd.GeoDataFrame(geometry=[shapely.Point(500_020, 39_990)], crs=32636)
    made = [ds.splits(how=h, by="location", **shares) for h in ("random", "stratified", "group")]
    made += [ds.splits(how="block", size_m=60, buffer=1, **shares), ds.splits(how="kfold", k=3).fold(1), ds.splits(how="query", val="location == 'a'", test="location == 'b'")]
    made += [ds.equal("location"), ds.sample(4), ds.tiles(16), ds.grid(16), ds.grid(10, gsd=2., crs="EPSG:32635"), ds.centred(8), ds.centred(8, objects=yours)]
    made += [ds.dates(2, by="location"), ds.nearest("2019-05-01", by="location"), ds.per_season(by="location"), ds.series(), ds.tiles(16).series().dates(2), ds.changes()]
    made += [ds + ds, (ds + ds).tiles(8), gv.align(a=ds.months(1), b=ds.grid(20)), ds.select(bands="vnir"), ds.select(bands=[640])]
    assert all(len(m) for m in made)
    d = gv.data
    for sampler in (d.Shuffled(ds), d.RandomPatches(ds, 8, n=9), d.GridPatches(ds.tiles(16), 8), d.BlockPatches(ds, 8, n=9, block=16), d.RandomPatches(ds.series(), 8)):
        assert len(list(sampler)) == len(sampler)
    assert seen == []
    ds[0]
    assert seen                                                                         # and reading does open


def test_class_shares_come_from_the_index(folder, monkeypatch, tmp_path):
    import shutil
    ds = towns(shutil.copytree(folder, tmp_path/"towns"))
    read = gv.data.class_shares(ds)
    ds.compute_labels()
    seen = opened(monkeypatch)
    np.testing.assert_allclose(gv.data.class_shares(ds), read, atol=1e-12)
    assert seen == [] and read.shape == (12, 2)


SCRIPT = """
import sys, hashlib, pandas as pd, geovision as gv
sys.path.insert(0, {tests!r}); import test_samplers as t
from pathlib import Path
ds = t.towns(Path({root!r}))
told = [ds.splits(how=h, by="location", seed=3).rows.split.tolist() for h in ("random", "stratified", "group")]
told += [ds.splits(how="kfold", k=3, seed=3).rows.fold.tolist(), ds.splits(how="block", size_m=60, seed=3).rows.split.tolist(), ds.series().splits(seed=3).rows.split.tolist()]
told += [ds.sample(5, seed=3).rows.id.tolist(), ds.equal("location", 2, seed=3).rows.id.tolist(), ds.centred(8, jitter=.5, seed=3).rows[["_x", "_y"]].values.tolist()]
told += [list(gv.data.RandomPatches(ds, 8, n=20, seed=3)), list(gv.data.Shuffled(ds, seed=3)), list(gv.data.Weighted(ds, [1.]*12, seed=3))]
print(hashlib.sha1(repr(told).encode()).hexdigest())
"""


def test_the_same_in_every_process(folder):
    towns(folder)
    code = SCRIPT.format(tests=os.path.dirname(__file__), root=str(folder))
    how = dict(capture_output=True, text=True, check=True, timeout=110)
    told = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, **how).stdout for seed in ("1", "77")}
    assert len(told) == 1 and len(told.pop().strip()) == 40


def test_ranks_share_every_key(folder):
    ds = towns(folder)
    for make in (lambda **o: gv.data.GridPatches(ds, 16, **o), lambda **o: gv.data.Shuffled(ds, even=False, **o)):
        whole, parts = list(make()), [list(make(rank=r, world=5)) for r in range(5)]
        assert sorted(map(repr, sum(parts, []))) == sorted(map(repr, whole))


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniatures")
    for name in ("spacenet7", "pastis_r"): gv.replica(name, root/name)
    return root


def quiet(name, root, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gv.open(name, root/name, **how)


def test_months_of_a_place_with_ids_that_stay(miniatures):
    task = next(k for k, t in gv.card("spacenet7").tasks.items() if t.kind == "instance")
    ds = quiet("spacenet7", miniatures, split="train", task=task).series()
    sample = ds[[len(g) for g in ds.groups].index(24)]
    assert sample["image"].shape[0] == len(sample["polygons"]) == len(sample["time"]) == 24 and sample["mask"].shape[0] == 24
    assert sorted(sample["time"]) == sample["time"]
    ids = [set(p["id"]) for p in sample["polygons"] if len(p)]
    assert len(ids[0] & ids[-1]) > len(ids[0])/2                                         # most houses of the first month are there in the last, under their number
    assert set(np.unique(sample["instances"][-1])) - {0} <= ids[-1]
    batch = gv.data.collate([sample, ds.dates(5)[0] if ds[0]["image"].shape[-2:] == sample["image"].shape[-2:] else ds.dates(5)[1]])
    assert batch["frames"].sum(1).tolist() == [24, 5] and batch["image"].shape[:2] == (2, 24) and len(batch["polygons"][1]) == 5


def test_dates_inside_a_patch(miniatures):
    ds = quiet("pastis_r", miniatures).select(assets=["image", "sar", "mask"])
    whole, some = ds[0], ds.between("2019-01", "2019-06")[0]
    keep = [i for i, t in enumerate(whole["time"]) if pd.Timestamp("2019-01-01") <= t < pd.Timestamp("2019-07-01")]
    assert some["time"] == [whole["time"][i] for i in keep] and (some["image"] == whole["image"][keep]).all()
    assert len(some["sar"]) == len(some["sar_time"]) == sum(pd.Timestamp("2019-01-01") <= t < pd.Timestamp("2019-07-01") for t in whole["sar_time"])
    assert len(ds.dates(2)[1]["image"]) == 2 and some["mask"].shape == whole["mask"].shape
    batch = gv.data.collate([ds[i] for i in range(3)])
    assert batch["frames"].sum(1).tolist() == [len(ds[i]["time"]) for i in range(3)] and batch["sar_frames"].sum(1).tolist() == [len(ds[i]["sar_time"]) for i in range(3)]
    assert batch["sar"].shape[1] == batch["sar_frames"].shape[1] and batch["image"].shape[1] == batch["frames"].shape[1]
