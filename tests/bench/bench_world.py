"""The world on one core: `python tests/bench/bench_world.py FOLDER [--runs 3]`.

Cold is the first picture of a piece of land, warm the second. The limit fills an array of the same size with rounded noise: no renderer that
draws per-pixel noise can be faster. No other program draws the same thing, so there is no peer.
"""
import argparse
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
from measure import fresh, timed  # noqa: E402

JOBS = {"rgb-town": ("town", "aerial_rgb", 512, {}), "rgb-dense": ("dense", "aerial_rgb", 512, {}), "enmap-mixed": ("mixed", "enmap", 3840, {}),
        "enmap-farmland": ("farmland", "enmap", 3840, {}),
        "series-mixed": ("mixed", "sentinel2_l1c", 2560, {"date": [f"2023-{m:02d}-10" for m in range(1, 13)]})}
AIM = {"rgb-town": 1.5, "rgb-dense": 1.5, "enmap-mixed": 1., "enmap-farmland": 1., "series-mixed": 10.}  # seconds, from the plan


def work(job, warm):
    "One view, measured in this process; warm: after the same view was drawn before."
    import numpy as np

    from geovision.world import World
    place, sensor, side, how = JOBS[job]
    world = World(3, place=place)
    x, y = world.bounds[0] + 1200, world.bounds[1] + 1200
    def draw(): return list(world.view(sensor, (x, y, x + side, y + side), **how)["image"].shape)
    def noise():
        shape = draw_shape
        for _ in range(int(np.prod(shape[:-2]))): np.rint(np.random.default_rng(0).normal(size=shape[-2:])).astype(np.uint16)
    if warm == "limit":
        draw_shape = draw()
        return timed(noise)
    timed(draw, draw if warm == "warm" else None)


def main(folder, runs):
    print("\nThe world, one core")
    for job in JOBS:
        found = {how: fresh(__file__, folder, "--job", job, "--warm", how, runs=1 if how == "limit" else runs) for how in ("cold", "warm", "limit")}
        if any("error" in f for f in found.values()):
            print(f"  {job:16} failed: {found}")
            continue
        print(f"  {job:16} cold {found['cold']['seconds']:6.2f} s, warm {found['warm']['seconds']:6.2f} s (aim {AIM[job]:g} s), noise alone "
              f"{found['limit']['seconds']:5.2f} s, peak of the process {found['cold']['before'] + found['cold']['peak']:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=3)
    for word in ("job", "warm"): parser.add_argument(f"--{word}")
    said = parser.parse_args()
    sys.exit(work(said.job, said.warm) if said.job else main(said.folder, said.runs))
