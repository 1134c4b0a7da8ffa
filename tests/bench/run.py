"""All benchmarks, beside other programs: `make bench`, or `python tests/bench/run.py [--folder DIR] [--runs 5] [--only sampling index ...]`.

Every number is the median of fresh processes; inputs are seeded and made once. Ratios carry over to other machines, seconds do not.
"""
import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORDER = ["sampling", "index", "predict", "loop", "norm", "stats", "pack", "vectorise", "world", "imports", "scale"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="where the inputs are kept")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, OMP_NUM_THREADS=2")
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    words = [options.folder, "--runs", str(options.runs)]
    codes = [subprocess.run([sys.executable, HERE/f"bench_{name}.py", *words], env=env, cwd=HERE.parents[1]).returncode for name in options.only]
    sys.exit(max(codes))


if __name__ == "__main__": main()
