"""Miniatures of the catalogue for the tests, each written once a process (once a machine where `GEOVISION_TEST_REPLICAS` names a folder of them)."""
import atexit
import os
import shutil
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import geovision as gv

NAMES = sorted(gv.catalog()["name"])
FIXED = {"hyspecnet11k", "spectral_earth"}      # Their miniatures have a size of their own
SMALL = 96                                      # Pixels of a scene of the small ones
MADE = {}


@cache
def folder():
    "Where they are written; removed at the end."
    if kept := os.environ.get("GEOVISION_TEST_REPLICAS"): return Path(kept)
    made = Path(tempfile.mkdtemp(prefix="geovision-replicas-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def made(name, size=None):
    "The folder of a miniature, and the seconds it took to write it."
    size = None if name in FIXED else size
    root = folder()/(name if size is None else f"{name}-{size}")
    if root not in MADE:
        start = time.perf_counter()
        if not (root/"REPLICA.txt").exists(): gv.replica(name, root, size=size)
        MADE[root] = time.perf_counter() - start
    return root, MADE[root]


def small(name):
    "The folder of a small miniature."
    return made(name, SMALL)[0]


def opened(name, **how):
    "A miniature as a dataset; what it warns of does not matter here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gv.open(name, made(name)[0], **how)
