"""Every kind of task goes through the one loop: fitted, judged, kept and built again, on generated data and on small replicas."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index, multiclass_recall

import geovision as gv
from geovision.core.errors import BadValue, DataError, UnknownName
from geovision.data.batch import collate
from geovision.models.objects import objects_from, parts_of
from geovision.train.fit import evaluate, fit
from geovision.train.generated import Generated
from geovision.train.job import learn, prepare
from geovision.train.config import load_config
from geovision.train.metrics import Confusion, Objects, Pictures, mean_of_present
from geovision.train.run import Run
from geovision.train.steps import pick, see

os.environ["GEOVISION_QUIET"] = "1"
SMALL = {"name": "unet", "encoder": "tu-mobilenetv3_small_050", "decoder_channels": [32, 16, 16, 8, 8]}
LABEL = {"name": "pooled", "encoder": "tu-resnet10t"}
CODE = {"name": "bottleneck", "encoder": "tu-mobilenetv3_small_050", "code": 16, "width": 32}


def words(model=SMALL, epochs=4, **others):
    return {"model": model, "data": {"batch_size": 5}, "optimise": {"epochs": epochs}, "log": {"every": 1}} | others


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(run, metric, label=("mean", "all")):
    table = run.metrics.query("split == 'val' and metric == @metric and `class` in @label")
    return table.value.iloc[-1]


# kind of data, words of the config, metric, what it has to reach (None: a few labels say little about unseen ones), is more better?
CASES = {
    "segmentation": (dict(), words(loss={"name": "ce_dice", "weight": "balanced"}), "iou", .45, True),
    "classification": (dict(kind="classification", n=45), words(LABEL, optimise=dict(epochs=10, lr=1e-3)), "loss", None, False),
    "multilabel": (dict(kind="multilabel", n=45), words(LABEL, optimise=dict(epochs=10, lr=1e-3)), "loss", None, False),
    "regression": (dict(kind="regression", n=45), words(LABEL, optimise=dict(epochs=10, lr=1e-3)), "rmse", None, False),
    "instance": (dict(kind="instance"), words(epochs=25, optimise={"epochs": 25, "lr": 1e-2}), "pq", .02, True),
    "change": (dict(kind="change"), words(), "iou", .45, True),
    "concat": (dict(kind="change"), words({**SMALL, "fuse": "concat"}), "iou", .45, True),
    "series": (dict(dates=3), words(), "iou", .45, True),
    "series mean": (dict(dates=3), words({**SMALL, "fuse": "mean"}), "iou", .45, True),
    "reconstruction": (dict(kind="reconstruction"), words(CODE, 8), "psnr", 10., True),
    "masked": (dict(kind="reconstruction"), words(epochs=8, loss={"name": "mse", "hide": .5, "patch": 4}), "psnr", 10., True),
    "image_to_image": (dict(kind="image_to_image"), words(), "psnr", 18., True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_fits_every_task(case, tmp_path):
    data, config, metric, floor, more = CASES[case]
    ds = Generated(**data)
    run = fit({**config, "name": "run"}, ds, root=tmp_path, device="cpu")
    value, loss = last(run, metric), run.steps.loss.to_numpy()
    assert loss[-3:].mean() < .9*loss[:3].mean(), f"the loss went from {loss[:3]} to {loss[-3:]}"
    assert np.isfinite(value) and (floor is None or (value > floor if more else value < floor)), f"{metric} {value}"
    table = evaluate(run, "val", ds, device="cpu")          # the weights that were kept, in a network built from model.json
    assert len(table) and np.isfinite(table.query("metric == 'loss'").value.iloc[0])
    best = run.metrics.query("split == 'val' and metric == 'loss'").value
    assert np.isclose(table.query("metric == 'loss'").value.iloc[0], best, rtol=1e-5).any()
    step = prepare(load_config(config), ds, device="cpu").step
    x = see(collate([pick(ds[0], step)]))
    with torch.inference_mode(): assert torch.isfinite(run.model()(x)).all()


@pytest.mark.parametrize("data, average", [(dict(dates=3), "swa"), (dict(kind="change"), "ema"), (dict(kind="image_to_image"), "swa")])
def test_averages_and_resume_hold_for_other_inputs(data, average, tmp_path):
    config = words(epochs=2, optimise={"epochs": 2, "average": {"kind": average, "start": .4}})
    whole = fit({**config, "name": "whole"}, Generated(**data), root=tmp_path, device="cpu")
    again = fit({**config, "name": "again"}, Generated(**data), root=tmp_path, device="cpu")
    keep = whole.metrics.metric.isin(["loss", "iou", "psnr"])
    assert whole.metrics[keep].value.tolist() == again.metrics[keep].value.tolist()
    assert whole.weights("averaged").exists()


@pytest.mark.parametrize("mix, data, model", [("mixup", dict(kind="classification"), LABEL), ("cutmix", dict(kind="classification"), LABEL),
                                              ("cutmix", dict(), SMALL), ("mixup", dict(kind="regression"), LABEL), ("cutmix", dict(kind="change"), SMALL)])
def test_mixing(mix, data, model, tmp_path):
    config = words(model, 2)
    config["data"] = config["data"] | {"mix": mix}
    runs = [fit({**config, "name": f"r{k}"}, Generated(**data), root=tmp_path, device="cpu") for k in range(2)]
    plain = fit({**words(model, 2), "name": "plain"}, Generated(**data), root=tmp_path, device="cpu")
    losses = [r.steps.loss.tolist() for r in (*runs, plain)]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses[0]).all()


@pytest.mark.parametrize("config, data, error, says", [
    (words(data={"mix": "mixup"}), dict(), BadValue, "mixup does not fit segmentation"),
    (words(data={"mix": "cutmix"}), dict(kind="instance"), BadValue, "cutmix does not fit instance"),
    (words({**SMALL, "fuse": "mean"}), dict(), BadValue, "the samples have one date"),
    (words({**SMALL, "fuse": "difference"}), dict(dates=3), DataError, "between two dates, got 3"),
    (words(loss={"name": "mse", "hide": .5}), dict(kind="regression"), UnknownName, "hide"),
    (words(metrics=["pq"]), dict(), BadValue, "the metric pq does not fit segmentation"),
    (words(metrics=["iou"]), dict(kind="instance"), BadValue, "the metric iou does not fit instance"),
    (words(LABEL), dict(kind="image_to_image"), BadValue, "one answer per image"),
    (words(loss={"name": "mse", "weight": "balanced"}), dict(kind="regression"), UnknownName, "weight"),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(config, data, error, says, tmp_path):
    with pytest.raises(error, match=says): fit({**config, "name": "run"}, Generated(**data), root=tmp_path, device="cpu")
    assert not (tmp_path/"run").exists()


REPLICAS = {
    "pastis_r": (None, words(), "val"),
    "so2sat_pop": (None, words(LABEL), "test"),
    "ai4boundaries": ("instances", words(), "val"),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas(name, tmp_path):
    "Real layouts: a series of crops, a number a picture, fields as objects."
    task, config, split = REPLICAS[name]
    gv.replica(name, tmp_path/"data", size=64)
    ds = gv.open(name, tmp_path/"data", **({} if task is None else {"task": task}))
    run = fit({**config, "name": "run", "optimise": {"epochs": 1}}, ds, root=tmp_path, device="cpu")
    assert np.isfinite(run.steps.loss).all() and run.epochs == 1
    assert np.isfinite(evaluate(run, split, ds, device="cpu").query("metric == 'loss'").value).all()


PROCESS = """
import json, sys
import torch; torch.set_num_threads(1)
from geovision.train.fit import fit
from geovision.train.generated import Generated
fit(json.loads(sys.argv[1]), Generated(**json.loads(sys.argv[2])), root=sys.argv[3], device="cpu")
"""


@pytest.mark.parametrize("case", ["concat", "series", "masked"])
def test_two_processes(case, tmp_path):
    "Every parameter has a gradient in every task, which several processes insist on."
    data, config, metric, *_ = CASES[case]
    config = {**config, "name": "run", "optimise": {"epochs": 1}, "data": {"batch_size": 6}}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", json.dumps(config), json.dumps(data), str(tmp_path)]
    (tmp_path/"script.py").write_text(PROCESS)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.isfinite(last(Run(tmp_path/"run"), metric))


def test_before_and_after_of_a_real_layout(tmp_path):
    "SpaceNet 7: a year of monthly images becomes pairs, and the answer is where the two masks differ."
    gv.replica("spacenet7", tmp_path/"data", size=64)
    ds = gv.open("spacenet7", tmp_path/"data").where(split="train").changes()
    with pytest.warns(UserWarning, match="no validation split"): run = fit({**words(epochs=1), "name": "run"}, ds, root=tmp_path, device="cpu")
    assert (run.info.kind, run.classes, run.info.build["fuse"]) == ("change", ("no change", "change"), "difference")
    assert np.isfinite(run.steps.loss).all() and np.isfinite(evaluate(run, "train", ds, device="cpu").query("metric == 'loss'").value).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(20, 40))
def test_objects_survive_their_three_maps(seed, n, size):
    "Separate rectangles of any size come back from their maps, whatever their numbers."
    rng, image = np.random.default_rng(seed), np.zeros((size, size), int)
    for k in range(1, n + 1):
        h, w = rng.integers(2, 9, 2)
        y, x = rng.integers(0, size - h), rng.integers(0, size - w)
        if not image[max(0, y - 1):y + h + 1, max(0, x - 1):x + w + 1].any(): image[y:y + h, x:x + w] = 10*k
    score = Objects().update(objects_from(*parts_of(image)), image)
    assert (score.pq, score.found) == (1., len(np.unique(image)) - 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(12, 20), st.booleans())
def test_pictures_add_up_and_leave_holes_out(seed, n, size, holes):
    "Any split of a batch gives the same scores, and what lies in a hole makes no difference."
    torch.manual_seed(seed)
    a, b = torch.rand(n, 2, size, size), torch.rand(n, 2, size, size)
    valid = torch.ones(n, size, size, dtype=torch.bool)
    if holes: valid[:, :3, :4] = False
    whole = Pictures([1., 1.]).update(a, b, valid)
    parts = sum((Pictures([1., 1.]).update(a[i:i+1], b[i:i+1], valid[i:i+1]) for i in range(n)), Pictures([1., 1.]))
    other = torch.where(valid[:, None], a, 9.)
    for name in ("psnr", "ssim", "sam", "rmse", "mae"):
        assert np.isclose(getattr(whole, name), getattr(parts, name), equal_nan=True)
        assert np.isclose(getattr(whole, name), getattr(Pictures([1., 1.]).update(other, b, valid), name), equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 60))
def test_torchmetrics_agrees_where_it_is_right(seed, classes, n):
    "Per class, for the classes that occur, without an ignored label; an ignored label is ours to get right, so it is counted by hand."
    torch.manual_seed(seed)
    guess, truth = torch.randint(classes, (2, n))
    ours, there = Confusion(classes).update(guess, truth), torch.bincount(torch.cat([guess, truth]), minlength=classes).numpy() > 0
    for name, other in (("iou", multiclass_jaccard_index), ("f1", multiclass_f1_score), ("recall", multiclass_recall)):
        mine, theirs = getattr(ours, name), other(guess, truth, num_classes=classes, average="none").numpy()
        assert np.isnan(ours.iou[~there]).all() and np.allclose(np.nan_to_num(mine[there]), theirs[there], atol=1e-6)
    holes = torch.where(torch.rand(n) < .3, 255, truth)
    keep, seen = holes < 255, Confusion(classes, 255).update(guess, holes)
    for k in range(classes):
        both, either = ((guess == k) & (holes == k) & keep).sum().item(), (((guess == k) | (holes == k)) & keep).sum().item()
        assert np.isclose(seen.iou[k], both/either) if either else np.isnan(seen.iou[k])


def test_where_torchmetrics_is_not_the_oracle():
    "Its issues 1693 (a class that is nowhere scores 0, not nothing) and 2441 (an ignored class counts in the mean): ours by hand."
    truth, guess = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 0, 1])
    ours = Confusion(3).update(guess, truth).iou
    assert np.allclose(ours[:2], [2/3, 1/2]) and np.isnan(ours[2]) and np.isclose(mean_of_present(ours), 7/12)
    assert multiclass_jaccard_index(guess, truth, num_classes=3, average="none")[2] == 0
    truth, guess = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    assert np.isclose(mean_of_present(Confusion(2, ignore=0).update(guess, truth).recall), .5)


def test_the_mean_of_scores_is_not_the_score():
    "PSNR is a logarithm of a mean: that of two pictures is not the mean of their PSNRs."
    zero, far = torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12)
    one, two = Pictures([1.]).update(zero + .1, zero), Pictures([1.]).update(far, zero)
    assert np.isclose((one + two).psnr, 10*np.log10(1/((.01 + 1)/2))) and not np.isclose((one + two).psnr, (one.psnr + two.psnr)/2)


def test_what_is_learned_comes_from_training_only():
    class Split(Generated):
        def __getitem__(self, j):
            s = super().__getitem__(j)
            return {**s, "target": s["target"] + (1000 if int(s["id"][1:]) >= 15 else 0)}
        def take(self, p): return Split(self.n, self.size, self.seed, self.kind, self.positions[np.asarray(p, int)])
    job = prepare(load_config(words()), Split(kind="image_to_image"), device="cpu")
    assert job.info.step["center"][0] < 200 and job.info.step == learn(Split(kind="image_to_image").split("train"), "image_to_image", {})
