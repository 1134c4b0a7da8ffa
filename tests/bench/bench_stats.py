"""B4, statistics of an image in one pass: `python tests/bench/bench_stats.py FOLDER [--runs 5]`.

4096 x 4096 pixels of four uint16 bands: mean, standard deviation, skewness, kurtosis, minimum, maximum, exact histogram, percentiles. The peer is
the two-pass way (a pass for the mean, a pass for the spread) on blocks of rows, in float64; the limit is decoding the file and
throwing the pixels away. Errors are against float64 on the whole array; the hard case has a mean of 10,000 and a spread of 1.

At size: a generated index with the statistics of 590,000 images of twelve bands (BigEarthNet's size; there are no files behind it) and their histograms in its companion.
Opening it, merging all rows, merging them by 100 groups, and merging the histograms, each in a fresh process; the targets are seconds and less than 1 GB.
"""
import argparse
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "ours", "two-pass", "limit"
AT_SIZE = "merge", "groups", "histogram"
ROWS, BANDS = 590_000, 12


def work(job, path):
    import numpy as np

    from geovision.geo.raster import info, read
    from geovision.geo.window import Box
    _, h, w = info(path).shape
    boxes = [Box(0, y, w, min(512, h - y)) for y in range(0, h, 512)]
    if job == "limit": return timed(lambda: int(sum(read(path, b)[0, 0, 0] for b in boxes)))
    if job == "ours":
        from geovision.data.stats import file_stats, percentile

        def run():
            s = file_stats(path)
            return [s.mean.tolist(), s.std.tolist(), s.skewness.tolist(), s.kurtosis.tolist(), s.min.tolist(), s.max.tolist(), percentile(s, [2, 50, 98]).tolist()]
        return timed(run)

    def two_pass():
        n = h*w
        mean = sum(read(path, b).astype(np.float64).sum((1, 2)) for b in boxes)/n
        std = np.sqrt(sum(((read(path, b) - mean[:, None, None])**2).sum((1, 2)) for b in boxes)/n)
        return [mean.tolist(), std.tolist()]
    return timed(two_pass)


def errors(path, found):
    "Largest relative error against float64 on the whole array."
    import numpy as np
    from scipy import stats as oracle

    from geovision.geo.raster import read
    worst = 0.
    for band, values in enumerate(read(path)):
        x = values.ravel().astype(np.float64)
        z = x - x.mean()
        exact = [x.mean(), z.std(), oracle.skew(z), oracle.kurtosis(z), x.min(), x.max()]
        worst = max(worst, *(abs(found[k][band] - e)/max(abs(e), 1e-3) for k, e in enumerate(exact)))
        assert found[6][band] == np.percentile(x, [2, 50, 98], method="inverted_cdf").tolist()
    return worst


def hard(folder):
    "Mean 10,000, spread 1."
    import numpy as np

    from geovision.geo.write import write_raster
    path = Path(folder)/"hard.tif"
    if not path.exists(): write_raster(path, np.random.default_rng(5).normal(1e4, 1, (1, 2048, 2048)).round().astype("uint16"))
    return path


def card():
    "Of the generated index."
    from geovision.data.bands import SENTINEL2
    from geovision.data.card import Asset, Card
    return Card("size", assets={"image": Asset(tuple(SENTINEL2.all)[:BANDS], dtype="uint16", span=(0, 10_000))})


def dataset(path):
    "The generated index as a dataset."
    import numpy as np

    from geovision.data.dataset import Dataset
    from geovision.data.index import load
    table = load(path)
    return Dataset(card(), Path(path).parent, table, table.frame.assign(_row=np.arange(len(table))), assets=("image",))


def large_index(folder):
    "Statistics of many images that do not exist, and their histograms, as `compute_stats` would leave them."
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from geovision.data.index import STATS, Table, save
    from geovision.data.kept import pack, put
    from geovision.data.summary import settings_of, stats_store
    path, rng = Path(folder)/"size-main.parquet", np.random.default_rng(0)
    if path.exists(): return path
    n = np.full((ROWS, BANDS), 14_400.)
    mean = rng.normal(1500, 300, (ROWS, BANDS))
    sums = dict(zip(STATS, (n, mean, n*rng.uniform(1e4, 9e4, n.shape), n*rng.normal(0, 1e6, n.shape), n*rng.uniform(1e9, 9e9, n.shape), mean - 900, mean + 3000, n)))
    columns = {f"image.{k}": pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), BANDS) for k, v in sums.items()}
    paths = [f"tile/{i:06d}/{i:06d}_{{band}}.tif" for i in range(ROWS)]
    frame = pd.DataFrame({"id": [f"{i:06d}" for i in range(ROWS)], "split": np.array(["train", "val", "test"])[np.arange(ROWS) % 3],
                          "location": [f"place {i % 100}" for i in range(ROWS)]})
    size = pa.array(np.full(ROWS, 9, np.int64))
    table = Table(frame, {"image.path": pa.array(paths), "image.size": size, "image.mtime": size, **columns}, {"card": "size", "main": "image"})
    save(table, path)
    ds = dataset(path)
    ds.table.meta["stats"] = {"image": settings_of(ds, "image")}
    save(Table(frame, table.arrow, ds.table.meta), path)
    store, hist = stats_store(ds, "image"), rng.integers(0, 450, (59_000, BANDS*64), "uint32")
    for a in range(0, ROWS, 59_000):
        part = slice(a, a + 59_000)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(v[part].ravel()), BANDS) for v in sums.values()]
        cells = [pa.array(paths[part]), size[part], size[part], *lists, pa.FixedSizeListArray.from_arrays(pa.array(hist.ravel()), BANDS*64)]
        put(store, pa.Table.from_arrays(cells, schema=store.schema))
    pack(store)
    return path


def at_size(job, path):
    "One of the jobs, in this process; the imports do not count."
    import geovision.data.summary  # noqa: F401

    def run():
        ds = dataset(path)
        if job == "merge": return float(ds.stats.mean[0])
        if job == "groups": return len(ds.stats_by("location"))
        return float(ds.stats.percentile(50)[0])
    return timed(run)


def main(folder, runs):
    from geovision.data.stats import file_stats, percentile
    path = inputs.scene(folder, 4096)
    rows = {job: fresh(__file__, folder, "--job", job, runs=runs) for job in JOBS}
    values = 4*4096**2/1e6
    show("B4  4096 x 4096 x 4 uint16, file in the page cache", rows, (values, "Mvalues/s"))
    print(f"  ours: {rows['limit']['seconds']/rows['ours']['seconds']:.2f} of decoding alone, {rows['two-pass']['seconds']/rows['ours']['seconds']:.1f} x two passes")
    print(f"  largest relative error {errors(path, rows['ours']['found']):.1e}")
    s = file_stats(hard(folder))
    print(f"  hard case {errors(hard(folder), [s.mean, s.std, s.skewness, s.kurtosis, s.min, s.max, percentile(s, [2, 50, 98]).tolist()]):.1e}")
    path = large_index(folder)
    show(f"Merging {ROWS:,} images of {BANDS} bands, from the page cache", {job: fresh(__file__, path.parent, "--job", job, runs=min(runs, 3)) for job in AT_SIZE})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", choices=JOBS + AT_SIZE)
    options = parser.parse_args()
    if options.job in AT_SIZE: sys.exit(at_size(options.job, options.folder/"size-main.parquet"))
    if options.job: sys.exit(work(options.job, options.folder/"scene-4096.tif"))
    main(options.folder, options.runs)
