"""Measure a job in fresh processes: seconds, and the memory it needs above what was there before it began."""
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "2")
MARK = "MEASURED "


def status(key):
    "A line of /proc/self/status, in MB."
    with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith(key))/1024


def timed(job, warm=None):
    "In the measured process: run `job`, print what it took. `warm` is run before, and does not count."
    if warm is not None: warm()
    before, start = status("VmRSS"), time.perf_counter()
    found = job()
    seconds = time.perf_counter() - start
    print(MARK + json.dumps({"seconds": seconds, "peak": status("VmHWM") - before, "before": before, "found": found}))


def fresh(script, *words, runs=1):
    "Run `script words...` in fresh processes; medians, the range of seconds, and the highest peak."
    every = []
    for _ in range(runs):
        ran = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
        lines = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
        if ran.returncode or not lines: return {"error": (ran.stderr or ran.stdout)[-400:]}
        every.append(json.loads(lines[-1][len(MARK):]))
    seconds = sorted(e["seconds"] for e in every)
    return {"seconds": statistics.median(seconds), "low": seconds[0], "high": seconds[-1], "peak": max(e["peak"] for e in every),
            "before": every[-1]["before"], "found": every[-1]["found"]}


def show(title, rows, per=None):
    "Print a table: name -> what `fresh` found; `per` turns seconds into a rate."
    print(f"\n{title}")
    for name, found in rows.items():
        if "error" in found:
            print(f"  {name:34} failed: {(found['error'].strip().splitlines() or ['?'])[-1][:120]}")
            continue
        rate = f"{per[0]/found['seconds']:8.2f} {per[1]}" if per else ""
        memory = f"peak +{found['peak']:.0f} MB over {found['before']:.0f}"
        print(f"  {name:34} {found['seconds']:7.2f} s ({found['low']:.2f}-{found['high']:.2f}) {rate}  {memory}")
