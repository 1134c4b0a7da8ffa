"""B2, opening a folder of 2,000 files: `python tests/bench/bench_index.py FOLDER [--runs 5]`.

Cold: no index yet, every file is looked into. Warm: the index is there. The peer is TorchGeo's RasterDataset, which looks into every file at
each start. The limit of a cold scan is one rasterio.open a file.
"""
import argparse
import shutil
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "ours-cold", "ours-warm", "peer", "limit"


def work(job, folder):
    if job == "peer":
        from torchgeo.datasets import RasterDataset

        class Tiles(RasterDataset):
            filename_glob = "*.tif"
        return timed(lambda: len(Tiles(paths=str(folder)).index))
    if job == "limit":
        import rasterio
        return timed(lambda: sum(rasterio.open(p).width > 0 for p in sorted(folder.glob("*.tif"))))
    import geovision.geo.raster  # noqa: F401
    from geovision.data.opening import from_files
    if job == "ours-cold": shutil.rmtree(folder/".geovision", ignore_errors=True)
    return timed(lambda: len(from_files(str(folder/"{id}.tif"), bands=["x"])))


def main(folder, runs):
    tiles = inputs.small_tiles(folder)
    rows = {job: fresh(__file__, folder, "--job", job, runs=runs) for job in JOBS}
    show("B2  2,000 files (imports not counted)", rows)
    assert {r["found"] for r in rows.values() if "found" in r} == {2000}, tiles
    if "error" in rows["peer"]: return print("  the peer did not run: install the extra bench")
    print(f"  cold: {rows['peer']['seconds']/rows['ours-cold']['seconds']:.2f} x TorchGeo, {rows['limit']['seconds']/rows['ours-cold']['seconds']:.2f} of one open a file")
    print(f"  warm: {rows['peer']['seconds']/rows['ours-warm']['seconds']:.0f} x TorchGeo")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", choices=JOBS)
    options = parser.parse_args()
    if options.job: sys.exit(work(options.job, options.folder/"tiles-2000"))
    main(options.folder, options.runs)
