"""Tiles cover a scene once, fit together exactly, and blend without seams: looked for with hypothesis, MONAI and plain arithmetic."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geovision.geo.mosaic import BLENDS, WINDOWS, Blender, mosaic, seam_index, shares
from geovision.geo.tiles import TileGrid, exact_margin
from geovision.geo.window import Box

SIZES = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 97, 101, 128]) | st.integers(1, 150)


@st.composite
def grids(draw, aligned=True):
    align = draw(st.sampled_from([1, 1, 2, 4, 8])) if aligned else 1
    tile = align*draw(st.integers(1, 64//align))
    overlap = draw(st.floats(0, 0.99) | st.integers(0, tile - 1))
    try: return TileGrid((draw(SIZES), draw(SIZES)), tile, overlap, align)
    except ValueError: return TileGrid((draw(SIZES), draw(SIZES)), tile, 0, align)


def cut(image, grid): return [image[:, *t.read.slices()] for t in grid]


@given(grids())
@settings(max_examples=120, deadline=None)
def test_cores_cover_once_and_keep_their_margin(grid):
    count, (h, w) = np.zeros(grid.size, int), grid.size
    for t in grid:
        count[t.core.slices()] += 1
        assert Box.whole(grid.size).holds(t.read) and t.read.holds(t.core)
        assert t.read.x % grid.align == 0 and t.read.y % grid.align == 0
        assert t.core.x == 0 or t.core.x - t.read.x >= grid.margin
        assert t.core.y == 0 or t.core.y - t.read.y >= grid.margin
        assert t.core.x + t.core.w == w or t.read.x + t.read.w - t.core.x - t.core.w >= grid.margin
        assert t.core.y + t.core.h == h or t.read.y + t.read.h - t.core.y - t.core.h >= grid.margin
        if grid.align == 1: assert t.read.size == (min(h, grid.tile), min(w, grid.tile))
        else: assert all(s == min(n, grid.tile) or s < grid.tile + grid.align for s, n in zip(t.read.size, (h, w)))
    assert (count == 1).all()
    assert [*grid] == [t for row in range(len(grid.rows)) for t in grid.band(row)] and len([*grid]) == len(grid)


@given(grids(), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_identity_is_bit_exact_with_cores_and_within_rounding_when_blended(grid, seed):
    image = np.random.default_rng(seed).normal(size=(2, *grid.size)).astype(np.float32)
    assert np.array_equal(mosaic(grid, cut(image, grid), 2, "centre"), image)
    for blend in WINDOWS: np.testing.assert_allclose(mosaic(grid, cut(image, grid), 2, blend), image, rtol=0, atol=1e-4)


@given(grids())
@settings(max_examples=150, deadline=None)
def test_one_everywhere_stays_exactly_one(grid):
    for blend in BLENDS: assert (mosaic(grid, [np.ones((1, *t.read.size), np.float32) for t in grid], 1, blend) == 1).all()


@given(grids(), st.sampled_from(sorted(WINDOWS)))
@settings(max_examples=150, deadline=None)
def test_shares_add_to_exactly_one(grid, blend):
    for axis in (grid.rows, grid.cols):
        total = np.zeros(axis[-1].stop, np.float32)
        for span, share in zip(axis, shares(axis, blend)):
            assert (share >= 0).all()
            total[span.start:span.stop] += share
        assert (total == 1).all()


@given(grids(aligned=False), st.sampled_from(sorted(WINDOWS)), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_streaming_equals_the_textbook_sum(grid, blend, seed):
    rng = np.random.default_rng(seed)
    preds = [rng.random((3, *t.read.size), dtype=np.float32) for t in grid]
    top, bottom = np.zeros((3, *grid.size)), np.zeros(grid.size)
    for t, p in zip(grid, preds):
        weight = WINDOWS[blend](t.read.h)[:, None]*WINDOWS[blend](t.read.w)
        top[:, *t.read.slices()] += weight*p
        bottom[t.read.slices()] += weight
    layers = -(-grid.tile//(grid.tile - 2*grid.margin))                                  # tiles over a pixel, along one axis
    np.testing.assert_allclose(mosaic(grid, preds, 3, blend), top/bottom, atol=2*layers/4096)    # shares are rounded to 1/4096


def test_a_blender_holds_one_row_of_tiles_and_hands_out_every_row_once():
    grid, seen = TileGrid((1000, 200), 64, 0.5), []
    blender = Blender(grid, 5)
    assert blender.ring.nbytes == 64*200*5*4
    for tile in grid: seen += [(box.y, box.h) for box, _ in blender.add(tile, np.ones((5, *tile.read.size), np.float32))]
    assert seen[0][0] == 0 and sum(h for _, h in seen) == 1000 and all(a + h == b for (a, h), (b, _) in zip(seen, seen[1:]))


# ---- local networks ------------------------------------------------------------------------------------------------


def whole_and_stitched(net, image, tile, margin, align=1):
    x = torch.from_numpy(image)[None]
    grid = TileGrid(image.shape, tile, 2*margin, align)
    with torch.inference_mode():
        whole = net(x)[0].numpy()
        preds = [net(x[:, :, *t.read.slices()])[0].numpy() for t in grid]
    return whole, mosaic(grid, preds, len(whole), "centre")


def convs(kernels, channels=5):
    torch.manual_seed(0)
    inputs = [3, *[channels]*(len(kernels) - 1)]
    return nn.Sequential(*[m for n, k in zip(inputs, kernels) for m in (nn.Conv2d(n, channels, k, padding=k//2), nn.Tanh())])


@pytest.mark.parametrize("kernels", [(3, 3, 3), (5, 3, 5), (7,)])
def test_a_local_network_fits_together_exactly_and_not_with_one_pixel_less(kernels):
    net, image = convs(kernels), np.random.default_rng(0).normal(size=(3, 257, 391)).astype(np.float32)
    margin = exact_margin([(k, 1) for k in kernels])
    whole, stitched = whole_and_stitched(net, image, 96, margin)
    assert np.abs(whole - stitched).max() < 1e-5
    whole, stitched = whole_and_stitched(net, image, 96, margin - 1)
    assert np.abs(whole - stitched).max() > 1e-4


class DownUp(nn.Module):
    "Two strided levels and back: a small U-Net without norms."
    layers = [(3, 1), (3, 2), (3, 2), (3, 1), (1, .5), (3, 1), (1, .5), (3, 1)]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 6, 3, s, 1) for i, s in ((3, 1), (6, 2), (6, 2), (6, 1)))
        self.e, self.f = (nn.Conv2d(12, 6, 3, 1, 1) for _ in range(2))

    def forward(self, x):
        def up(y, like): return y.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., :like.shape[-2], :like.shape[-1]]
        one = self.a(x).tanh()
        two = self.b(one).tanh()
        four = self.d(self.c(two).tanh()).tanh()
        two = self.e(torch.cat([up(four, two), two], 1)).tanh()
        return self.f(torch.cat([up(two, one), one], 1))


def test_a_strided_network_fits_together_on_its_own_grid_only():
    net, image = DownUp(), np.random.default_rng(0).normal(size=(3, 257, 391)).astype(np.float32)
    margin = exact_margin(DownUp.layers)
    assert margin % 4 == 0
    whole, stitched = whole_and_stitched(net, image, 96, margin, align=4)
    assert np.abs(whole - stitched).max() < 1e-5
    whole, stitched = whole_and_stitched(net, image, 97, margin)                     # tiles off the grid of 4 pixels
    assert np.abs(whole - stitched).max() > 1e-3


# ---- seams, and MONAI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_hann_leaves_no_seams(seed):
    grid, rng = TileGrid((768, 640), 128, 0.5), np.random.default_rng(seed)
    noise = rng.normal(0, 0.1, (1, *grid.size)).astype(np.float32)
    tiles = [noise[:, *t.read.slices()] + np.float32(rng.normal(0, 0.2)) for t in grid]
    assert abs(seam_index(mosaic(grid, tiles, 1, "hann"), grid, "hann") - 1) < 0.02
    assert seam_index(mosaic(grid, tiles, 1, "constant"), grid, "constant") > 1.1
    assert seam_index(mosaic(grid, tiles, 1, "centre"), grid, "centre") > 1.5


@pytest.mark.parametrize("size,tile,overlap", [((160, 200), 64, 0.5), ((97, 131), 32, 0.25), ((64, 64), 64, 0.5), ((200, 65), 64, 0.0)])
def test_the_same_as_monai(size, tile, overlap):
    inferers = pytest.importorskip("monai.inferers")
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, *size)).astype(np.float32))
    flavoured = lambda t: t + t.mean((1, 2, 3), keepdim=True)*50                      # every tile has its own opinion
    theirs = inferers.sliding_window_inference(x, (tile, tile), 4, flavoured, overlap=overlap, mode="constant")[0].numpy()
    grid = TileGrid(size, tile, overlap)
    ours = mosaic(grid, [flavoured(x[:, :, *t.read.slices()])[0].numpy() for t in grid], 2, "constant")
    np.testing.assert_allclose(ours, theirs, atol=2e-3)                               # thirds are not multiples of 1/4096
    regular = all((n - tile) % (tile - int(tile*overlap)) == 0 for n in size)
    if overlap in (0, 0.5) and regular: np.testing.assert_allclose(ours, theirs, atol=1e-5)
