"""B3, tiled prediction, plumbing only: `python tests/bench/bench_predict.py FOLDER [--runs 5]`.

A 1 x 1 convolution from 4 bands to 8 classes, tiles of 512 with an overlap of 64. The limit reads blocks, predicts, takes the best class
and writes, without any overlap. Every job runs in a fresh process; memory is what it adds to the process with the model in it.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "limit", "ours-centre", "ours-hann"


def network():
    "Four bands to eight classes, the same weights everywhere."
    import torch
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 8, 1).eval()


def limit(path, out):
    "Block by block: read, predict, best class, write."
    import rasterio
    import torch
    net = network()
    with rasterio.open(path) as src, rasterio.open(out, "w", driver="GTiff", count=1, height=src.height, width=src.width, dtype="uint8",
                                                   tiled=True, blockxsize=512, blockysize=512, compress="deflate", crs=src.crs,
                                                   transform=src.transform) as dst, torch.inference_mode():
        for _, window in src.block_windows(1):
            x = torch.from_numpy(src.read(window=window).astype("float32"))[None]
            dst.write(net(x).max(1).indices[0].numpy().astype("uint8"), 1, window=window)


def terratorch(path, out):
    "The whole scene in memory, TerraTorch's tiles, rasterio's writing."
    import rasterio
    import torch
    from terratorch.tasks.tiled_inference import TiledInferenceParameters, tiled_inference
    net = network()
    with rasterio.open(path) as src, torch.inference_mode():
        x = torch.from_numpy(src.read().astype("float32"))[None]
        settings = TiledInferenceParameters(h_crop=512, h_stride=448, w_crop=512, w_stride=448, average_patches=True)
        said = tiled_inference(net, x, 8, settings)
        with rasterio.open(out, "w", driver="GTiff", count=1, height=src.height, width=src.width, dtype="uint8", compress="deflate") as dst:
            dst.write(said.squeeze(0).max(0).indices.numpy().astype("uint8"), 1)


def work(job, path, out):
    "One job, measured in this process."
    import numpy as np
    import torch

    from geovision.geo.write import write_raster
    from geovision.train.predict import predict
    torch.set_num_threads(2)
    small = write_raster(Path(out).with_name("warm.tif"), np.ones((4, 64, 64), np.uint16))

    def run(scene=path, to=out):
        if job == "limit": return limit(scene, to)
        if job == "terratorch": return terratorch(scene, to)
        predict(network(), scene, to, tile=512, overlap=64, blend=job.split("-")[1], resume=False)
    timed(run, warm=lambda: run(small, Path(out).with_name("warm-out.tif")))


def differ(one, other):
    "Pixels in which two maps differ."
    from geovision.geo.raster import info, read
    from geovision.geo.window import Box
    h, w = info(one).size
    boxes = [Box(0, y, w, min(512, h - y)) for y in range(0, h, 512)]
    return sum(int((read(one, box) != read(other, box)).sum()) for box in boxes)


def main(folder, runs):
    small, large = inputs.scene(folder, 4096), inputs.scene(folder, 8192)
    jobs = [*JOBS, *(["terratorch"] if importlib.util.find_spec("terratorch") else [])]
    def do(job, scene, runs): return fresh(__file__, folder, "--job", job, "--scene", scene, "--out", Path(folder)/f"{job}.tif", runs=runs)
    rows = {job: do(job, small, runs) for job in jobs}
    show("B3  4096 x 4096, 4 bands, 8 classes, tile 512, overlap 64", rows, (4096**2/1e6, "MPix/s"))
    for job in [j for j in jobs if j != "limit" and "error" not in rows[j]]:
        print(f"  {job}: {rows['limit']['seconds']/rows[job]['seconds']:.2f} of the limit's speed; "
              f"{differ(Path(folder)/f'{job}.tif', Path(folder)/'limit.tif')} pixels differ from the untiled result")
    if "terratorch" in rows: print(f"  memory, ours / TerraTorch: {rows['ours-centre']['peak']/rows['terratorch']['peak']:.2f}")
    else: print("  peer not installed: terratorch")
    if not importlib.util.find_spec("geoai"): print("  peer not installed: geoai")
    big = {job: do(job, large, 1) for job in JOBS}
    show("    the same at 8192 x 8192", big, (8192**2/1e6, "MPix/s"))
    totals = {job: [r["before"] + r["peak"] for r in (rows[job], big[job])] for job in JOBS}
    print(f"  centre: peak of the process {totals['ours-centre'][0]:.0f} MB at 4096 and {totals['ours-centre'][1]:.0f} MB at 8192 "
          f"({totals['ours-centre'][1]/totals['ours-centre'][0]:.2f})")
    print(f"  hann: {totals['ours-hann'][1] - totals['ours-centre'][1]:.0f} MB more than centre at 8192; "
          f"one row of tiles is {512*8192*9*4/2**20:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=5)
    for word in ("job", "scene", "out"): parser.add_argument(f"--{word}")
    said = parser.parse_args()
    sys.exit(work(said.job, said.scene, said.out) if said.job else main(said.folder, said.runs))
