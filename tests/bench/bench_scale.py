"""At size: indexes as long as the real ones, and a folder of 100,000 files: `python tests/bench/bench_scale.py FOLDER [--runs 5]`.

The indexes are generated: the rows of a miniature over and over, each with an id, paths and a place of its own, as many as were published (fMoW
1,047,691, BigEarthNet 590,326 with one file a band, CrowdAI 341,715). Files exist where a warm start looks: 4,096 folders and 24 samples. Imports
are not counted; the peak is that of the whole process. The 100,000 files are images of 16 x 16 pixels; they were just written, so they are in the
file cache. `fit` is within the limit of 1 GB, `slow` is not within a few seconds.
"""
import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
from measure import fresh, show, timed

SIZES = {"fmow": 1_047_691, "bigearthnet": 590_326, "crowdai": 341_715}
JOBS = "open", "where", "split", "select", "random", "group", "block", "kfold", "order", "weighted", "index"
MANY = 100_000


def synthetic(name, folder):
    "An index of true size over a miniature; made once."
    import geovision as gv
    root, n = folder/f"scale-{name}", SIZES[name]
    if (root/"done").exists(): return root
    shutil.rmtree(root, ignore_errors=True)
    gv.replica(name, root)
    ds = gv.open(name, root)
    table = ds.table
    columns = {k: _long(table, k, n) for k in (*table.frame, *(c for c in table.names if "." in c))}
    _own_names(columns, table, n)
    columns["geometry"] = _places(n)
    _write(root, table, columns)
    (root/"done").touch()
    _settle(root, name, ds.variant)
    return root


def _long(table, name, n):
    "A column over and over."
    import pyarrow as pa
    column = pa.array(table.frame[name], from_pandas=True) if name in table.frame else table.column(name)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.take(pa.array(np.arange(n) % len(table)))


def _own_names(columns, table, n):
    "Ids and paths of their own: the number of the row joins the name of the file."
    import pyarrow as pa
    base = table.frame["id"].tolist()
    columns["id"] = pa.array([f"{base[i % len(base)]}_{i}" for i in range(n)])
    for k in [k for k in columns if k.endswith(".path")]:
        paths = [None if p is None else tuple(p.rpartition("/")[::2]) for p in table.column(k).to_pylist()]
        one = [p and "#" in p[1] for p in paths]
        columns[k] = pa.array([None if (p := paths[i % len(base)]) is None else f"{p[0]}/{p[1]}{i}" if one[i % len(base)]
                               else f"{p[0]}/{i % 100_000:05d}/{i}_{p[1]}" for i in range(n)])


def _places(n):
    "Squares of 500 m on land and sea, in pieces."
    import pyarrow as pa
    import shapely
    rng, parts = np.random.default_rng(0), []
    for start in range(0, n, 50_000):
        x, y = rng.uniform(-170, 170, min(50_000, n - start)), rng.uniform(-60, 70, min(50_000, n - start))
        parts.append(pa.array(list(shapely.to_wkb(shapely.box(x, y, x + .005, y + .005))), pa.binary()))
    return pa.chunked_array(parts)


def _write(root, table, columns):
    import json
    import pyarrow as pa
    import pyarrow.parquet as pq
    meta = {b"geovision": json.dumps({**table.meta, "version": json.loads(pq.read_schema(table.path).metadata[b"geovision"])["version"]}).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), table.path, compression="zstd")


def _settle(root, name, variant):
    "Make the folders and files that a warm start looks at, and note their times in the index."
    from geovision.data.index import FOLDERS, load, save
    from geovision.data.paths import BAND, keyed
    import pyarrow as pa
    table = load(next((root/".geovision").glob(f"{name}-{variant or 'main'}.parquet")))
    main, rows = table.meta["main"], np.linspace(0, len(table) - 1, 24).astype(int)
    paths = table.column(f"{main}.path").to_pylist()
    folders = sorted({os.path.dirname(p) for p in paths})
    for f in [folders[i] for i in np.unique(np.linspace(0, len(folders) - 1, min(FOLDERS, len(folders))).astype(int))]: (root/f).mkdir(parents=True, exist_ok=True)
    sizes, times = (table.column(f"{main}.{k}").to_numpy(zero_copy_only=False).copy() for k in ("size", "mtime"))
    for i in rows.tolist():
        files = [root/keyed(paths[i])[0]] if BAND not in paths[i] else [root/paths[i].replace(BAND, b) for b in table.meta["bands"]]
        for f in files:
            f.parent.mkdir(parents=True, exist_ok=True)
            if not f.exists(): f.write_bytes(b"12345678")
        sizes[i], times[i] = sum(f.stat().st_size for f in files), max(f.stat().st_mtime_ns for f in files)
    table.arrow |= {f"{main}.size": pa.array(sizes), f"{main}.mtime": pa.array(times)}
    kept = [f for f in folders if (root/f).is_dir()] + [os.path.relpath(p, root) for p in (root, *root.glob("*")) if p.is_dir() and not p.name.startswith(".")]
    table.meta["folders"] = {f: os.stat(root/f).st_mtime_ns for f in dict.fromkeys(kept)}
    save(table, table.path)


def many_files(folder):
    "100,000 images of 16 x 16 pixels in 200 folders."
    from geovision.geo.write import write_raster
    root = folder/"scale-files"
    if (root/"done").exists(): return root
    write_raster(root/"one.tif", np.full((3, 16, 16), 7, np.uint8), crs="EPSG:32636", transform=(.5, 0, 5e5, 0, -.5, 4e6), block=16)
    body = (root/"one.tif").read_bytes()
    (root/"one.tif").unlink()
    for k in range(MANY):
        path = root/("train" if k % 10 else "val")/f"place{k//1000:03d}"/f"{k}.tif"
        if k % 1000 < 2: path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    (root/"done").touch()
    return root


def work(job, folder, name):
    "One job in this process."
    warnings.simplefilter("ignore")
    from geovision.data.opening import card, from_files, open as opened
    from geovision.data.samplers import Shuffled, Weighted
    if name == "files":
        if job == "cold": shutil.rmtree(folder/"scale-files/.geovision", ignore_errors=True)
        return timed(lambda: len(from_files(str(folder/"scale-files/{split}/{location}/{id:d}.tif"), bands=["red", "green", "blue"])))
    card(name)
    root = folder/f"scale-{name}"
    if job == "open": return timed(lambda: len(opened(name, root)))
    ds = opened(name, root)
    label = next((c for c in ("category", "location", "split") if c in ds.rows))
    doing = {
        "where": lambda: len(ds.where(f"{label} == '{ds.rows[label].iloc[0]}'")),
        "split": lambda: len(ds.split("train")),
        "select": lambda: len(ds.select(bands=[b.name for b in ds.bands[:2]])),
        "random": lambda: len(ds.splits(how="random")),
        "group": lambda: len(ds.splits(by=label, how="stratified")),
        "block": lambda: len(ds.splits(how="block", size_m=50_000)),
        "kfold": lambda: len(ds.splits(how="kfold")),
        "order": lambda: sum(1 for _ in Shuffled(ds)),
        "weighted": lambda: sum(1 for _ in Weighted(ds, np.ones(len(ds)))),
        "index": lambda: len(ds.index),
    }
    return timed(doing[job])


def main(folder, runs):
    for name in SIZES:
        synthetic(name, folder)
        rows = {job: fresh(__file__, folder, "--name", name, "--job", job, runs=runs) for job in JOBS}
        show(f"{name}, {SIZES[name]:,} rows (generated; warm index; peak above the size before the job)", rows)
        _said(rows, 1000)
    many_files(folder)
    rows = {"cold": fresh(__file__, folder, "--name", "files", "--job", "cold"), "warm": fresh(__file__, folder, "--name", "files", "--job", "warm", runs=runs)}
    show(f"a folder of {MANY:,} files (written just before, so in the file cache)", rows)
    _said(rows, 1000)


def _said(rows, limit):
    "The whole process against the limit."
    whole = {k: r["before"] + r["peak"] for k, r in rows.items() if "error" not in r}
    if whole: print(f"  largest process {max(whole.values()):.0f} MB in {max(whole, key=whole.get)!r}, limit {limit} MB: {'kept' if max(whole.values()) < limit else 'NOT kept'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job")
    parser.add_argument("--name", choices=[*SIZES, "files"])
    options = parser.parse_args()
    if options.job: sys.exit(work(options.job, options.folder, options.name))
    options.folder.mkdir(parents=True, exist_ok=True)
    main(options.folder, options.runs)
