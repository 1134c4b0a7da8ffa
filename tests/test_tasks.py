"""Every kind of task goes through the one loop: fitted, judged, kept and built again, on generated data and on small replicas."""
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rasterio.transform import from_origin
from safetensors.torch import load_file
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index, multiclass_recall

import geovision as gv
from geovision.cli.main import main
from geovision.core.errors import BadValue, DataError, UnknownName
from geovision.core.registry import lookup
from geovision.data.batch import collate
from geovision.geo.write import write_raster
from geovision.models.objects import objects_from, parts_of
from geovision.train.fit import evaluate, fit
from geovision.train.generated import Generated
from geovision.train.job import learn, prepare, samples_of
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
    "several": (dict(), words(tasks={"segmentation": {}, "regression": {}, "multilabel": {"weight": .1}}), "segmentation.iou", .4, True),
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
    x = see(collate([pick(samples_of(load_config(config), ds)[0], step)]))
    with torch.inference_mode(): said = run.model()(x)
    assert all(torch.isfinite(v).all() for v in (said.values() if isinstance(said, dict) else [said]))


KILLED = """
import json, os, signal, sys
import torch; torch.set_num_threads(1)
from geovision.train import fit
from geovision.train.generated import Generated
original, calls = fit.check_loss, [0]
def deadly(*args):
    calls[0] += 1
    if calls[0] == 5: os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
fit.check_loss = deadly
fit.fit(json.loads(sys.argv[1]), Generated(**json.loads(sys.argv[2])), root=sys.argv[3], device="cpu")
"""
BOTH = {"segmentation": {"loss": "ce_dice", "weight": 1.}, "regression": {"loss": "mse", "weight": .5, "metrics": ["mae"]}}


@pytest.mark.parametrize("data, average, more", [(dict(dates=3), "swa", {}), (dict(kind="change"), "ema", {}), (dict(kind="image_to_image"), "swa", {}),
                                                 (dict(), "ema", {"tasks": BOTH})])
def test_a_killed_run_ends_the_same_for_other_inputs(data, average, more, tmp_path):
    "Killed in the second of three epochs; a step was saved on the way."
    config = words(epochs=3, optimise={"epochs": 3, "average": {"kind": average, "start": .3}}, log={"every": 1, "save_every": 2}) | more
    whole = fit({**config, "name": "whole"}, Generated(**data), root=tmp_path, device="cpu")
    command = [sys.executable, "-c", KILLED, json.dumps({**config, "name": "again"}), json.dumps(data), str(tmp_path)]
    died = subprocess.run(command, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert died.returncode == -9, died.stderr[-2000:]
    assert not (tmp_path/"again"/"finished.json").exists() and Run(tmp_path/"again").epochs == 1
    again = fit({**config, "name": "again"}, Generated(**data), root=tmp_path, device="cpu", resume=True)
    keep = ~whole.metrics.metric.isin(["seconds", "per_second", "memory_mb"])
    assert whole.metrics[keep].value.equals(again.metrics[keep].value) and whole.steps.loss.equals(again.steps.loss)
    for which in ("last", "averaged"):
        one, two = load_file(whole.weights(which)), load_file(again.weights(which))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_several_tasks_share_a_network(tmp_path):
    "Both learn, each by its own measure; what was kept is built again and judged the same; a metric may be asked for later."
    run = fit({**words(epochs=8), "name": "run", "tasks": BOTH}, Generated(n=36), root=tmp_path, device="cpu")
    for task in BOTH:
        losses = run.metrics.query(f"split == 'val' and metric == '{task}.loss'").value.to_numpy()
        assert losses.min() < .8*losses[0], (task, losses)
    assert run.steps.loss[-3:].mean() < .8*run.steps.loss[:3].mean()
    assert set(run.metrics.metric) >= {"segmentation.iou", "regression.mae", "loss"} and last(run, "segmentation.iou") > .45
    table = evaluate(run, "val", Generated(n=36), device="cpu")
    value = table.query("metric == 'segmentation.iou' and `class` == 'mean'").value.iloc[0]
    assert value == run.metrics.query("split == 'val' and metric == 'segmentation.iou' and `class` == 'mean'").value.max()
    judged = evaluate(run, "val", Generated(n=36), device="cpu", metrics=["regression.rmse"])
    assert "regression.rmse" in set(judged.metric) and "segmentation.iou" not in set(judged.metric)
    with pytest.raises(UnknownName, match="hight"): evaluate(run, "val", Generated(n=36), device="cpu", metrics=["hight.rmse"])
    with torch.inference_mode(): said = run.model()(torch.rand(2, 2, 40, 32))
    assert {k: tuple(v.shape) for k, v in said.items()} == {"segmentation": (2, 2, 40, 32), "regression": (2, 1)}


def test_batches_that_count_as_one_give_the_gradient_of_the_large_one():
    "Exactly so where every sample has as many counted pixels as the next."
    job = prepare(load_config({**words(), "tasks": BOTH}), Generated(), device="cpu")
    samples, model = [pick(job.train[i], job.step) for i in range(4)], job.model.eval()
    def gradient(parts):
        model.zero_grad()
        total, n = zip(*[job.step(model, collate(p))[:2] for p in parts], strict=True)
        (sum(total)/sum(n)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    step = job.step.parts["segmentation"]
    step.loss, step.options = lookup("loss", "ce"), {}                                      # dice is a ratio of sums over a batch
    assert torch.allclose(gradient([samples]), gradient([samples[:1], samples[1:]]), atol=1e-5, rtol=1e-4)


def test_numbers_in_the_index_set_the_scale_of_a_regression(tmp_path):
    "People per cell: the network starts at their mean, the loss is in spreads, the metrics in people."
    gv.replica("so2sat_pop", tmp_path/"data", size=64)
    ds, config = gv.open("so2sat_pop", tmp_path/"data", task="population"), words(LABEL, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = prepare(load_config(config), ds, device="cpu")
        run = fit({**config, "name": "run"}, ds, root=tmp_path, device="cpu")
        pair = prepare(load_config({**config, "tasks": {"population": {}, "population_class": {"weight": .2}}}), ds, device="cpu")
    people = ds.split("train").rows["population"].to_numpy(float)
    assert np.allclose((job.info.step["center"], job.info.step["spread"]), ([people.mean()], [people.std()]))
    batch = collate([pick(job.train[i], job.step) for i in range(min(6, len(job.train)))])
    with torch.inference_mode(): loss, n, said = job.step(job.model.eval(), batch)
    assert (abs(said - people.mean()) < 3*people.std()).all()
    assert np.isclose(float(loss/n), (((said[:, 0] - batch["target"])/people.std())**2).mean().item(), rtol=1e-4)
    with torch.inference_mode(): kept = run.model()(batch["image"])
    assert (abs(kept - people.mean()) < 5*people.std()).all()
    assert pair.info.step["tasks"]["population"]["step"] == job.info.step and pair.info.step["tasks"]["population_class"]["step"] == {}
    assert pair.metrics[:2] == ("population.rmse", "population.mae")


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
    (words(tasks={"segmentation": {}, "heights": {}}), dict(), UnknownName, "no task of the dataset 'heights'"),
    (words(tasks={"segmentation": {"loss": "mse"}, "regression": {}}), dict(), DataError, "the target has shape"),
    (words(tasks={"segmentation": {}, "regression": {"metrics": ["iou"]}}), dict(), BadValue, "iou does not fit regression"),
    (words(LABEL, tasks={"segmentation": {}, "regression": {}}), dict(), BadValue, "one answer per image"),
    (words(data={"mix": "cutmix"}, tasks={"segmentation": {}, "regression": {}}), dict(), BadValue, "cutmix does not fit several"),
    (words(loss="ce", tasks={"segmentation": {}}), dict(), BadValue, "tasks.<name>.loss"),
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


@pytest.mark.parametrize("case", ["concat", "series", "masked", "several"])
def test_two_processes(case, tmp_path):
    "Every parameter has a gradient in every task, which several processes insist on."
    data, config, metric, *_ = CASES[case]
    config = {**config, "name": "run", "optimise": {"epochs": 1}, "data": {"batch_size": 6}}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", json.dumps(config), json.dumps(data), str(tmp_path)]
    (tmp_path/"script.py").write_text(PROCESS)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.isfinite(last(Run(tmp_path/"run"), metric))


@pytest.mark.parametrize("data, more, says", [(dict(dates=3), {}, "a series of dates"), (dict(kind="change"), {}, "before and after"),
                                              (dict(kind="instance"), {}, "objects are made"),
                                              (dict(), {"tasks": BOTH}, "several answers"),
                                              (dict(kind="classification"), {"model": LABEL}, "whole image")])
def test_runs_that_cannot_map_a_scene_say_so(data, more, says, tmp_path, capfd):
    "One sentence and exit code 2 from the shell, the same as an error from Python; nothing is written."
    run = fit({**words(epochs=1), "name": "run"} | more, Generated(n=12, **data), root=tmp_path, device="cpu")
    write_raster(tmp_path/"scene.tif", np.full((2, 64, 64), 100., np.float32), crs="EPSG:32631", transform=from_origin(0, 0, 1, 1))
    capfd.readouterr()
    code, said = main(["predict", str(run.path), str(tmp_path/"scene.tif"), "--out", str(tmp_path/"maps")]), capfd.readouterr().err
    assert code == 2 and says in " ".join(said.split()) and "Traceback" not in said and not list((tmp_path/"maps").glob("*.tif"))
    with pytest.raises(BadValue, match="cannot map a scene"): gv.predict(run, tmp_path/"scene.tif", tmp_path/"map.tif")


def test_before_and_after_of_a_real_layout(tmp_path):
    "SpaceNet 7: a year of monthly images becomes pairs, and the answer is where the two masks differ."
    gv.replica("spacenet7", tmp_path/"data", size=64)
    ds = gv.open("spacenet7", tmp_path/"data").where(split="train").changes()
    run = fit({**words(epochs=1), "name": "run"}, ds, root=tmp_path, device="cpu")
    assert "no validation split" in (run.path/"log.txt").read_text()
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
