"""geovision: a notebook-first research toolkit for deep learning on satellite and aerial imagery."""

__version__ = "0.1.0"

import importlib

_HOMES = {  # public name -> module: imported when first used, so that `import geovision` stays instant
    "catalog": "data.opening", "card": "data.opening", "open": "data.opening", "from_files": "data.opening", "align": "data.combine",
    "replica": "datasets.replica", "plot": "viz.panels", "fit": "train.fit", "evaluate": "train.fit", "Run": "train.live",
    "predict": "train.predict", "attribute": "analysis.attribution",
}
_ROOMS = ("core", "geo", "data", "world", "viz", "datasets", "models", "train", "analysis", "cli")
__all__ = [*_HOMES]


def __getattr__(name):
    if name in _HOMES: return getattr(importlib.import_module(f"geovision.{_HOMES[name]}"), name)
    if name in _ROOMS: return importlib.import_module(f"geovision.{name}")
    raise AttributeError(f"module 'geovision' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *_HOMES, *_ROOMS])
