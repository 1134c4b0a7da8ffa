"""The inputs of the benchmarks, made once into a folder and the same for everybody: `python tests/bench/inputs.py FOLDER`."""
import sys
from pathlib import Path

import numpy as np
from affine import Affine
from skimage.draw import polygon

from geovision.geo.raster import info, read
from geovision.geo.window import Box
from geovision.geo.write import RasterWriter, write_raster

PLACE = dict(crs="EPSG:32636", transform=Affine(0.5, 0, 452_000, 0, -0.5, 31_000))


def scene(folder, size=8192):
    "size x size pixels of four uint16 bands, blocks of 512, deflate, predictor 2, band by band."
    path = Path(folder)/f"scene-{size}.tif"
    if path.exists(): return path
    with RasterWriter(path, (4, size, size), "uint16", names=("blue", "green", "red", "nir"), **PLACE) as out:
        for y in range(0, size, 512):
            h, rng = min(512, size - y), np.random.default_rng([0, y])
            coarse = rng.uniform(300, 3000, (4, 9, size//64 + 2))
            smooth = np.stack([_stretch(c, h, size) for c in coarse])
            out.write((smooth + rng.normal(0, 40, smooth.shape)).clip(1, 10_000).astype(np.uint16), Box(0, y, size, h))
    return path


def _stretch(coarse, h, w):
    "Straight lines between the numbers of a coarse grid of 64 pixels."
    rows = np.arange(h)/64
    low, part = rows.astype(int), (rows % 1)[:, None]
    tall = coarse[low]*(1 - part) + coarse[low + 1]*part
    cols = np.arange(w)/64
    low, part = cols.astype(int), cols % 1
    return tall[:, low]*(1 - part) + tall[:, low + 1]*part


def mask(folder, size=4096):
    "size x size pixels of 0 and 1 with about ten thousand buildings per 4096 x 4096, noise along their outlines."
    path = Path(folder)/f"mask-{size}.tif"
    if path.exists(): return path
    with RasterWriter(path, (1, size, size), "uint8", nodata=255, **PLACE) as out:
        for y in range(0, size, 4096):
            row = np.concatenate([buildings(np.random.default_rng([1, y, x])) for x in range(0, size, 4096)], axis=1)
            out.write(row[None], Box(0, y, size, 4096))
    return path


def buildings(rng, size=4096, across=100):
    "Turned rectangles on a jittered grid, none touching another, their outlines eaten away here and there."
    image, step = np.zeros((size, size), np.uint8), size/across
    for i, j in np.ndindex(across, across):
        x, y = (j + 0.5)*step + rng.uniform(-4, 4), (i + 0.5)*step + rng.uniform(-4, 4)
        (w, h), turn = rng.uniform(5, 11, 2), rng.uniform(0, np.pi)
        corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        rows, cols = polygon(corners[:, 1] + y, corners[:, 0] + x, image.shape)
        image[rows, cols] = 1
    inner = image.astype(bool)
    inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    eaten = image.astype(bool) & ~inner & (rng.random(image.shape) < 0.25)
    beside = np.zeros_like(inner)                          # a pixel is only eaten when it leans on one that stays inside
    beside[1:-1, 1:-1] = inner[:-2, 1:-1] | inner[2:, 1:-1] | inner[1:-1, :-2] | inner[1:-1, 2:]
    image[eaten & beside] = 0
    return image


def small_tiles(folder, count=2000):
    "Many little files: 64 x 64 pixels, one band, side by side on the ground."
    folder = Path(folder)/f"tiles-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder/f"tile-{i:05d}.tif"
        if path.exists(): continue
        place = dict(crs=PLACE["crs"], transform=PLACE["transform"] @ Affine.translation(64*(i % 50), 64*(i//50)))
        write_raster(path, np.random.default_rng([2, i]).integers(0, 4000, (1, 64, 64)).astype(np.uint16), block=64, **place)
    return folder


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for made in (scene(where, 4096), scene(where, 8192), mask(where, 4096), mask(where, 16384), small_tiles(where)):
        if made.is_dir(): print(made, f"{len(list(made.iterdir()))} files")
        else: print(made, info(made).shape, f"mean of the first corner {read(made, Box(0, 0, 64, 64)).mean():.2f}")
