"""The ten lines of the README run as they stand, from an empty folder."""
import re
from pathlib import Path

import yaml

from geovision.geo.write import write_raster
from geovision.world.planet import World

ROOT = Path(__file__).resolve().parent.parent


def test_the_ten_lines_work(tmp_path, monkeypatch):
    code = re.search(r"```python\n(import geovision as gv\n.*?)```", (ROOT/"README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    config = {"name": "ten-lines", "data": {"dataset": "inria", "root": "data/inria", "batch_size": 8},
              "model": {"name": "unet", "encoder": "tu-mobilenetv3_small_050"}, "optimise": {"epochs": 1}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    world = World(seed=1, crs="EPSG:32633", place="town")
    x, y = world.bounds[0] + 4000, world.bounds[1] + 4000
    seen = world.view("aerial_rgb", (x, y, x + 60, y + 60), gsd=0.3)
    write_raster("scene.tif", seen["image"], crs=seen["crs"], transform=seen["transform"])
    names = {}
    exec(compile(code.replace("seed=0)", "seed=0, size=128)"), "README.md", "exec"), names)
    assert Path("map.tif").exists() and Path("map.gpkg").exists()
    assert set(names["ds"].index["split"].dropna()) >= {"train", "val"}
