"""How long a start takes: `python tests/bench/bench_imports.py FOLDER [--runs 5]` (aims: import 0.5 s without torch, --help 0.7 s)."""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(*command, runs=5):
    "Median wall-clock time of a command."
    took = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    bare = seconds(sys.executable, "-c", "pass", runs=runs)
    print("\nstart")
    print(f"  python -c pass                     {bare:7.3f} s")
    print(f"  import geovision                   {seconds(sys.executable, '-c', 'import geovision', runs=runs):7.3f} s, python itself included")
    print(f"  geovision --help                   {seconds(str(Path(sys.executable).with_name('geovision')), '--help', runs=runs):7.3f} s")
    loaded = subprocess.run([sys.executable, "-c", "import geovision, sys; print('torch' in sys.modules)"], capture_output=True, text=True).stdout.strip()
    print(f"  torch is loaded by import geovision: {loaded}")
