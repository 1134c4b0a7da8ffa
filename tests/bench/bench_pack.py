"""B10, packs: `python tests/bench/bench_pack.py FOLDER [--runs 5]`.

One training epoch (shuffled, batches of 16, images and masks as tensors) over 400 chips of 256 pixels, from small compressed GeoTIFFs and from a pack of them, with 0 and 2
workers. Chips are generated, with noise as imagery has it: three bands of uint8 and ten of uint16, deflate with predictor 2 as most datasets are published. All files are in
the page cache. What is timed is the second epoch of one loader with persistent workers, as in training, so that starting workers and opening files, which both sides do
once, is left out; tensors travel from workers to the trainer on both sides. The folder is the ordinary dataset with the same settings. The sums of all pixels must
agree. Besides: how large the files are,
what packing takes, and the same epoch from packs of every codec.
"""
import argparse
import sys
from pathlib import Path

from measure import fresh, show, timed

COUNT, SIDE, BATCH = 400, 256, 16
KINDS = {"uint8x3": (3, "uint8", 255), "uint16x10": (10, "uint16", 10_000)}
CODECS = "zstd", "gzip", "lzf", "none"


def chips(folder, kind):
    "The generated chips, written once."
    import numpy as np
    from scipy.ndimage import zoom

    from geovision.geo.write import write_raster
    root = folder/f"chips-{kind}-{COUNT}"
    if (root/"done").exists(): return root
    bands, dtype, high = KINDS[kind]
    for i in range(COUNT):
        rng = np.random.default_rng([10, i])
        smooth = zoom(rng.uniform(.1*high, .9*high, (bands, 9, 9)), (1, SIDE/9, SIDE/9), order=1)
        image = (smooth + rng.normal(0, .01*high, smooth.shape)).clip(0, high).astype(dtype)
        mask = (zoom(rng.uniform(0, 1, (9, 9)), SIDE/9, order=1) > .6).astype("uint8")[None]
        place = dict(crs="EPSG:32636", block=SIDE)
        write_raster(root/"images"/f"{i}.tif", image, names=[f"b{k}" for k in range(bands)], **place)
        write_raster(root/"masks"/f"{i}.tif", mask, **place)
    (root/"done").touch()
    return root


def folder_of(root):
    import geovision as gv
    return gv.from_files(str(root/"images/{id}.tif"), mask=str(root/"masks/{id}.tif"), classes=["land", "house"])


def packed(root, codec="zstd"):
    from geovision.data.pack import pack
    path = root.with_name(f"{root.name}-{codec}.h5")
    if not path.exists(): pack(folder_of(root), path, codec)
    return path


def epoch(root, source, workers):
    "An epoch to run and one to measure."
    import torch
    from torch.utils.data import DataLoader

    import geovision as gv
    torch.set_num_threads(1)
    ds = folder_of(root) if source == "tiff" else gv.open(str(packed(root, source)))
    loader = DataLoader(ds, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(0), num_workers=workers, collate_fn=gv.data.collate,
                        persistent_workers=workers > 0)
    timed(lambda: bare(loader), warm=lambda: bare(loader))


def bare(loader):
    "What training waits for: the batches."
    return sum(len(b["id"]) for b in loader)


def work(job, root):
    what, *words = job.split("-")
    if what == "epoch": return epoch(root, words[0], int(words[1]))
    if what == "sum": return timed(lambda: summed(root, words[0]))
    from geovision.data.pack import pack
    ds = folder_of(root)
    ds.compute_stats()
    timed(lambda: pack(ds, root.with_name(f"{root.name}-again.h5"), words[0]).stat().st_size)


def summed(root, source):
    import geovision as gv
    ds = folder_of(root) if source == "tiff" else gv.open(str(packed(root, source)))
    return [int(sum(float(ds[i]["image"].double().sum()) for i in range(len(ds)))), int(sum(int(ds[i]["mask"].sum()) for i in range(len(ds))))]


def size_of(path):
    return (sum(f.stat().st_size for f in path.rglob("*.tif")) if path.is_dir() else path.stat().st_size)/1e6


def main(folder, runs, kinds):
    for kind in kinds:
        root = chips(folder, kind)
        for codec in CODECS: packed(root, codec)
        jobs = [f"epoch-{s}-{w}" for w in (0, 2) for s in ("tiff", *CODECS)]
        rows = {job: fresh(__file__, folder, "--job", job, "--kind", kind, runs=runs) for job in jobs}
        rows["pack-zstd"] = fresh(__file__, folder, "--job", "pack-zstd", "--kind", kind)
        show(f"B10  an epoch over {COUNT} generated chips {kind}, {SIDE} px, with masks, page cache and index warm", rows, (COUNT, "chips/s"))
        sums = [fresh(__file__, folder, "--job", f"sum-{s}", "--kind", kind)["found"] for s in ("tiff", "zstd")]
        print(f"  sums of all pixels and labels: folder {sums[0]}, pack {sums[1]}, {'equal' if sums[0] == sums[1] else 'DIFFERENT'}")
        print("  size in MB: GeoTIFFs " + f"{size_of(root):.1f}, " + ", ".join(f"{c} {size_of(packed(root, c)):.1f}" for c in CODECS))
        for w in (0, 2):
            if any("error" in rows[f"epoch-{s}-{w}"] for s in ("tiff", *CODECS)): continue
            speed = {c: rows[f"epoch-tiff-{w}"]["seconds"]/rows[f"epoch-{c}-{w}"]["seconds"] for c in CODECS}
            print(f"  {w} workers, folder / pack: " + ", ".join(f"{c} {x:.1f} x" for c, x in speed.items()) + "   (aim: zstd, the default, >= 3 x)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--job")
    options = parser.parse_args()
    if options.job: sys.exit(work(options.job, chips(options.folder, options.kind[0])))
    main(options.folder, options.runs, options.kind)
