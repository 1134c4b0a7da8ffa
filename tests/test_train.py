"""The training room as a whole: resume to the bit, exact counts, and configs that must not run."""
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from geovision.core.errors import BadFile, BadValue, DataError, GeoVisionError, NotFound
from geovision.models.losses import ce, ce_dice, dice, focal
from geovision.train.config import load_config
from geovision.train.fit import evaluate, fit
from geovision.train.generated import Generated
from geovision.train.metrics import Calibration, Confusion
from geovision.train.run import Run
from geovision.train.tally import Owner

os.environ["GEOVISION_QUIET"] = "1"
NET = {"name": "linknet", "encoder": "tu-mobilenetv3_small_050"}
SMALL = {"model": NET, "data": {"batch_size": 5, "augment": ["hflip", "rot90", {"name": "jitter", "brightness": 0.2}]},
         "optimise": {"epochs": 3}, "log": {"every": 1}}

KILLER = textwrap.dedent("""
    import json, os, signal, sys
    import torch; torch.set_num_threads(1)
    from geovision.train import fit
    from geovision.train.generated import Generated
    where, after = sys.argv[3], int(sys.argv[4])
    def deadly(original, calls=[0]):
        def call(*args, **words):
            calls[0] += 1
            if calls[0] == after: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **words)
        return call
    setattr(fit, where, deadly(getattr(fit, where)))
    fit.fit(json.loads(sys.argv[1]), Generated(), root=sys.argv[2], device="cpu")
    """)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a:Run, b:Run):
    for name in ("best.safetensors", f"last-{a.epochs:04d}.safetensors"):
        left, right = (load_file(r.path/"checkpoints"/name) for r in (a, b))
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    tables = [r.metrics.query("metric not in ('seconds', 'per_second', 'memory_mb')").drop(columns="split").to_json() for r in (a, b)]
    assert tables[0] == tables[1]
    steps = [r.steps.drop(columns=["seconds", "per_second", "memory_mb", "time"]).to_json() for r in (a, b)]
    assert steps[0] == steps[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return {kind: fit({"name": kind, **SMALL, "optimise": {"epochs": 3, **words}}, Generated(), root=tmp_path_factory.mktemp("runs"), device="cpu")
            for kind, words in {"plain": {}, "swa": {"average": {"kind": "swa", "start": 0.3}}}.items()}


@pytest.mark.parametrize("kind,where,after,epochs", [
    ("plain", "check_loss", 2, 0),          # in the middle of the first epoch: nothing was saved yet
    ("plain", "keep_best", 2, 1),           # the row is logged, the checkpoint is not
    ("swa", "save_checkpoint", 3, 2),       # best is newer than last
])
def test_a_killed_run_ends_the_same(tmp_path, whole, kind, where, after, epochs):
    config = {"name": kind, **SMALL, "optimise": {"epochs": 3, **({"average": {"kind": "swa", "start": 0.3}} if kind == "swa" else {})}}
    done = subprocess.run([sys.executable, "-c", KILLER, json.dumps(config), str(tmp_path), where, str(after)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    state = torch.load(tmp_path/kind/"checkpoints/last.pt", weights_only=True)["epoch"] if epochs else 0
    assert state == epochs
    same(fit(config, Generated(), root=tmp_path, device="cpu", resume=True), whole[kind])


def test_ctrl_c_leaves_a_run_to_go_on_with(tmp_path, whole):
    class Stop(Generated):
        reads = 0

        def __getitem__(self, i):
            Stop.reads += 1
            if Stop.reads == 80: raise KeyboardInterrupt
            return super().__getitem__(i)

        def take(self, p): return Stop(self.n, self.size, self.seed, self.kind, self.positions[np.asarray(p, int)])

    config = {"name": "plain", **SMALL}
    with pytest.raises(KeyboardInterrupt): fit(config, Stop(), root=tmp_path, device="cpu")
    assert "go on with resume=True" in (tmp_path/"plain/log.txt").read_text()
    same(fit(config, Generated(), root=tmp_path, device="cpu", resume=True), whole["plain"])


def test_workers_change_nothing(tmp_path, whole):
    config = {"name": "plain", **SMALL, "data": {**SMALL["data"], "workers": 2}}
    same(fit(config, Generated(), root=tmp_path, device="cpu"), whole["plain"])


def test_evaluate_measures_the_logged_best(whole):
    run = whole["swa"]
    again = evaluate(run, "val", Generated(), device="cpu").query("metric == 'iou' and `class` == 'mean'").value.item()
    assert again == run.metrics.query("split == 'val' and metric == 'iou' and `class` == 'mean'").value.max()


def test_a_loss_that_explodes_is_named(tmp_path):
    class Poison(Generated):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            if sample["id"] == "g3": sample["image"][:] = 1e38
            return sample

        def take(self, p): return Poison(self.n, self.size, self.seed, self.kind, self.positions[np.asarray(p, int)])

        @property
        def stats(self): return Generated().stats

    with pytest.raises(GeoVisionError, match=r"the loss became .*g3"): fit({"name": "x", "model": NET, "data": {"batch_size": 5}}, Poison(), root=tmp_path)
    assert "the loss became" in (tmp_path/"x/log.txt").read_text()


@pytest.mark.parametrize("words,says", [
    (["optimise.learning=1"], "unknown key optimise.learning"),
    (["optimise.epoch=1"], "Did you mean optimise.epochs"),
    (["epochs=1"], "Did you mean optimise.epochs"),
    (["batchsize=4"], "Did you mean data.batch_size"),
    (["optimise.epochs=0"], "greater than or equal to 1"),
    (["optimise.epochs='5'"], "valid integer"),
    (["optimise.lr=true"], "valid number"),
    (["optimise.clip=0"], "greater than 0"),
    (["optimise.average={kind: swa, start: 1.0}"], "less than 1"),
    (["optimise.average={kind: lookahead}"], "'swa' or 'ema'"),
    (["data.splits={how: blocks}"], "'block'"),
    (["data={dataset: ramp, from_files: {images: x}}"], "not both"),
    (["name=a/b"], "name cannot be"),
    (["name="], "name cannot be"),
    (["log.every=0"], "greater than or equal to 1"),
    (["model=3"], "model"),
    (["nonsense"], "key=value"),
])
def test_configs_that_cannot_be(words, says):
    with pytest.raises(BadValue) as e: load_config({}, words)
    assert says.lower() in str(e.value).lower()
    assert "\n" not in str(e.value) and e.value.exit_code == 2


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.system ['touch /tmp/owned']", "\x00"])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path/"c.yaml"
    path.write_text(text)
    with pytest.raises(BadFile): load_config(path)


@pytest.mark.parametrize("words", [
    {"model": {"name": "unett"}}, {"model": {"encoder": "resnet1"}}, {"model": {"name": "pooled"}}, {"model": {"name": "unet", "depht": 3}},
    {"model": {"norm": "inplace"}}, {"model": {"weights": "nowhere.safetensors"}}, {"loss": "none"}, {"loss": {"name": "ce", "weight": [1.0]}},
    {"metrics": ["iuo"]}, {"metrics": ["r2"]}, {"data": {"augment": ["flip"]}}, {"data": {"crop": 640}}, {"data": {"dataset": "atlantis"}},
    {"optimise": {"precision": "fp8"}}, {"optimise": {"schedule": "step"}}, {"log": {"sinks": ["excel"]}}, {"log": {"save_every": 0}},
])
def test_jobs_that_cannot_be_leave_nothing(tmp_path, words):
    dataset = None if "dataset" in words.get("data", {}) else Generated()
    with pytest.raises(GeoVisionError) as e: fit({"name": "x", "data": {"batch_size": 5}, **words}, dataset, root=tmp_path/"runs", device="cpu")
    assert not (tmp_path/"runs").exists()
    assert "\n" not in str(e.value)


def test_folders_that_are_no_run(tmp_path):
    (tmp_path/"notes").mkdir()
    (tmp_path/"notes/mine.txt").write_text("mine")
    with pytest.raises(NotFound): Run(tmp_path/"notes")
    with pytest.raises(BadValue, match="holds no run"): fit({"name": "notes", **SMALL}, Generated(), root=tmp_path, reset=True)
    assert (tmp_path/"notes/mine.txt").read_text() == "mine"
    with pytest.raises(DataError, match="labels hold 7"): Confusion(2).update(torch.zeros(1), torch.full((1,), 7))


labels = st.integers(1, 5).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.tuples(st.integers(0, k - 1), st.integers(-1, k - 1)), max_size=60)))


@settings(max_examples=40, deadline=None)
@given(labels, st.randoms())
def test_counts_are_exact_in_any_order(drawn, random):
    classes, pairs = drawn
    state, parts = Confusion(classes, ignore=-1), list(pairs)
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    for piece in (parts[:cut], parts[cut:]):
        state = state + Confusion(classes, ignore=-1).update(torch.tensor([p for p, _ in piece], dtype=torch.long), torch.tensor([t for _, t in piece], dtype=torch.long))
    by_hand = np.zeros((classes, classes), int)
    for p, t in pairs:
        if t >= 0: by_hand[t, p] += 1
    assert (state.matrix == by_hand).all()
    for c in range(classes):
        both, either = by_hand[c, c], by_hand[c].sum() + by_hand[:, c].sum() - by_hand[c, c]
        assert np.isnan(state.iou[c]) if either == 0 else state.iou[c] == both/either


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)), max_size=8))
def test_an_owner_counts_every_pixel_once(height, width, windows):
    owner, seen = Owner(), np.zeros((80, 80), int)
    for x, y, w, h in [*windows, (0, 0, width, height)]: seen[y:y+h, x:x+w] += owner.claim("a", x, y, (h, w))
    assert set(np.unique(seen)) <= {0, 1} and seen[:height, :width].all()


def test_calibration_adds_up_exactly():
    torch.manual_seed(0)
    p, t = torch.randn(1000, 4).softmax(1), torch.randint(4, (1000,))
    order = torch.randperm(1000)
    one = Calibration().update(p, t)
    many = sum((Calibration().update(p[order[i:i+37]], t[order[i:i+37]]) for i in range(0, 1000, 37)), Calibration())
    assert torch.equal(one.counts, many.counts)


@pytest.mark.parametrize("loss", [ce, focal, dice, ce_dice])
def test_losses_do_not_see_what_does_not_count(loss):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(3, (2, 8, 8))
    valid = torch.rand(2, 8, 8) > 0.3
    masked = torch.where(torch.rand(2, 8, 8) > 0.3, target, 255)
    total, count = loss(logits, masked, valid, 255)
    (total/count).backward()
    keep = valid & (masked != 255)
    assert count == keep.sum() and logits.grad[~keep[:, None].expand_as(logits)].abs().max() == 0
    other = torch.where(keep[:, None], logits.detach(), torch.randn(2, 3, 8, 8)*50)
    assert torch.allclose(loss(other, masked, valid, 255)[0], total.detach(), rtol=1e-5)


def test_workers_change_nothing_but_the_time():
    from geovision.train.feed import Visits, batches
    data = Generated(10)
    alone, helped = ([b["image"] for b in batches(Visits(data, range(6), "mask"), 3, workers=w)] for w in (0, 2))
    assert len(alone) == len(helped) == 2 and all(torch.equal(a, b) for a, b in zip(alone, helped))


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_leads_to_the_same_end(tmp_path, whole):
    config = {"name": "plain", **SMALL, "optimise": {"epochs": 3}}
    done = subprocess.run([sys.executable, "-c", KILLER, json.dumps(config), str(tmp_path), "save_checkpoint", "3"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = tmp_path/"plain/checkpoints/last.pt"
    assert done.returncode == -signal.SIGKILL and last.exists()
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(BadFile, match="--resume-previous") as e: fit(config, Generated(), root=tmp_path, device="cpu", resume=True)
    assert "\n" not in str(e.value)
    same(fit(config, Generated(), root=tmp_path, device="cpu", resume="previous"), whole["plain"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_foreign_checkpoints_are_refused_in_a_sentence(tmp_path, content):
    config = {"name": "one", **SMALL, "optimise": {"epochs": 1}}
    fit(config, Generated(), root=tmp_path, device="cpu")
    (tmp_path/"one/checkpoints/last.pt").write_bytes(content)
    with pytest.raises(BadFile, match="cannot be read") as e: fit(config, Generated(), root=tmp_path, device="cpu", resume=True)
    assert "\n" not in str(e.value)


def test_a_run_in_use_is_left_alone(tmp_path):
    from geovision.train.folder import locked
    config = {"name": "busy", **SMALL, "optimise": {"epochs": 1}}
    with locked(tmp_path/"busy"), pytest.raises(BadValue, match=f"in use: process {os.getpid()}"): fit(config, Generated(), root=tmp_path, device="cpu")
    run = fit(config, Generated(), root=tmp_path, device="cpu")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    for how in ({"resume": True}, {"reset": True}):
        with locked(run.path), pytest.raises(BadValue, match="in use"): fit(config, Generated(), root=tmp_path, device="cpu", **how)
    assert all(p.read_bytes() == b for p, b in before.items())


FULL = textwrap.dedent("""
    import json, resource, sys
    import torch; torch.set_num_threads(1)
    from geovision.core.errors import NoSpace
    from geovision.train import fit as room
    from geovision.train.generated import Generated
    original, calls = room.save_checkpoint, []
    def late(*args, **words):
        calls.append(1)
        if len(calls) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))       # from now on no file may grow beyond that
        return original(*args, **words)
    room.save_checkpoint = late
    try: room.fit(json.loads(sys.argv[1]), Generated(), root=sys.argv[2], device="cpu")
    except NoSpace as e: print(e); sys.exit(7)
    """)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, whole):
    config = {"name": "plain", **SMALL, "optimise": {"epochs": 3}}
    done = subprocess.run([sys.executable, "-c", FULL, json.dumps(config), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 7 and "no space left" in done.stdout, done.stderr[-800:]
    assert torch.load(tmp_path/"plain/checkpoints/last.pt", weights_only=True)["epoch"] == 1
    assert not list((tmp_path/"plain").rglob("*.tmp*"))
    same(fit(config, Generated(), root=tmp_path, device="cpu", resume=True), whole["plain"])


def test_early_stopping_counts_epochs_without_a_better_score(tmp_path):
    run = fit({"name": "x", **SMALL, "optimise": {"epochs": 40, "early_stop": 2}}, Generated(), root=tmp_path, device="cpu")
    scores = run.metrics.query("split == 'val' and metric == 'iou' and `class` == 'mean'").value.tolist()
    assert 3 <= len(scores) < 40 and max(scores[-2:]) <= max(scores[:-2]) and "stopped early" in (run.path/"log.txt").read_text()


def test_half_precision_trains(tmp_path):
    run = fit({"name": "x", **SMALL, "optimise": {"epochs": 2, "precision": "fp16"}}, Generated(), root=tmp_path, device="cpu")
    loss = run.metrics.query("split == 'train' and metric == 'loss'").value
    assert loss.notna().all() and loss.iloc[-1] < loss.iloc[0]
    assert torch.load(run.path/"checkpoints/last.pt", weights_only=True)["scaler"]["scale"] > 1
