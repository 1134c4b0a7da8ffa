"""A map survives kill -9, a full disk and a read-only one; it equals the untiled answer; memory stays within one row of tiles."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geovision.core.errors import BadFile, BadValue, DataError, NoSpace
from geovision.geo.mosaic import BLENDS
from geovision.geo.raster import info, read
from geovision.geo.write import write_raster
from geovision.train.predict import predict

PLACE = dict(crs="EPSG:32636", transform=Affine(10, 0, 452_000, 0, -10, 31_000))


def scene(path, size=(300, 260), bands=3, seed=0, **words):
    image = np.random.default_rng(seed).integers(1, 4000, (bands, *size)).astype(np.uint16)
    return write_raster(path, image, block=64, **PLACE, **words), image


def network(bands=3, classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(bands, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, classes, 3, padding=1))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.floats(0, 0.6), st.sampled_from(BLENDS), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_network_that_answers_with_its_input(tmp_path_factory, h, w, tile, overlap, blend, batch):
    folder = tmp_path_factory.mktemp("p")
    path, image = scene(folder/"a.tif", (h, w), 2)
    try: report = predict(nn.Identity(), path, folder/"b.tif", tile, overlap, blend, "logits", batch=batch)
    except BadValue: return                                             # an overlap that leaves nothing of a tile
    meta = info(folder/"b.tif")
    assert meta.transform == PLACE["transform"] and meta.crs.to_epsg() == 32636 and meta.size == (h, w) and report.nodata == 0
    if blend == "centre": assert (read(folder/"b.tif") == image).all()
    else: np.testing.assert_allclose(read(folder/"b.tif"), image, rtol=1e-5)
    assert sorted(p.name for p in folder.iterdir()) == ["a.tif", "b.tif"]


@pytest.mark.parametrize("blend", BLENDS)
def test_classes_are_those_of_the_whole_image(tmp_path, blend):
    path, image = scene(tmp_path/"a.tif")
    net = network()
    with torch.no_grad(): whole = net(torch.from_numpy(image.astype(np.float32))[None]).argmax(1)[0].numpy()
    predict(net, path, tmp_path/"b.tif", 64, 16 if blend == "centre" else 0, blend)
    found = read(tmp_path/"b.tif")[0]
    assert (found == whole).mean() == 1 if blend == "centre" else (found == whole).mean() > 0.9
    predict(net, {"image": torch.from_numpy(image.astype(np.float32)), **PLACE}, tmp_path/"c.tif", 64, 16, "centre")
    assert (read(tmp_path/"c.tif")[0] == whole).all()


SLOW = """
import sys, time
import torch
from torch import nn
from geovision.train.predict import predict
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Conv2d(3, 4, 5, padding=2)
net.register_forward_hook(lambda *a: time.sleep(float(sys.argv[4])))
print(predict(net, sys.argv[1], sys.argv[2], 64, 0.5, sys.argv[3], "probabilities", scale=1e-3).resumed)
"""


@pytest.mark.parametrize("blend", ["hann", "centre"])
def test_kill_minus_nine_and_go_on(tmp_path, blend):
    path, _ = scene(tmp_path/"a.tif", (600, 260))
    def call(out, pause): return [sys.executable, "-c", SLOW, path, tmp_path/out, blend, pause]
    victim = subprocess.Popen(call("b.tif", "0.1"), stdout=subprocess.DEVNULL)
    journal, deadline = tmp_path/".b.tif.part/journal.json", time.time() + 90
    def begun(): return journal.exists() and journal.read_text().count(",") > 8
    while not begun() and time.time() < deadline and victim.poll() is None: time.sleep(0.05)
    assert victim.poll() is None, "it finished before it could be killed"
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (tmp_path/"b.tif").exists()
    second = subprocess.run(call("b.tif", "0"), capture_output=True, text=True, check=True)
    straight = subprocess.run(call("c.tif", "0"), capture_output=True, text=True, check=True)
    assert 0 < float(second.stdout) < 1 and float(straight.stdout) == 0
    assert (read(tmp_path/"b.tif") == read(tmp_path/"c.tif")).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif", "c.tif"]


def test_another_network_does_not_inherit(tmp_path):
    path, _ = scene(tmp_path/"a.tif")
    net, other = network(), network()
    other[0].weight.data += 0.1

    class Stop(Exception): pass

    calls = []
    def interrupt(*_):
        calls.append(1)
        if len(calls) == 20: raise Stop
    hook = net.register_forward_hook(interrupt)
    with pytest.raises(Stop): predict(net, path, tmp_path/"b.tif", 32, 8)
    hook.remove()
    assert (tmp_path/".b.tif.part").exists()
    assert predict(other, path, tmp_path/"b.tif", 32, 8).resumed == 0
    predict(other, path, tmp_path/"c.tif", 32, 8)
    assert (read(tmp_path/"b.tif") == read(tmp_path/"c.tif")).all()


def test_bad_scenes_leave_nothing(tmp_path):
    path, _ = scene(tmp_path/"a.tif")
    (tmp_path/"cut.tif").write_bytes(path.read_bytes()[:path.stat().st_size//2])
    before = sorted(tmp_path.iterdir())
    flat = {"image": np.ones((3, 4))}
    for bad, error in ((tmp_path/"cut.tif", BadFile), (tmp_path/"nowhere.tif", BadFile), (tmp_path, BadFile), (flat, DataError)):
        with pytest.raises(error): predict(network(), bad, tmp_path/"b.tif", 64, 16)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match="does not take"): predict(network(4), path, tmp_path/"b.tif")
    with pytest.raises(BadValue, match="scale"): predict(network(), path, tmp_path/"b.tif", scale=[1, 2, 3, 4])
    with pytest.raises(BadFile, match="cannot be written"): predict(network(), path, "/proc/b.tif")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(tmp_path):
    mount = tmp_path/"tiny"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=860k tmpfs {mount} 2>/dev/null"):
        pytest.skip("only root can mount a small disk")
    try:
        path, _ = scene(tmp_path/"a.tif", (900, 900))
        for output in ("classes", "logits"):                            # logits fill it while rows come, classes when the map is written
            with pytest.raises(NoSpace, match="no space left"): predict(network(), path, mount/"b.tif", 256, 32, output=output)
            assert os.listdir(mount) == []
        os.system(f"mount -o remount,ro {mount}")
        with pytest.raises(BadFile, match="read-only"): predict(network(), path, mount/"b.tif")
    finally: os.system(f"umount {mount}")


def test_nodata_everywhere_one_pixel_and_nan(tmp_path):
    path, _ = scene(tmp_path/"one.tif", (1, 1))
    predict(network(), path, tmp_path/"b.tif")
    assert info(tmp_path/"b.tif").size == (1, 1)
    nothing = write_raster(tmp_path/"nothing.tif", np.full((3, 70, 50), np.nan, np.float32), **PLACE)
    for output in ("classes", "probabilities"):
        assert predict(network(), nothing, tmp_path/"b.tif", 32, 8, output=output).nodata == 1
    holes = np.random.default_rng(0).random((3, 70, 50)).astype(np.float32)
    holes[1, 10, 10], holes[:, 20, 20] = np.inf, np.nan                   # one band missing, and all of them
    write_raster(tmp_path/"holes.tif", holes, **PLACE)
    predict(network(), tmp_path/"holes.tif", tmp_path/"b.tif", 32, 8, output="logits")
    assert np.argwhere(np.isnan(read(tmp_path/"b.tif")).any(0)).tolist() == [[20, 20]]


def test_masks_and_alpha_are_respected(tmp_path):
    import rasterio
    path, image = scene(tmp_path/"a.tif", (40, 40))
    with rasterio.open(path, "r+") as f: f.write_mask(np.where(np.arange(40) < 15, 0, 255).astype(np.uint8)*np.ones((40, 1), np.uint8))
    assert predict(network(), path, tmp_path/"b.tif", 16, 4).nodata == 15/40


MEMORY = """
import sys
import numpy as np, torch
from torch import nn
from geovision.geo.window import Box
from geovision.geo.write import RasterWriter
from geovision.train.predict import predict
torch.set_num_threads(1)
size, blend, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
rng = np.random.default_rng(0)
with RasterWriter(f"{folder}/{size}.tif", (3, size, size), "uint8") as out:
    for y in range(0, size, 512): out.write(rng.integers(0, 255, (3, 512, size), dtype=np.uint8), Box(0, y, size, 512))
net = nn.Conv2d(3, 4, 1)
predict(net, f"{folder}/{size}.tif", f"{folder}/out.tif", 256, 32, blend)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))/1024)
"""


def test_memory_does_not_grow_with_the_height_of_a_scene(tmp_path):
    def peak(size, blend):
        words = [sys.executable, "-c", MEMORY, str(size), blend, tmp_path]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    small, large, blended = peak(1024, "centre"), peak(3072, "centre"), peak(3072, "hann")
    assert large < small*1.1 and blended < large + 256*3072*5*4/2**20 + 30
