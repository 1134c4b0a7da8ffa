"""Every card of the catalogue, by the same questions: are its facts complete, and does its miniature open, check, count and pickle?"""
import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import replicas

import geovision as gv
from geovision.data.checking import check
from geovision.data.opening import card as card_of

NAMES = replicas.NAMES
PUBLISHED = {  # faults of the real data that the miniatures repeat: `check` must find these, and nothing else
    "sen12floods": {"unreadable", "nothing but nodata"}, "spacenet1": {"nothing but nodata"}, "spacenet3": {"no lines"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("replicas")


def made(folder, name):
    "A miniature, written once a process."
    return replicas.made(name)


def opened(folder, name, **how): return replicas.opened(name, **how)


def broken(ds):
    "Samples that the published data itself cannot give."
    if "unreadable" not in PUBLISHED.get(ds.card.name, ()): return set()
    found = check(ds)
    return set(found["id"][found["what"] == "unreadable"])


def digest(root):
    "Names and contents of all files."
    files = sorted(p for p in Path(root).rglob("*") if p.is_file() and ".geovision" not in p.parts)
    return [(str(p.relative_to(root)), hashlib.sha1(p.read_bytes()).hexdigest()) for p in files]


def test_the_catalogue_holds_what_it_should():
    assert set(NAMES) >= {"inria", "ramp", "spacenet2", "hyspecnet11k"} and len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    card = card_of(name)
    assert card.title and card.sure and card.assets and (card.citation or card.notes) and (card.licence or card.notes)
    assert all(re.fullmatch(r"[0-9a-f]{32}", a.md5) for a in card.archives if a.md5)
    for task in card.tasks.values():
        assert task.colours is None or len(set(task.colours)) == len(task.colours) == len(task.classes)
        assert len(set(task.classes)) == len(task.classes)
    for asset in card.assets.values(): assert len({b.name for b in asset.bands}) == len(asset.bands)


@pytest.mark.parametrize("name", NAMES)
def test_the_miniature_is_small_and_opens(folder, name):
    root, seconds = made(folder, name)
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    assert size < 20e6 and "REPLICA" in (root/"REPLICA.txt").read_text()
    ds = opened(folder, name)
    assert len(ds) and ds.replica and ds.rows["id"].is_unique
    for split in ds.rows["split"].dropna().unique() if "split" in ds.rows else []: assert len(opened(folder, name, split=split))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_what_the_design_says(folder, name):
    for task in card_of(name).tasks or [None]:
        ds = opened(folder, name, task=task)
        readable = [i for i in range(len(ds)) if ds.rows["id"].iat[i] not in broken(ds)]
        for i in {readable[0], readable[len(readable)//2], readable[-1]}:
            sample = ds[i]
            assert sample["id"] == ds.rows["id"].iat[i]
            if (image := sample.get(ds.main)) is not None and not isinstance(image, (list, dict)):
                assert image.ndim in (3, 4) and image.is_floating_point() and image.shape[-3] == len(ds.bands), (name, task, image.shape)
            if (mask := sample.get("mask")) is not None and not mask.is_floating_point():
                ignore = -1 if ds.task is None or ds.task.ignore is None else ds.task.ignore
                values = set(np.unique(mask).tolist()) - {ignore}
                assert not values or min(values) >= 0 and (not ds.classes or max(values) < len(ds.classes)), (name, task, values)
            assert "transform" in sample or "crs" not in sample


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_it(folder, name):
    found = check(opened(folder, name))
    wrong = set(found["what"][found["level"] == "wrong"]) if len(found) else set()
    assert wrong == PUBLISHED.get(name, set()), found.to_string()


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_finite(folder, name):
    ds = opened(folder, name)
    if not card_of(name).assets[ds.main].bands: pytest.skip("no measurements")
    some = ds.stats.n > 0
    assert some.any() and np.isfinite(np.asarray(ds.stats.mean)[some]).all() and np.isfinite(np.asarray(ds.stats.std)[some]).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_travels_to_workers(folder, name):
    ds = opened(folder, name)
    again = pickle.loads(pickle.dumps(ds))
    i = next(i for i in range(len(ds)) if ds.rows["id"].iat[i] not in broken(ds))
    assert len(again) == len(ds) and again[i]["id"] == ds[i]["id"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_files(folder, name):
    root, seconds = made(folder, name)
    if seconds > 3: pytest.skip("writing it twice takes too long; the quick ones are compared")
    gv.replica(name, folder/"again"/name)
    assert digest(root) == digest(folder/"again"/name)
