"""Polygons from bands of rows are those of the whole picture: against GDAL, against the pixels, and with bounded memory."""
import subprocess
import sys

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from shapely.geometry import shape

from geovision.core.errors import DataError, GeoVisionError
from geovision.geo.crs import geodesic_area
from geovision.geo.rasterise import rasterise
from geovision.geo.vectorise import vectorise
from geovision.geo.write import write_raster

PLACE = dict(transform=Affine(0.5, 0, 452_000, 0, -0.5, 31_000), crs="EPSG:32636")
MASKS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=st.integers(0, 3))


def bands(image, rows): return (image[y:y + rows] for y in range(0, len(image), rows))
def canon(geoms, values): return sorted((shapely.normalize(g).wkb, int(v)) for g, v in zip(geoms, values))


@given(MASKS, st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_the_same_polygons_as_gdal_from_bands_of_any_height(image, rows):
    ours = vectorise(bands(image, rows))
    theirs = [(shape(g), v) for g, v in rasterio.features.shapes(image, mask=image > 0)]
    assert canon(ours.geometry, ours.value) == canon(*zip(*theirs)) if theirs else len(ours) == 0
    assert ours.is_valid.all()


@given(MASKS, st.integers(1, 9), st.sampled_from([4, 8]))
@settings(max_examples=200, deadline=None)
def test_there_and_back(image, rows, connectivity):
    found = vectorise(bands(image, rows), **PLACE, connectivity=connectivity)
    assert (rasterise(found, found.value, image.shape, PLACE["transform"]) == image).all()
    assert found["area_m2"].sum()*4 == (image > 0).sum() and found.is_valid.all()


@given(MASKS, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_as_many_patches_as_scipy_counts(image, rows):
    for connectivity, structure in ((4, None), (8, np.ones((3, 3)))):
        count = sum(ndimage.label(image == v, structure)[1] for v in (1, 2, 3))
        assert len(vectorise(bands(image, rows), connectivity=connectivity)) == count


def test_a_spiral_and_a_comb_that_cross_every_band():
    comb = np.zeros((301, 101), np.uint8)
    comb[:, ::2] = 1
    comb[0] = comb[-1] = 1                                # one patch with fifty holes, all open until the last row
    found = vectorise(bands(comb, 7))
    assert (len(found), len(found.geometry[0].interiors), found.pixels[0]) == (1, 50, comb.sum())
    spiral = np.zeros((63, 63), np.uint8)
    for i in range(0, 31, 2): spiral[i:63 - i, i:63 - i] = 1; spiral[i + 1:62 - i, i + 1:62 - i] = 0
    for i in range(0, 30, 2): spiral[i + 1, i + 3] = 1      # bridges between the rings
    whole, banded = vectorise(spiral), vectorise(bands(spiral, 1))
    assert canon(whole.geometry, whole.value) == canon(banded.geometry, banded.value)


def city(size=700, seed=0):
    "Noisy blobs of three classes."
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(size, size)), 6) + rng.normal(0, 0.012, (size, size))
    return np.digitize(field, (0.02, 0.05, 0.08)).astype(np.uint8)


def test_no_polygon_is_cut_and_no_area_is_lost(tmp_path):
    image = city()
    write_raster(tmp_path/"map.tif", image, nodata=255, block=256, **PLACE)
    theirs = np.array([shape(g) for g, _ in rasterio.features.shapes(image, mask=image > 0, transform=PLACE["transform"])])
    for out in (None, tmp_path/"map.gpkg", tmp_path/"map.parquet"):
        source, place = (tmp_path/"map.tif", {}) if out else (bands(image, 97), PLACE)
        found = vectorise(source, out, **place, classes=["sea", "beach", "wood", "rock"])
        if out: found = gpd.read_file(found) if out.suffix == ".gpkg" else gpd.read_parquet(found)
        assert len(found) == len(theirs) and found["area_m2"].sum() == shapely.area(theirs).sum()
        assert np.allclose(np.sort(found.area), np.sort(shapely.area(theirs)), rtol=1e-12, atol=0)
        assert set(found["class"]) == {"beach", "wood", "rock"} and found.crs.to_epsg() == 32636


def test_small_patches_go_by_true_area():
    image = np.zeros((40, 40), np.uint8)
    image[5:15, 5:15], image[20:24, 20:24] = 1, 1
    degrees = dict(transform=Affine(1e-5, 0, 25, 0, -1e-5, 60), crs=4326)                # pixels of 1.114 x 0.558 m
    every = vectorise(image, **degrees)
    assert np.allclose(every.area_m2, [geodesic_area(g, 4326) for g in every.geometry], rtol=1e-4)
    assert len(vectorise(image, **degrees, min_area=20)) == 1
    assert len(vectorise(image, min_area=17)) == 1 and len(vectorise(image, min_area=16)) == 2   # without a CRS: pixels


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "bool", "float32"])
def test_every_type_of_class_map(dtype):
    image = (city(80) > 1).astype(dtype)
    found = vectorise(image)
    assert found.pixels.sum() == image.sum() and set(found.value) <= {1}


def test_negative_ids_nodata_and_class_zero():
    image = np.array([[-3, -3, 0], [7, 7, 0]], np.int16)
    assert sorted(vectorise(image, background=None).value) == [-3, 0, 7]
    assert sorted(vectorise(image, background=None, nodata=7).value) == [-3, 0]
    assert sorted(vectorise(image, background=[0, -3]).value) == [7]
    assert len(vectorise(np.zeros((0, 5), np.uint8))) == 0
    with pytest.raises(DataError, match="fractions"): vectorise(np.array([[0.5]]))


def test_a_full_disk_leaves_nothing(tmp_path):
    program = f"""
import resource
import numpy as np
from geovision.geo.vectorise import vectorise
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
image = (np.random.default_rng(0).random((400, 400)) < 0.5).astype("uint8")
vectorise(image, {str(tmp_path)!r} + "/" + SUFFIX)
"""
    for name in ("a.gpkg", "a.parquet"):
        ran = subprocess.run([sys.executable, "-c", program.replace("SUFFIX", repr(name))], capture_output=True, text=True)
        assert "NoSpace: no space left while writing" in ran.stderr, ran.stderr[-500:]
        assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_unwritable_folders(tmp_path):
    with pytest.raises(GeoVisionError, match="no vector format"): vectorise(np.ones((2, 2), np.uint8), tmp_path/"a.shp")
    with pytest.raises(GeoVisionError, match="cannot be written"): vectorise(np.ones((2, 2), np.uint8), "/proc/a.gpkg")
