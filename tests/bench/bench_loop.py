"""B8 and B9, the price of the loop, of logging and of metrics; how long until a step is seen: `python tests/bench/bench_loop.py FOLDER [--runs 5]`.

Bare is forward, cross entropy, backward, step on the same model and batches, in turns with our loop in one process, so that a busy machine disturbs both alike.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import fresh, timed

JOBS = "loop", "logging", "metrics"


def training(folder):
    "A run as `fit` begins it, logging every step, and its batches."
    import torch

    from geovision.train.config import load_config
    from geovision.train.fit import begin, training_steps
    from geovision.train.generated import Generated
    from geovision.train.job import prepare
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    words = {"name": "bench", "model": {"name": "unet", "encoder": "tu-mobilenetv3_small_050"}, "data": {"batch_size": 8}, "log": {"every": 1}}
    job = prepare(load_config(words, []), Generated(60, 96), device="cpu")
    run = begin(job, folder)
    return run, list(training_steps(job, 0))


def loop():
    "Seconds a step: bare, and in our loop with all that fit does after a step."
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    from geovision.train.fit import _after_step
    from geovision.train.folder import columns_of
    from geovision.train.log import Log
    from geovision.train.loop import train_epoch
    with tempfile.TemporaryDirectory() as place:
        run, steps = training(Path(place))
        job, opt = run.job, run.opt
        log = Log(Path(place)/"metrics.h5", columns_of(job), seconds=1.)
        after = _after_step(run, Path(place), log, tqdm(disable=True))
        model = job.model.train()

        def bare(clip=False):
            for (batch,) in steps:
                opt.zero_grad(set_to_none=True)
                cross_entropy(model(batch["image"]), batch["mask"], ignore_index=255).backward()
                if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
                opt.step()

        def ours(): train_epoch(run.net, steps, job.step, opt, run.sched, job.autocast, job.config.optimise.clip, run.scaler, after)
        jobs = {"bare": bare, "bare, clipped": lambda: bare(True), "ours": ours}
        spent = {name: [] for name in jobs}
        for turn in range(13):
            for name, do in sorted(jobs.items(), key=lambda item: hash((turn, item[0]))):
                start = time.perf_counter()
                do()
                if turn: spent[name].append((time.perf_counter() - start)/len(steps))
        log.close()
    return {name: statistics.median(v) for name, v in spent.items()}


def logging():
    "Seconds of `log.row` and its flushes for each of 5,000 steps that take 2 ms, and of a flush at every row."
    from geovision.train.log import Log
    columns, spent = [f"c{k}" for k in range(11)], {}
    with tempfile.TemporaryDirectory() as place:
        for name, seconds, n in (("waiting", 1., 2500), ("flushed", 0., 1000)):
            with Log(Path(place)/f"{name}.h5", {"steps": columns}, seconds) as log:
                total = 0.
                for step in range(n):
                    start = time.process_time()            # of all threads: the timer's flushes are in it
                    log.row("steps", **{c: step for c in columns})
                    total += time.process_time() - start
                    time.sleep(.002)
                start = time.process_time()
                log.flush()
                total += time.process_time() - start
            spent[name] = total/n
    return spent


def metrics():
    "Seconds for counting a batch of 8 x 512 x 512 labels of 12 classes, 5 % of them ignored."
    import torch
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex, MulticlassPrecision, MulticlassRecall

    from geovision.train.metrics import Confusion
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    shape = 8, 512, 512
    target, pred = torch.randint(0, 12, shape), torch.randint(0, 12, shape)
    target[torch.rand(shape) < .05] = 255
    kinds = MulticlassJaccardIndex, MulticlassF1Score, MulticlassPrecision, MulticlassRecall, MulticlassAccuracy
    theirs = MetricCollection([kind(12, average="none", ignore_index=255) for kind in kinds])
    ours, spent = Confusion(12, 255), {"ours": [], "theirs": [], "forward": []}
    jobs = {"ours": lambda: ours.update(pred, target), "theirs": lambda: theirs.update(pred, target), "forward": lambda: theirs(pred, target)}
    for turn in range(8):
        for name, do in jobs.items():
            start = time.perf_counter()
            do()
            if turn > 1: spent[name].append(time.perf_counter() - start)      # the collection finds its groups in the first turn
    return {name: statistics.median(v) for name, v in spent.items()}


WRITER = '''
import fcntl, sys, time
from pathlib import Path
from geovision.train.log import Log
folder = Path(sys.argv[1]); folder.mkdir()
(folder/"config.yaml").write_text("optimise: {epochs: 1}")
lock = open(folder/".lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
with Log(folder/"metrics.h5", {"steps": ["step", "epoch", "loss", "lr", "per_second", "total", "time"], "epochs": ["epoch", "step"]}, seconds=float(sys.argv[2])) as log:
    print("begun", flush=True)
    for step in range(1, 10**6):
        log.row("steps", step=step, epoch=1, loss=1/step, lr=.1, per_second=40, total=1000, time=time.time())
        time.sleep(.05)
'''


def seen_after(seconds=15):
    "The longest time between a step and the screen of `geovision watch` that shows it or a later one."
    import pexpect

    from geovision.train.config import LogWords
    from geovision.train.log import read_log
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)/"run"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, folder, str(LogWords().flush_seconds)], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        screen = pexpect.spawn(str(Path(sys.executable).with_name("geovision")), ["watch", str(folder)], dimensions=(30, 120), encoding="utf-8", timeout=30)
        shown, stop = [], None
        while stop is None or time.time() < stop:
            screen.expect(r"step ([0-9,]+) of")
            stop = stop or time.time() + seconds
            step = int(screen.match[1].replace(",", ""))
            if not shown or step > shown[-1][0]: shown.append((step, time.time()))
        screen.send("q")
        screen.expect(pexpect.EOF)
        writer.kill(), writer.wait()
        made = read_log(folder/"metrics.h5", "steps").set_index("step")["time"]
    return max(at - made[before + 1] for (before, _), (_, at) in zip(shown, shown[1:])), len(shown)


def start_up(*words, runs=5):
    "Seconds until a command has answered."
    spent = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("geovision"), *words], capture_output=True, check=True)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def main(folder, runs):
    found = {job: fresh(__file__, folder, "--job", job) for job in JOBS}
    for job, row in found.items():
        if "error" in row: sys.exit(f"  {job} failed: {row['error']}")
    loop, rows, counts = (found[job]["found"] for job in JOBS)
    print("\nB9  a step of a U-Net (MobileNetV3 small, 8 x 96 x 96): median of 12 turns of 5 steps each")
    for name, seconds in loop.items(): print(f"  {name:16} {seconds*1e3:7.2f} ms   {seconds/loop['bare']:.3f} of bare")
    print("\nB8  logging at every step, 11 numbers a row")
    for name, seconds in rows.items(): print(f"  {name:16} {seconds*1e6:7.1f} µs a step   {seconds/loop['bare']:.2%} of that step")
    print("\nB8  metrics of a batch, 8 x 512 x 512 labels, 12 classes, 5 % ignored")
    for name, seconds in counts.items(): print(f"  {name:16} {seconds*1e3:7.1f} ms   {8*512**2/1e6/seconds:6.1f} MPix/s   {seconds/counts['ours']:.1f} x ours")
    slowest, screens = seen_after()
    print(f"\n    watch shows a step after {slowest:.2f} s at the latest ({screens} screens)")
    for words in (("run", "--help"), ("watch", "--help")): print(f"    geovision {' '.join(words)}: {start_up(*words, runs=runs):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", choices=JOBS)
    said = parser.parse_args()
    sys.exit(timed(globals()[said.job]) if said.job else main(said.folder, said.runs))
