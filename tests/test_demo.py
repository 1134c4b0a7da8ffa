"""The main job end to end, in small: a miniature and the user's own files; and, where they are at hand, the facts of the real chips."""
import json, os, re
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest

from geovision.cli.demo import MARK, _trivial_answers
from geovision.cli.main import main
from geovision.cli.material import own_files
from geovision.cli.trivial import everywhere, iou, judge
from geovision.geo.raster import info, read
from geovision.geo.write import write_raster

REAL = Path(os.environ.get("GEOVISION_REAL") or Path(__file__).resolve().parent.parent.parent / "shared" / "real")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--out", str(out), "--size", "64", "--minutes", "0.03"]) == 0
    return out


def test_all_files_are_there(made):
    assert {"report.html", "metrics.json", "prediction.tif", "buildings.gpkg", "run", "data", MARK} <= {p.name for p in made.iterdir()}
    about = info(made / "prediction.tif")
    assert about.shape == (1, 64, 64) and about.crs is not None and set(np.unique(read(made / "prediction.tif"))) <= {0, 1}
    polygons = gpd.read_file(made / "buildings.gpkg")
    assert polygons.crs is not None and {"class", "area_m2"} <= set(polygons) or len(polygons) == 0


def test_numbers(made):
    told = json.loads((made / "metrics.json").read_text())
    assert told["generated"] is True and 0 <= told["building_iou"] <= 1
    assert set(told["iou"]) >= {"the network", "building everywhere"} and "all unseen ground" in told["iou"]["the network"]
    assert {"bellingham", "sfo", "tyrol-e"} < set(told["iou"]["the network"]) and told["leaking_pairs"] == 0 and 0 <= told["facts"]["validation IoU"] <= 1


def test_the_report_holds_everything_and_says_what_it_is(made):
    html = (made / "report.html").read_text()
    assert html.count("data:image/") >= 7 and "generated" in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) and "<script" not in html


def test_again_into_the_same_folder(made):
    "Its own files are replaced, those of others stay."
    (made / "mine.txt").write_text("mine")
    before = (made / "report.html").stat().st_mtime_ns
    assert main(["demo", "--out", str(made), "--size", "64", "--minutes", "0.01"]) == 0
    assert (made / "mine.txt").read_text() == "mine" and (made / "report.html").stat().st_mtime_ns > before


def test_a_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "report.html").write_text("somebody's")
    assert main(["demo", "--out", str(tmp_path), "--size", "64"]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and (tmp_path / "report.html").read_text() == "somebody's"


def chips(root, values=255):
    "Bright roofs on dark ground, six chips for training and two for validation, one of which lies on training ground."
    rng = np.random.default_rng(0)
    for k in range(8):
        split, east = ("train", 100 * k) if k < 6 else ("val", 900 if k == 6 else 130)
        mask = np.zeros((1, 96, 96), "uint8")
        for _ in range(4):
            x, y = rng.integers(4, 70, 2)
            mask[0, y:y + 20, x:x + 20] = values
        image = (60 + 100 * (mask > 0) + rng.normal(0, 12, (3, 96, 96))).clip(0, 255).astype("uint8")
        where = dict(crs="EPSG:32736", transform=(1, 0, 450000 + east, 0, -1, 9960000))
        write_raster(root / split / f"source/c{k}.tif", image, **where)
        write_raster(root / split / f"masks/c{k}.mask.tif", mask, **where)
    return str(root / "{split}/source/{id}.tif"), str(root / "{split}/masks/{id}.mask.tif")


def test_own_files(tmp_path):
    images, masks = chips(tmp_path / "own")
    assert main(["demo", "--out", str(tmp_path / "demo"), "--images", images, "--masks", masks, "--minutes", "0.03"]) == 0
    told = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert told["generated"] is False and told["leaking_pairs"] >= 1 and told["facts"]["dropped for leaks"] == 1 and told["facts"]["judged scenes"] == 1
    brighter = [v for k, v in told["iou"].items() if k.startswith("brighter")]
    assert brighter and brighter[0]["all unseen ground"] > 0.9                        # the trivial answer is good here, and is told
    html = (tmp_path / "demo/report.html").read_text()
    assert "generated world" not in html and "your own images" in html


def test_what_cannot_be_told_leaves_nothing(tmp_path, capsys):
    images, masks = chips(tmp_path / "own", values=3)
    assert main(["demo", "--out", str(tmp_path / "demo"), "--images", images, "--masks", masks]) == 2
    assert "classes" in capsys.readouterr().err and not (tmp_path / "demo").exists()


@pytest.mark.skipif(not (REAL / "kampala").is_dir(), reason="the real chips are not at hand (GEOVISION_REAL)")
def test_the_real_chips():
    "The leak check finds the validation chips that share ground with training; trivial answers on the others score what is known of them."
    made = own_files(str(REAL / "kampala/{split}/source/{id}.tif"), str(REAL / "kampala/{split}/masks/{id}.mask.tif"))
    assert (len(made.ds), len(made.scenes), made.dropped) == (118, 21, 8)
    truths = [s.truth() for s in made.scenes]
    assert round(everywhere(truths), 3) == 0.592
    best = _trivial_answers(made.ds)
    score = iou(judge((best.answer(read(s.image)), t) for s, t in zip(made.scenes, truths)))
    assert best.brighter and abs(score - 0.647) < 0.02, score
