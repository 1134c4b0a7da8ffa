"""B5, polygons of a mask with ten thousand buildings: `python tests/bench/bench_vectorise.py FOLDER [--runs 5]`.

Ours reads the file in bands of rows (which cut buildings) and writes polygons as it goes. The peer is `rasterio.features.shapes`
on the whole array, whose GeoJSON becomes shapely geometry, the least one can do with it. The limit is naming the connected components,
without any outline.
"""
import argparse
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "ours-table", "ours-strips", "ours-gpkg", "peer-shapes", "peer-shapely", "limit"


def work(job, path, out):
    "One job, measured in this process."
    import numpy as np
    import shapely

    from geovision.geo.raster import read
    if job.startswith("ours"):
        from geovision.geo.vectorise import vectorise
        small = np.zeros((64, 64), np.uint8)
        small[3:9, 4:40] = 1
        if job == "ours-table": run = lambda: _facts(vectorise(path))
        elif job == "ours-strips": run = lambda: _facts(vectorise((read(path)[0][y:y + 500] for y in range(0, 4096, 500))))
        else: run = lambda: str(vectorise(path, out))
        return timed(run, warm=lambda: vectorise(small))
    if job.startswith("peer"):
        from rasterio.features import shapes
        from shapely.geometry import shape

        def run():
            mask = read(path)[0]
            found = list(shapes(mask, mask=mask > 0))
            if job == "peer-shapes": return len(found)
            geoms = np.array([shape(g) for g, _ in found])
            return [len(geoms), float(shapely.area(geoms).sum())]
        return timed(run, warm=lambda: list(shapes(np.ones((8, 8), np.uint8))))
    from skimage.measure import label
    return timed(lambda: int(label(read(path)[0], connectivity=1).max()), warm=lambda: label(np.ones((8, 8))))


def _facts(table): return [len(table), float(table.geometry.area.sum())]


def main(folder, runs):
    mask, large, out = inputs.mask(folder, 4096), inputs.mask(folder, 16384), Path(folder)/"out.gpkg"
    rows = {job: fresh(__file__, folder, "--job", job, "--mask", mask, "--out", out, runs=runs) for job in JOBS}
    show("B5  4096 x 4096, about 10,000 buildings", rows, (4096**2/1e6, "MPix/s"))
    ours, peer = rows["ours-strips"], rows["peer-shapely"]
    (n, area), (n_peer, area_peer) = ours["found"], peer["found"]
    print(f"  polygons {n} (peer {n_peer}): {n - n_peer} cut; area difference {area - area_peer:g} pixels")
    for name, other in (("peer (shapes + shapely)", peer), ("shapes alone", rows["peer-shapes"]), ("limit (components)", rows["limit"])):
        whole, strips = (r["seconds"]/other["seconds"] for r in (rows["ours-table"], ours))
        print(f"  ours / {name}: {whole:.2f} from the file, {strips:.2f} in strips of 500 rows")
    rows = {"4096 x 4096": rows["ours-gpkg"], "16384 x 16384": fresh(__file__, folder, "--job", "ours-gpkg", "--mask", large, "--out", out)}
    show("    memory, to a GeoPackage", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=5)
    for word in ("job", "mask", "out"): parser.add_argument(f"--{word}")
    said = parser.parse_args()
    sys.exit(work(said.job, said.mask, said.out) if said.job else main(said.folder, said.runs))
