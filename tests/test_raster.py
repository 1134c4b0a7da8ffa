"""Open files survive forks, spawns, threads and rewriting; windows read what numpy would; strangers' files do nothing unexpected."""
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from geovision.core.errors import BadFile, BadValue, GeoVisionError, UnknownName
from geovision.geo import raster
from geovision.geo.raster import KEPT, forget, handle, info, read, read_valid, valid_pixels
from geovision.geo.window import Box
from geovision.geo.write import RasterWriter, to_cog, write_raster

PLACE = dict(crs="EPSG:32636", transform=Affine(10, 0, 452_000, 0, -10, 31_000))
IMAGE = np.random.default_rng(0).integers(1, 60_000, (3, 190, 230)).astype(np.uint16)
BOXES = [Box(x, y, 30, 20) for y in range(0, 160, 40) for x in range(0, 200, 50)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_raster(tmp_path_factory.mktemp("scene")/"scene.tif", IMAGE, names=("red", "green", "nir"), block=64, **PLACE)


def window_is_right(job):
    "Runs in other processes and threads."
    path, box = job
    return os.getpid(), bool((read(path, box) == IMAGE[:, *box.slices()]).all())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_any_kind(scene, method):
    assert window_is_right((scene, BOXES[0]))[1]                       # the parent has the file open
    with multiprocessing.get_context(method).Pool(3) as pool:
        found = pool.map(window_is_right, [(scene, b) for b in BOXES*4], chunksize=4)
    assert all(right for _, right in found) and os.getpid() not in {pid for pid, _ in found}
    assert window_is_right((scene, BOXES[0]))[1]                       # and still has


def test_a_forked_child_forgets_and_does_not_close(scene):
    handle(scene)
    child = os.fork()
    if child == 0: os._exit(0 if not raster._handles and window_is_right((scene, BOXES[1]))[1] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not handle(scene).closed


def test_every_thread_has_its_own_handle(scene):
    mine, theirs, ready = handle(scene), [], threading.Barrier(4)

    def work(_):
        theirs.append(handle(scene))
        ready.wait()
        return all(window_is_right((scene, b))[1] for b in BOXES*5)

    with ThreadPoolExecutor(4) as pool: assert all(pool.map(work, range(4)))
    assert len({id(h) for h in [mine, *theirs]}) == 5
    handle(scene)
    threading.Thread(target=handle, args=[scene]).start()


def test_no_more_files_stay_open_than_agreed(tmp_path):
    forget()
    paths = [write_raster(tmp_path/f"{i}.tif", np.full((4, 4), i, np.uint8), **PLACE) for i in range(KEPT + 10)]
    for i, path in enumerate(paths): assert read(path)[0, 0, 0] == i
    assert len(raster._mine()) == KEPT
    assert read(paths[0])[0, 0, 0] == 0


def test_a_file_written_anew_is_seen(tmp_path):
    for value in (1, 2, 3):
        write_raster(tmp_path/"a.tif", np.full((4, 4), value, np.uint8), **PLACE)
        assert read(tmp_path/"a.tif")[0, 0, 0] == value


@given(st.integers(-50, 280), st.integers(-50, 240), st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=150, deadline=None)
def test_any_window_is_what_numpy_says(scene, x, y, w, h):
    padded = np.pad(IMAGE, ((0, 0), (200, 200), (200, 200)), constant_values=7)
    box, wanted = Box(x, y, w, h), padded[:, y + 200:y + 200 + h, x + 200:x + 200 + w]
    assert (read(scene, box, boundless=True, fill=7) == wanted).all()
    if Box.whole(IMAGE.shape).holds(box): assert (read(scene, box) == wanted).all()
    else:
        with pytest.raises(BadValue, match="is no window"): read(scene, box)


def test_bands_by_name_and_their_misspellings(scene):
    assert (read(scene, bands=["nir", "red"]) == IMAGE[[2, 0]]).all()
    with pytest.raises(UnknownName, match="Did you mean green"): read(scene, bands=["gren"])
    with pytest.raises(BadValue, match="has no band 3"): read(scene, bands=[3])


@pytest.mark.parametrize("driver,suffix", [("PNG", ".png"), ("JPEG", ".jpg"), ("JP2OpenJPEG", ".jp2")])
def test_other_formats_whole_and_cut_short(tmp_path, driver, suffix):
    image, path = np.random.default_rng(0).integers(0, 255, (3, 128, 128)).astype(np.uint8), tmp_path/f"a{suffix}"
    layout = dict(driver=driver, count=3, height=128, width=128, dtype="uint8", transform=PLACE["transform"])
    with rasterio.open(path, "w", **layout) as f: f.write(image)
    assert info(path).driver == driver and read(path).shape == image.shape
    cut = tmp_path/f"b{suffix}"
    cut.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    with pytest.raises(BadFile, match="cut short"): read(cut)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_tiff_cut_anywhere_is_one_sentence(scene, tmp_path, share):
    content = scene.read_bytes()
    (tmp_path/"cut.tif").write_bytes(content[:max(8, int(share*len(content)))])
    with pytest.raises(BadFile) as e: read(tmp_path/"cut.tif")
    assert str(e.value).count("\n") == 0 and "cut.tif" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04zip", b"<html>", b"%PDF-1.7", b"SIMPLE  = T", b"\x89HDF\r\n\x1a\n", b"CDF\x01",
                                     b"<GDAL_WMS>", b"II*\x00rubbish"])
def test_what_is_no_image(tmp_path, content):
    (tmp_path/"a.tif").write_bytes(content)
    with pytest.raises(BadFile, match="cut short" if content.startswith(b"II") else "not an image"): read(tmp_path/"a.tif")


@pytest.mark.parametrize("path", ["/vsicurl/https://example.org/a.tif", "https://example.org/a.tif", "s3://bucket/a.tif",
                                  "GTIFF_DIR:1:a.tif", "zip://a.zip!b.tif", "a\n.tif"])
def test_nothing_remote_is_opened(path):
    with pytest.raises(BadFile, match="there is no file"): read(path)


VRT = ('<VRTDataset rasterXSize="4" rasterYSize="4"{root}><VRTRasterBand dataType="Byte" band="1"{band}>'
       '{source}</VRTRasterBand></VRTDataset>')
SOURCE = '<SimpleSource><SourceFilename relativeToVRT="{rel}">{name}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'


def test_a_vrt_stays_at_home(tmp_path):
    (tmp_path/"home").mkdir()
    write_raster(tmp_path/"home/a.tif", np.full((4, 4), 5, np.uint8))
    write_raster(tmp_path/"secret.tif", np.full((4, 4), 9, np.uint8))
    (tmp_path/"home/link.tif").symlink_to(tmp_path/"secret.tif")
    vrt = tmp_path/"home/a.vrt"

    def says(name="a.tif", rel=1, root="", band="", extra=""):
        vrt.write_text(VRT.format(root=root, band=band, source=SOURCE.format(rel=rel, name=name) + extra))
        return read(vrt)

    assert (says() == 5).all() and (says(name=tmp_path/"home/a.tif", rel=0) == 5).all()
    away = [dict(name="../secret.tif"), dict(name="link.tif"), dict(name=tmp_path/"secret.tif", rel=0), dict(name="a.tif", rel=0),
            dict(name="/vsicurl/http://x/a.tif", rel=0), dict(name="a.vrt"),
            dict(root=' subClass="VRTWarpedDataset"'), dict(band=' subClass="VRTDerivedRasterBand"'),
            dict(extra="<PixelFunctionCode>import os</PixelFunctionCode>"), dict(extra="<SourceDataset>x</SourceDataset>")]
    for case in away:
        with pytest.raises(BadFile): says(**case)
    vrt.write_text("<VRTDataset")
    with pytest.raises(BadFile, match="damaged"): read(vrt)


def test_arrays_of_numpy(tmp_path):
    np.save(tmp_path/"a.npy", IMAGE)
    assert (read(tmp_path/"a.npy", Box(3, 4, 5, 6), bands=[1]) == IMAGE[1:2, 4:10, 3:8]).all()
    np.save(tmp_path/"p.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(BadFile, match="pickled"): read(tmp_path/"p.npy")
    (tmp_path/"cut.npy").write_bytes((tmp_path/"a.npy").read_bytes()[:5000])
    with pytest.raises(BadFile, match="damaged"): read(tmp_path/"cut.npy")
    with pytest.raises(GeoVisionError, match="its own size"): read(tmp_path/"a.npy", size=(10, 10))


def test_valid_pixels_by_nodata_mask_alpha_and_nan(tmp_path):
    data = np.array([[[0, 1], [0, 2]], [[0, 0], [3, 4]]], np.float32)
    write_raster(tmp_path/"nodata.tif", data, nodata=0)
    assert read_valid(tmp_path/"nodata.tif").tolist() == [[False, True], [True, True]]
    write_raster(tmp_path/"nan.tif", np.where(data == 0, np.nan, data))
    assert read_valid(tmp_path/"nan.tif").tolist() == [[False, True], [True, True]]
    write_raster(tmp_path/"mask.tif", data)
    with rasterio.open(tmp_path/"mask.tif", "r+") as f: f.write_mask(np.array([[0, 255], [255, 0]], np.uint8))
    assert read_valid(tmp_path/"mask.tif").tolist() == [[False, True], [True, False]]
    assert read_valid(tmp_path/"mask.tif", nodata=3).all()
    assert not valid_pixels(np.zeros((0, 2, 2))).any()


# ---- writing -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["uint8", "uint16", "int16", "float32", "float64", "int32"]),
       st.sampled_from([16, 32, 512]), st.sampled_from(["deflate", "zstd", "lzw", "none"]))
@settings(max_examples=60, deadline=None)
def test_whatever_is_written_is_read_back(tmp_path_factory, h, w, dtype, block, compress):
    image = np.random.default_rng(h*100 + w).integers(0, 100, (2, h, w)).astype(dtype)
    path = tmp_path_factory.mktemp("w")/"a.tif"
    with RasterWriter(path, image.shape, dtype, block=block, compress=compress, nodata=0, names=("a", "b"), **PLACE) as out:
        for y in range(0, h, 37): out.write(image[:, y:y + 37], Box(0, y, w, min(37, h - y)))
    meta = info(path)
    assert (read(path) == image).all() and meta.dtype == dtype and meta.names == ("a", "b") and meta.transform == PLACE["transform"]


def test_a_cog_has_overviews_and_the_same_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 3, (1, 1300, 1100)).astype(np.uint8)
    write_raster(tmp_path/"a.tif", image, colormap=["#000000", "#00ff00", "#ff0000"], nodata=255, **PLACE)
    to_cog(tmp_path/"a.tif", tmp_path/"cog.tif")
    assert (read(tmp_path/"cog.tif") == image).all() and info(tmp_path/"cog.tif").nodata == 255
    with rasterio.open(tmp_path/"cog.tif") as f: assert f.overviews(1) == [2, 4] and f.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "cog.tif"]


@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of two megabytes."
    mount = tmp_path/"tiny"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=2m tmpfs {mount} 2>/dev/null"):
        pytest.skip("only root can mount a small disk")
    yield mount
    os.system(f"umount {mount}")


@pytest.mark.parametrize("size", [900, 1024, 1500, 4000])
def test_a_full_disk_leaves_nothing(tiny_disk, tmp_path, size):
    image = np.random.default_rng(0).integers(0, 255, (3, size, size)).astype(np.uint8)
    write_raster(tmp_path/"b.tif", image)
    for write in (lambda: write_raster(tiny_disk/"a.tif", image), lambda: to_cog(tmp_path/"b.tif", tiny_disk/"c.tif")):
        with pytest.raises(OSError, match="no space left"): write()
        assert os.listdir(tiny_disk) == []


def test_a_read_only_disk_is_one_sentence(tiny_disk):
    os.system(f"mount -o remount,ro {tiny_disk}")
    with pytest.raises(BadFile, match="read-only"): write_raster(tiny_disk/"a.tif", IMAGE)
