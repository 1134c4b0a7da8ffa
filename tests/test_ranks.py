"""Several processes for real (torchrun, gloo): the same counts, the same training, the same errors as in one."""
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from geovision.train.run import Run

WORLDS = (1, 2, 3)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GEOVISION_QUIET": "1"}

COUNTS = textwrap.dedent("""
    import json, sys
    from contextlib import nullcontext
    import numpy as np, pandas as pd, torch
    from torch import nn
    torch.set_num_threads(1)
    from geovision.geo.window import Box
    from geovision.models.losses import ce
    from geovision.train.feed import Visits, batches
    from geovision.train.generated import Generated
    from geovision.train.loop import claims, evaluate
    from geovision.train.ranks import joined
    from geovision.train.steps import make_step
    from geovision.train.tally import Tally

    class Windows:
        "Half-overlapping windows of two images, as a tiled dataset has them."
        images = Generated(2)
        rows = pd.DataFrame({"_row": [i for i in range(2) for _ in range(9)]})
        boxes = [Box(x, y, 16, 16) for y in (0, 8, 16) for x in (0, 8, 16)]*2
        def __len__(self): return 18
        def box_of(self, i): return self.boxes[i]
        def __getitem__(self, i):
            b = self.boxes[i]
            return {k: v[..., b.y:b.y + b.h, b.x:b.x + b.w] if torch.is_tensor(v) and v.ndim > 1 else v for k, v in self.images[int(self.rows._row[i])].items()}

    class Blind(Generated):
        "All pixels of the even samples are ignored: with two processes one of them has nothing to count."
        def __getitem__(self, i): return {**super().__getitem__(i), **({"mask": torch.full((32, 32), 255)} if i % 2 == 0 else {})}
        def take(self, p): return Blind(self.n, self.size, self.seed, self.kind, self.positions[np.asarray(p, int)])

    torch.manual_seed(0)
    model, step = nn.Conv2d(2, 2, 1), make_step("segmentation", ce, 255)
    def judge(ds, us):
        visits = Visits(ds, range(len(ds)), "mask")
        tally = Tally("segmentation", ("noise", "square"), ("iou", "ece"), 255)
        loss, tally = evaluate(model, batches(visits, 3, positions=range(us.rank, len(ds), us.world)), step, tally, nullcontext(), claims(ds))
        return [loss, tally.states["labels"].matrix.tolist(), tally.states["confidence"].counts.tolist()]
    with joined() as us:
        found = {str(n): judge(Generated(n), us) for n in (1, 2, 7, 10)} | {"windows": judge(Windows(), us), "blind": judge(Blind(6), us)}
    open(f"{sys.argv[1]}/{us.world}-{us.rank}.json", "w").write(json.dumps(found))
    """)

FIT = textwrap.dedent("""
    import json, os, sys, signal
    import torch; torch.set_num_threads(1)
    from torch import nn
    from geovision.core.registry import register
    from geovision.train import fit as room
    from geovision.train.generated import Generated
    @register("model")
    def no_norm(encoder=None, bands=3, classes=2, pretrained=False, drop=0.):
        return nn.Sequential(nn.Conv2d(bands, 8, 3, padding=1), nn.ReLU(), nn.Dropout(drop), nn.Conv2d(8, classes, 3, padding=1))
    config, root, die = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if die:
        original, calls = room.check_loss, []
        def deadly(*args):
            calls.append(1)
            if len(calls) == die: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)
        room.check_loss = deadly
    room.fit(config, Generated(), root=root, device="cpu", resume=True)
    """)


def torchrun(world, path, *words, **how):
    "Run a program in several processes."
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else [sys.executable]
    return subprocess.run([*head, str(path), *map(str, words)], env=ENV, capture_output=True, text=True, timeout=240, **how)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    (folder/"p.py").write_text(COUNTS)
    for world in WORLDS: assert (done := torchrun(world, folder/"p.py", folder)).returncode == 0, done.stderr[-2000:]
    return {(w, r): json.loads((folder/f"{w}-{r}.json").read_text()) for w in WORLDS for r in range(w)}


@pytest.mark.parametrize("what", ["1", "2", "7", "10", "windows", "blind"])
def test_counts_do_not_depend_on_the_number_of_processes(counted, what):
    alone = counted[1, 0][what]
    pixels = {"windows": 2*32*32, "blind": 3*32*32}.get(what) or int(what)*32*32
    assert sum(map(sum, alone[1])) == pixels
    for (world, rank), found in counted.items():
        assert found[what][1:] == alone[1:], (world, rank)
        assert found[what][0] == pytest.approx(alone[0], rel=1e-6)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit")/"p.py"
    path.write_text(FIT)
    return path


def trained(program, root, world, name, words=None, die=0):
    config = {"name": name, "model": {"name": "no_norm"}, "loss": "ce", "data": {"batch_size": 4, "augment": ["hflip"]}, "log": {"every": 1, "save_every": 2},
              "optimise": {"epochs": 3, "accumulate": 2, **(words or {})}}
    if words and "drop" in words: config["model"]["drop"] = config["optimise"].pop("drop")
    done = torchrun(world, program, json.dumps(config), root, die)
    assert die or done.returncode == 0, done.stderr[-2000:]
    return root/name


def weights(folder): return load_file(folder/"checkpoints/last-0003.safetensors")


@pytest.mark.parametrize("words", [{}, {"average": {"kind": "ema", "decay": .9}}], ids=["plain", "ema"])
def test_two_processes_train_what_one_trains(program, tmp_path, words):
    one, two = (trained(program, tmp_path, w, f"w{w}", words) for w in (1, 2))
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    left, right = Run(one), Run(two)
    assert len(left.steps) == len(right.steps) and right.steps.loss.tolist() == pytest.approx(left.steps.loss.tolist(), rel=1e-4)
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in two.rglob("*"))       # one process wrote


def test_two_processes_killed_between_checkpoints_end_the_same(program, tmp_path):
    whole = trained(program, tmp_path, 2, "whole", {"drop": .2, "accumulate": 1})
    trained(program, tmp_path, 2, "killed", {"drop": .2, "accumulate": 1}, die=6)
    state = torch.load(tmp_path/"killed/checkpoints/last.pt", weights_only=True)
    assert state["done"] > 0 and len(state["random"]) == 2                                        # in the middle of an epoch, both generators kept
    again = trained(program, tmp_path, 2, "killed", {"drop": .2, "accumulate": 1})
    a, b = weights(whole), weights(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert Run(whole).steps[["step", "loss", "lr", "gradient"]].equals(Run(again).steps[["step", "loss", "lr", "gradient"]])


def test_more_processes_than_samples_of_a_batch_are_refused_in_a_sentence(program, tmp_path):
    config = {"name": "x", "model": {"name": "no_norm"}, "data": {"batch_size": 1}}
    done = torchrun(2, program, json.dumps(config), tmp_path, 0)
    assert done.returncode != 0 and "2 processes share batches of 1 samples" in done.stderr
