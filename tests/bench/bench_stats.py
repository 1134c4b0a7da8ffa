"""B4, statistics of an image in one pass: `python tests/bench/bench_stats.py FOLDER [--runs 5]`.

4096 x 4096 pixels of four uint16 bands: mean, standard deviation, skewness, kurtosis, minimum, maximum, exact histogram, percentiles. The peer is
the two-pass way (a pass for the mean, a pass for the spread) on blocks of rows, in float64; the limit is decoding the file and
throwing the pixels away. Errors are against float64 on the whole array; the hard case has a mean of 10,000 and a spread of 1.
"""
import argparse
import sys
from pathlib import Path

import inputs
from measure import fresh, show, timed

JOBS = "ours", "two-pass", "limit"


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", choices=JOBS)
    options = parser.parse_args()
    if options.job: sys.exit(work(options.job, options.folder/"scene-4096.tif"))
    main(options.folder, options.runs)
