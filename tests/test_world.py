"""The world: any window shows the same pixels, truth agrees with vectors, and the same seed gives the same land everywhere."""
import os
import subprocess
import sys

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geovision.world import PLACES, World
from geovision.world.calendar import when_of
from geovision.core.errors import BadValue, UnknownName
from geovision.world.districts import District, Land
from geovision.world.roads import main_roads, streets
from geovision.world.terrain import Plan

QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
GSD = {"aerial_rgb": (.15, .5, 1.), "worldview_ps": (.3,), "worldview_ms": (1.2, 2.), "dsm": (.5, 2.), "planetscope": (3.,), "sentinel2_l1c": (10., 20.),
       "sentinel1": (10.,), "quadpol": (1.,), "nightlights": (50.,)}


HOW = ({}, {"lean": (25., 200.)}, {"clouds": .5}, {"jpeg": 70}, {"sun": (100., 20.)}, {"date": "2016-02-01"})  # ways to take a picture
FAR = ({}, {"clouds": .4}, {"date": "2019-11-03"}, {"orbit": "descending"})


@pytest.fixture(scope="module")
def worlds():
    return {p: World(seed=5, place=p) for p in ("town", "city", "farmland")}


def window(world, gsd, x, y, w, h):
    a, b = world.bounds[0] + 2400, world.bounds[1] + 2400
    return a + x * gsd, b + y * gsd, a + (x + w) * gsd, b + (y + h) * gsd


@settings(max_examples=30, **QUIET)
@given(st.sampled_from(["town", "city", "farmland"]), st.sampled_from(list(GSD)), st.data())
def test_windows_agree_to_the_bit(worlds, place, sensor, data):
    world, gsd = worlds[place], data.draw(st.sampled_from(GSD[sensor]))
    most = 90 if gsd < 6 else 40 if gsd < 40 else 24
    w, h = data.draw(st.integers(most // 3, most)), data.draw(st.integers(most // 3, most))
    x, y = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    sw, sh = data.draw(st.integers(1, w - x)), data.draw(st.integers(1, h - y))
    how = data.draw(st.sampled_from(HOW)) if GSD[sensor][0] < 6 and sensor not in ("dsm", "quadpol") else data.draw(st.sampled_from(FAR))
    if sensor != "aerial_rgb": how = {k: v for k, v in how.items() if k != "jpeg"}
    large = world.view(sensor, window(world, gsd, 0, 0, w, h), gsd=gsd, **how)["image"]
    small = world.view(sensor, window(world, gsd, x, y, sw, sh), gsd=gsd, **how)["image"]
    assert np.array_equal(small, large[:, h - y - sh:h - y, x:x + sw])


@settings(max_examples=12, **QUIET)
@given(st.sampled_from(["instances", "boundaries", "landcover", "roads", "parcels", "crops", "trees", "water", "flood", "height"]), st.integers(0, 40), st.integers(0, 40))
def test_truth_agrees_between_windows(worlds, kind, x, y):
    world = worlds["town"]
    large, small = world.truth(kind, window(world, .5, 0, 0, 120, 100), .5), world.truth(kind, window(world, .5, x, y, 60, 50), .5)
    assert np.array_equal(small, large[100 - y - 50:100 - y, x:x + 60])


def test_enmap_windows_agree(worlds):
    world = worlds["farmland"]
    large, small = (world.view("enmap", window(world, 30., *box))["image"] for box in ((0, 0, 9, 8), (2, 3, 4, 3)))
    assert np.array_equal(small, large[:, 2:5, 2:6])
    assert large.dtype == np.int16 and (large[126:141] == -32768).all() and (large[160:167] == -32768).all()
    assert (large[:126] > -32768).all()


def test_long_winter_shadows_reach_coarse_pixels_the_same_way():
    world = World(3, crs="EPSG:32633", place="city")
    large, small = (world.view("enmap", window(world, 30., *box), date="2023-12-20")["image"] for box in ((0, 0, 10, 10), (1, 1, 4, 4)))
    assert np.array_equal(small, large[:, 5:9, 1:5])


def test_large_views_are_made_of_pieces(worlds, monkeypatch):
    import geovision.world.views as views
    world, box = worlds["town"], window(worlds["town"], .5, 0, 0, 150, 130)
    whole = world.view("aerial_rgb", box)["image"]
    monkeypatch.setattr(views, "TILE", 64)
    assert np.array_equal(world.view("aerial_rgb", box)["image"], whole)


@settings(max_examples=6, **QUIET)
@given(st.integers(0, 7000), st.integers(0, 7000), st.sampled_from(["mixed", "city", "coast"]))
def test_pieces_of_any_place(x, y, place):
    import geovision.world.views as views
    world = World(seed=9, place=place)
    box = (world.bounds[0] + x, world.bounds[1] + y, world.bounds[0] + x + 150, world.bounds[1] + y + 100)
    grid = world.grid(box, 1.)
    whole = world.view("aerial_rgb", box, gsd=1.)["image"]
    camera = views.find_sensor("aerial_rgb")
    shot = views.shot_of(world, camera, when_of())
    for rows, cols, piece in views.pieces(grid, 60):
        assert np.array_equal(views.picture(world, camera, piece, shot), whole[:, rows, cols])


def test_another_process_sees_the_same(worlds):
    box = window(worlds["town"], .5, 10, 10, 80, 80)
    here = int(worlds["town"].view("aerial_rgb", box)["image"].astype(np.int64).sum())
    script = f"from geovision.world import World; print(int(World(5, place='town').view('aerial_rgb', {box})['image'].astype('int64').sum()))"
    for threads in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads}
        assert int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True).stdout) == here


@pytest.mark.parametrize("place", PLACES)
def test_buildings_stand_apart_and_off_the_roads(place):
    world = World(seed=7, place=place)
    box = window(world, 1., 200, 0, 450, 450)
    homes, roads = world.vectors("buildings", box), world.vectors("roads", box)
    assert homes.id.is_unique and (homes.id < 2**31).all() and homes.crs == world.crs
    tree = shapely.STRtree(homes.geometry.values)
    one, two = tree.query(homes.geometry.values, predicate="intersects")
    shared = shapely.area(shapely.intersection(homes.geometry.values[one], homes.geometry.values[two]))
    assert shared[one != two].sum() < 1e-3
    surface = shapely.buffer(np.asarray(roads.geometry.values), roads["width"].to_numpy() / 2 - .05)
    crossing, _ = shapely.STRtree(surface).query(homes.geometry.values, predicate="intersects")
    assert len(crossing) == 0
    if len(homes): assert set(homes.parcel) <= set(world.vectors("parcels", box).id)


@settings(max_examples=8, **QUIET)
@given(st.integers(0, 50), st.sampled_from(["city", "town", "dense"]), st.integers(2, 16), st.integers(2, 16))
def test_streets_of_a_district_hang_together(seed, place, i, j):
    import networkx as nx
    land = Land(Plan(seed, place))
    roads = streets(District(land, i, j)) + [s for a in (0, 1) for b in (0, 1) for s in main_roads(land, i + a, j + b)]
    graph = nx.Graph([(s.start, s.end) for s in roads])
    assert len({s.id for s in roads}) == len(roads)
    if not land.tree.query(District(land, i, j).outline.buffer(30), predicate="intersects").size:
        assert nx.number_connected_components(graph) == 1


def test_ids_persist(worlds):
    world = worlds["town"]
    a = world.vectors("buildings", window(world, 1., 0, 0, 150, 150)).set_index("id")
    b = World(5, place="town").vectors("buildings", window(world, 1., 80, 80, 150, 150)).set_index("id")
    both = a.index.intersection(b.index)
    assert len(both) > 3 and (shapely.to_wkb(a.geometry[both]) == shapely.to_wkb(b.geometry[both])).all()


@pytest.mark.parametrize("crs", ["EPSG:32736", "EPSG:32633", "EPSG:2154", "EPSG:32618"])
def test_any_metric_crs(crs):
    world = World(1, crs=crs, place="village")
    box = window(world, 1., 0, 0, 40, 40)
    sample = world.view("aerial_rgb", box)
    assert sample["crs"] == crs and (sample["transform"].c, sample["transform"].f) == (box[0], box[3])
    assert all(isinstance(v, int) for v in world.bounds) and world.vectors("trees", box).crs == crs


def test_mistakes_are_told(worlds):
    w = worlds["town"]
    box = window(w, .5, 0, 0, 10, 10)
    for call, error, words in [
        (lambda: w.view("sentinel9", box), UnknownName, "sentinel9"), (lambda: World(place="toun"), UnknownName, "town"),
        (lambda: w.view("aerial_rgb", (0, 0, 1, 1)), BadValue, "leave the world"), (lambda: w.view("aerial_rgb", box, gsd=-1), BadValue, "positive"),
        (lambda: w.view("aerial_rgb", (box[2], box[1], box[0], box[3])), BadValue, "no pixel"), (lambda: w.truth("house", box, .5), UnknownName, "house"),
        (lambda: w.view("aerial_rgb", box, date="yesterday"), BadValue, "not a date"), (lambda: w.vectors("river", box), UnknownName, "river"),
        (lambda: World(crs="EPSG:4326"), BadValue, "metres")]:
        with pytest.raises(error, match=words): call()
