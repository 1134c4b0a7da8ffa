"""In-place activated batch norm beside batch norm with leaky ReLU: `python tests/bench/bench_norm.py FOLDER [--runs 5]`.

One process; the networks take turns, so that a busy machine slows both. Bytes are what autograd keeps for the backward pass (aims: a pair at most
0.55 of the usual one, a converted ResNet-18 U-Net at least 25 % fewer); seconds are medians over 20 steps forward and backward (aim: at most 1.15).
"""
import argparse
import copy
import statistics
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import nn

from geovision.models.norm import InPlaceABN, convert, kept_bytes


def pair_share():
    "Bytes of a pair in place over those of batch norm and leaky ReLU."
    x, conv = torch.randn(4, 32, 64, 64), nn.Conv2d(32, 32, 3, padding=1)
    found = []
    for layers in ([nn.BatchNorm2d(32), nn.LeakyReLU(.01)], [InPlaceABN(32)]):
        with kept_bytes() as kept: nn.Sequential(conv, *layers)(x)
        found.append(kept["bytes"] - x.nbytes)
    return found[1]/found[0]


def bytes_of(net, x):
    with kept_bytes() as kept: net(x)
    return kept["bytes"]


def seconds(net, x):
    start = time.perf_counter()
    net(x).square().mean().backward()
    net.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.parse_args()
    torch.manual_seed(0)
    usual = smp.Unet("resnet18", encoder_weights=None)
    lean = copy.deepcopy(usual)
    report = convert(lean, relu="leaky")
    x = torch.randn(4, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    for net in (usual, lean): net.train(), seconds(net, x)
    took = [(seconds(usual, x), seconds(lean, x)) for _ in range(20)]
    a, b = (statistics.median(t) for t in zip(*took))
    kept = [bytes_of(net, x) for net in (usual, lean)]
    print(f"\nin-place activated batch norm ({len(report.swapped)} of the U-Net's norms are in place)")
    print(f"  bytes of a pair                    {pair_share():7.2f} of batch norm + leaky ReLU")
    print(f"  bytes of a ResNet-18 U-Net         {kept[1]/2**20:7.1f} MiB of {kept[0]/2**20:.1f}: {1 - kept[1]/kept[0]:.0%} fewer")
    print(f"  step of it, 4 x 128 x 128 px       {b:7.3f} s against {a:.3f}: {b/a:.2f} x (pairwise median {statistics.median(q/p for p, q in took):.2f})")
