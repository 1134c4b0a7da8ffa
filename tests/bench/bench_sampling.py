"""B1, random patches of a compressed GeoTIFF: `python tests/bench/bench_sampling.py FOLDER [--runs 5]`.

400 patches of 256 pixels from 8192 x 8192 pixels of four uint16 bands (blocks of 512, deflate), in batches of 16, without workers.
The same windows are read by TorchGeo's RasterDataset and by ours; then ours reads in the order of blocks. The limits are reading the
windows through an open handle, and decoding whole blocks once for the same number of pixels.
"""
import argparse
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "ours-same", "ours-blocks", "peer-same", "peer-random", "limit-handle", "limit-decode"
PATCHES, TILE, BATCH = 400, 256, 16


def windows(size=8192):
    "The same windows for everybody: upper left pixels."
    import numpy as np
    return np.random.default_rng(7).integers(0, size - TILE, (PATCHES, 2)).tolist()


def ours(path, blocks):
    from torch.utils.data import DataLoader

    import geovision as gv
    from geovision.geo.window import Box
    ds = gv.from_files(str(path.parent/"scene-{id:d}.tif")).where(id="8192")
    if blocks: sampler = gv.data.BlockPatches(ds.blocks(1024), TILE, n=PATCHES, block=1024, each=16, seed=0)
    else: sampler = [(0, Box(x, y, TILE, TILE)) for x, y in windows()]
    source = ds.blocks(1024) if blocks else ds
    return lambda: _consume(DataLoader(source, batch_size=BATCH, sampler=sampler, collate_fn=gv.data.collate))


def peer(path, same):
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    class Scene(RasterDataset):
        filename_glob = path.name
        is_image = True
    ds = Scene(paths=str(path.parent))
    sampler = RandomGeoSampler(ds, size=TILE, length=PATCHES, units=_pixels())
    if same: sampler = _same_windows(ds)
    return lambda: _consume(DataLoader(ds, batch_size=BATCH, sampler=sampler, collate_fn=stack_samples))


def _pixels():
    from torchgeo.samplers import Units
    return Units.PIXELS


def _same_windows(ds):
    "Our windows in the peer's way to name a place: slices of x, y and time."
    x, y, t = ds.bounds
    res = ds.res[0] if isinstance(ds.res, tuple) else ds.res
    return [(slice(x.start + u*res, x.start + (u + TILE)*res), slice(y.stop - (v + TILE)*res, y.stop - v*res), t) for u, v in windows()]


def _consume(loader):
    "Total of all pixels, and how many there were: equal windows give equal numbers."
    total = count = 0
    for batch in loader: total, count = total + float(batch["image"].double().sum()), count + batch["image"].numel()
    return [total, count]


def limit(path, decode):
    import numpy as np
    import rasterio
    from rasterio.windows import Window
    f = rasterio.open(path)
    if not decode: return lambda: [float(sum(f.read(window=Window(x, y, TILE, TILE)).astype(np.float32).sum(dtype=float) for x, y in windows())), PATCHES*4*TILE**2]
    squares = [(x, y) for y in range(0, 8192, 1024) for x in range(0, 8192, 1024)][:PATCHES*TILE**2//1024**2]
    return lambda: [float(sum(f.read(window=Window(x, y, 1024, 1024)).sum(dtype=float) for x, y in squares)), len(squares)*4*1024**2]


def work(job, path):
    made = {"ours-same": lambda: ours(path, False), "ours-blocks": lambda: ours(path, True), "peer-same": lambda: peer(path, True),
            "peer-random": lambda: peer(path, False), "limit-handle": lambda: limit(path, False), "limit-decode": lambda: limit(path, True)}[job]()
    timed(made)


def main(folder, runs):
    inputs.scene(folder, 8192)
    rows = {job: fresh(__file__, folder, "--job", job, runs=runs) for job in JOBS}
    show(f"B1  {PATCHES} patches of {TILE} px, batches of {BATCH}, no workers, file in the page cache", rows, (PATCHES, "patches/s"))
    if "error" in rows["peer-same"]: return print("  the peer did not run: install the extra bench")
    same = rows["ours-same"]["found"], rows["peer-same"]["found"]
    print(f"  sums of the same windows: ours {same[0][0]:.6g}, peer {same[1][0]:.6g}, relative difference {abs(same[0][0]/same[1][0] - 1):.2g}")
    for job in ("ours-same", "ours-blocks"):
        print(f"  {job}: {rows['peer-same']['seconds']/rows[job]['seconds']:.2f} x TorchGeo same windows, "
              f"{rows['peer-random']['seconds']/rows[job]['seconds']:.2f} x its random sampler, "
              f"{rows['limit-handle']['seconds']/rows[job]['seconds']:.2f} of an open handle, "
              f"{rows['limit-decode']['seconds']/rows[job]['seconds']:.2f} of decoding alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", choices=JOBS)
    options = parser.parse_args()
    if options.job: sys.exit(work(options.job, options.folder/"scene-8192.tif"))
    main(options.folder, options.runs)
