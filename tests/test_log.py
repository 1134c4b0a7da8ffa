"""What a log promises: a killed writer loses nothing that was flushed, everybody's warnings arrive, and somebody may watch."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from geovision.train.log import Log, read_log, reopen
from geovision.train.state import last_words, state_of

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def python(program, *words, timeout=120, **options):
    "Run a few lines in a fresh process."
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, env=ENV, timeout=timeout, **options)


KILLS = '''
import json, os, random, signal, sys, time
from pathlib import Path
from geovision.train.log import Log, read_log, reopen

def write(path, pipe, seed):
    "Rows whose last number tells whether they are whole; every flush is reported after it is done."
    rng = random.Random(seed)
    with Log(path, {"steps": ["step", "square", "sum"], "other": ["step"]}, seconds=rng.choice([.001, .01, 1.]), most=rng.choice([1, 7, 300])) as log:
        for i in range(10**7):
            log.row("steps", step=i, square=i*i, sum=i + i*i)
            if i % 50 == 0: log.row("other", step=i)
            if rng.random() < .05:
                log.flush()
                os.write(pipe, i.to_bytes(8, "little"))

def told(pipe):
    "The last row that the writer said was flushed."
    said = b""
    while part := os.read(pipe, 1 << 16): said += part
    return int.from_bytes(said[len(said)//8*8 - 8:len(said)//8*8], "little") if len(said) >= 8 else -1

found = []
for kill in range(int(sys.argv[2])):
    path, (mine, its) = Path(sys.argv[1])/f"{kill}.h5", os.pipe()
    pid = os.fork()
    if not pid: os.close(mine); write(path, its, kill); os._exit(0)
    os.close(its)
    while not path.exists(): time.sleep(.0005)
    first = os.read(mine, 8)
    time.sleep(random.Random(1000 + kill).expovariate(40))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = max(told(mine), int.from_bytes(first, "little"))
    os.close(mine)
    rows = read_log(path, "steps")
    whole = bool((rows["step"] == range(len(rows))).all() and (rows["sum"] == rows["step"] + rows["step"]**2).all() and (rows["square"] == rows["step"]**2).all())
    with reopen(path) as log: log.row("steps", step=-1)
    again = read_log(path, "steps")
    found.append([said + 1, len(rows), whole, len(again) - len(rows), bool(again["step"].iloc[:-1].equals(rows["step"])), len(read_log(path, "other"))])
print(json.dumps([found, "torch" in sys.modules]))
'''


def test_fifty_killed_writers_lose_no_flushed_row(tmp_path):
    "A writer process each, killed by SIGKILL at a random moment; another process reads, checks every number, and goes on."
    ran = python(KILLS, tmp_path, 50)
    assert ran.returncode == 0, ran.stderr
    found, heavy = json.loads(ran.stdout)
    assert len(found) == 50 and not heavy
    assert len({rows for _, rows, *_ in found}) > 25                       # the moments differed
    for said, rows, whole, more, same, other in found:
        assert rows >= said and whole and more == 1 and same and other >= (said + 49)//50


READER = '''
import sys, time
from geovision.train.log import read_log
before = 0
while before < int(sys.argv[2]):
    rows = read_log(sys.argv[1], "steps")
    assert len(rows) >= before and (rows["step"] == range(len(rows))).all() and (rows["square"] == rows["step"]**2).all()
    before = len(rows)
print(before)
'''


def test_readers_never_see_half_a_row(tmp_path):
    with Log(tmp_path/"a.h5", {"steps": ["step", "square"]}, seconds=.002) as log:
        readers = [subprocess.Popen([sys.executable, "-c", READER, tmp_path/"a.h5", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) for _ in range(2)]
        step = 0
        while any(r.poll() is None for r in readers) and step < 10**6:
            log.row("steps", step=step, square=step*step)
            step += 1
        for reader in readers:
            out, err = reader.communicate(timeout=60)
            assert reader.returncode == 0 and int(out) >= 2000, err


def test_a_second_writer_is_refused(tmp_path):
    with Log(tmp_path/"a.h5", {"t": ["x"]}) as log:
        ran = python("import sys; from geovision.train.log import Log; Log(sys.argv[1])", tmp_path/"a.h5")
        assert ran.returncode and "cannot open" in ran.stderr
        log.row("t", x=1)
    assert read_log(tmp_path/"a.h5", "t")["x"].tolist() == [1.]


class Broken:
    "A sink on a disk that is full."
    def begin(self, table, columns, rows): pass
    def rows(self, table, columns, rows): raise OSError(28, "No space left on device")
    def close(self): self.closed = True


def test_trouble_in_the_timer_is_said_at_the_next_row(tmp_path):
    broken = Broken()
    log = Log(tmp_path/"a.h5", {"t": ["x"]}, seconds=.01, sinks=[broken])
    log.row("t", x=1)
    log.timer.join()
    with pytest.raises(OSError, match="No space left"): log.row("t", x=2)
    with pytest.raises(OSError, match="No space left"): log.close()
    assert broken.closed and read_log(tmp_path/"a.h5", "t")["x"].tolist() == [1., 2.]      # the file itself lost nothing


def test_a_fork_in_the_middle_of_a_flush_is_safe(tmp_path):
    "Workers are forked while the timer may be writing; they can use HDF5, and the writer goes on."
    program = '''
import os, sys
from geovision.train.log import Log, read_log
with Log(sys.argv[1], {"t": ["x"]}, seconds=.0005) as log:
    for i in range(200):
        log.row("t", x=i)
        pid = os.fork()
        if not pid: os._exit(0 if len(read_log(sys.argv[2], "t")) == 1 else 1)
        assert os.waitpid(pid, 0)[1] == 0
print(len(read_log(sys.argv[1], "t")))
'''
    with Log(tmp_path/"other.h5", {"t": ["x"]}) as other: other.row("t", x=1)
    ran = python(program, tmp_path/"a.h5", tmp_path/"other.h5")
    assert ran.stdout.strip() == "200", ran.stderr


def test_reopening_keeps_what_the_checkpoint_knows(tmp_path):
    with Log(tmp_path/"a.h5", {"t": ["x"], "u": ["y"]}) as log:
        for i in range(600): log.row("t", x=i)
        log.row("u", y=1)
    with reopen(tmp_path/"a.h5", keep={"t": 300}, seconds=5.) as log: log.row("t", x=-1)
    assert read_log(tmp_path/"a.h5", "t")["x"].tolist() == [*range(300), -1] and not len(read_log(tmp_path/"a.h5", "u"))


SPEAKS = '''
import logging, sys, warnings
import torch; torch.set_num_threads(1)
from geovision.train.fit import fit
from geovision.train.generated import Generated

class Talkative(Generated):
    "Its readers warn in three ways, and so does the thread that trains."
    def __getitem__(self, i):
        warnings.warn(f"sample {i} has a stripe")
        logging.getLogger("rasterio._env").warning("tag 42 of %d is unknown", i)
        return super().__getitem__(i)
    def take(self, p):
        import numpy as np
        return Talkative(self.n, self.size, self.seed, self.kind, self.positions[np.asarray(p, int)])

class Loss:
    calls = 0
    def __call__(self, logits, target, valid=None, ignore=None):
        logging.getLogger("timm").error("from the loss")
        Loss.calls += 1
        if Loss.calls > 4: raise RuntimeError("the loss gave up")
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=255, reduction="sum"), (target != 255).sum()

config = {"name": "talk", "model": {"name": "linknet", "encoder": "tu-mobilenetv3_small_050"}, "data": {"batch_size": 4, "workers": int(sys.argv[3])},
          "optimise": {"epochs": 1}, "log": {"every": 1}}
fit(config, Talkative(), root=sys.argv[1], device="cpu", **({"loss": Loss()} if sys.argv[2] != "quiet" else {}))
'''


def test_words_of_every_rank_and_worker_reach_the_log_and_no_terminal(tmp_path):
    (tmp_path/"speaks.py").write_text(SPEAKS)
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path/"speaks.py", tmp_path, "quiet", "1"],
                         capture_output=True, text=True, env={**ENV, "GEOVISION_QUIET": "1"}, timeout=110)
    assert ran.returncode == 0, ran.stderr
    log = (tmp_path/"talk/log.txt").read_text()
    for who in ("rank 0 worker 0", "rank 1 worker 0"):
        assert f"{who} WARNING rasterio._env: tag 42 of " in log and f"{who} WARNING {tmp_path}/speaks.py:" in log and "UserWarning: sample " in log, log
    assert "stripe" not in ran.stdout + ran.stderr and "tag 42" not in ran.stdout + ran.stderr
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank ", line) for line in log.splitlines()), log     # no torn line, no traceback


def test_an_error_leaves_its_traceback_and_verbose_shows_warnings(tmp_path):
    (tmp_path/"speaks.py").write_text(SPEAKS)
    ran = subprocess.run([sys.executable, tmp_path/"speaks.py", tmp_path, "fail", "0"], capture_output=True, text=True, timeout=110,
                         env={**ENV, "GEOVISION_QUIET": "1", "GEOVISION_VERBOSE": "1"})
    log = (tmp_path/"talk/log.txt").read_text()
    assert ran.returncode == 1 and "RuntimeError: the loss gave up" in log and "Traceback" in log and "rank 0 ERROR timm: from the loss" in log
    assert "stripe" in ran.stderr and "stripe" in log
    assert (state_of(tmp_path/"talk"), last_words(tmp_path/"talk")) == ("crashed", ("RuntimeError", "RuntimeError: the loss gave up"))


WRITER = '''
import fcntl, sys, time
from pathlib import Path
from geovision.train.log import Log
folder = Path(sys.argv[1]); folder.mkdir()
(folder/"config.yaml").write_text("optimise: {epochs: 1}")
lock = open(folder/".lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
tables = {"steps": ["step", "epoch", "loss", "lr", "samples", "per_second", "total", "time"], "epochs": ["epoch", "step", "val/loss", "val/iou/mean"]}
with Log(folder/"metrics.h5", tables, seconds=1.) as log:
    print("begun", flush=True)
    for step in range(1, 10**6):
        log.row("steps", step=step, epoch=1, loss=1/step, lr=.1, samples=4, per_second=40, total=1000, time=time.time())
        if step == int(sys.argv[2]): break
        time.sleep(.02)
    log.row("epochs", epoch=1, step=step, **{"val/loss": .5, "val/iou/mean": .25})
    log.flush()
    if len(sys.argv) > 3: (folder/"finished.json").write_text("{}")
    else: time.sleep(100)
'''


@pytest.fixture
def running(tmp_path):
    "Starts writers of run folders, and ends those that are left."
    started = []

    def start(name, *words):
        started.append(subprocess.Popen([sys.executable, "-c", WRITER, tmp_path/name, *map(str, words)], stdout=subprocess.PIPE, text=True, env=ENV))
        assert started[-1].stdout.readline() == "begun\n"
        return started[-1]
    yield start
    for one in started: one.kill(), one.wait()


def terminal(*words, size=(30, 110)):
    return pexpect.spawn(str(Path(sys.executable).with_name("geovision")), [str(w) for w in words], dimensions=size, encoding="utf-8", timeout=30,
                         env={**ENV, "TERM": "xterm-256color"})


def test_watch_in_a_terminal_shows_new_steps_until_q(tmp_path, running):
    one, _ = running("town", 100_000), running("village", 3)
    seen = terminal("watch", tmp_path/"town", tmp_path/"village")
    seen.expect("town .*is going on.*step [0-9]+ of 1,000")
    first = int(re.search(r"step ([0-9]+) of", seen.after)[1])
    for _ in range(100):
        seen.expect(r"step ([0-9]+) of 1,000")
        if int(seen.match[1]) > first + 60: break
    assert int(seen.match[1]) > first + 60 and any("\u2801" <= c <= "\u28ff" for c in seen.before)
    seen.send("q")
    seen.expect(pexpect.EOF)
    seen.close()
    assert seen.exitstatus == 0 and "village" in seen.before and "val/iou/mean" in seen.before and one.poll() is None


def test_watch_ends_when_the_run_is_finished_and_says_so(tmp_path, running):
    running("town", 400, "finish")
    seen = terminal("watch", tmp_path/"town")
    seen.expect("is going on")
    seen.expect("town .*is finished")
    seen.expect(pexpect.EOF)
    seen.close()
    assert seen.exitstatus == 0


def test_watch_sees_a_crash(tmp_path, running):
    writer = running("town", 100_000)
    seen = terminal("watch", tmp_path/"town")
    seen.expect("is going on")
    writer.kill(), writer.wait()
    seen.expect("did not end well.*it was killed")
    seen.expect(pexpect.EOF)
    seen.close()
    assert seen.exitstatus == 0 and len(read_log(tmp_path/"town/metrics.h5", "steps"))


def test_watch_gives_the_terminal_back(tmp_path, running):
    "After q and after Ctrl-C a shell has its echo and its lines again."
    running("town", 100_000)
    for stop in ("q", "\x03"):
        line = f"trap : INT; {Path(sys.executable).with_name('geovision')} watch {tmp_path/'town'}; stty -a; echo over"
        shell = pexpect.spawn("/bin/sh", ["-c", line], dimensions=(30, 100), encoding="utf-8", timeout=30, env={**ENV, "TERM": "xterm"})
        shell.expect("is going on")
        shell.send(stop)
        shell.expect("over")
        assert " icanon" in shell.before and " echo " in shell.before
        shell.close()


def test_watching_needs_no_torch():
    lines = python("import sys, geovision.train.watch; print([m for m in ('torch', 'matplotlib', 'geopandas') if m in sys.modules])")
    assert lines.stdout.strip() == "[]", lines.stderr
