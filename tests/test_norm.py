"""In-place activated batch norm over several processes: unequal shares of a batch give what one process gives."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.functional import leaky_relu

from geovision.core.errors import UnknownName
from geovision.models.build import build
from geovision.models.norm import InPlaceABN, convert, kept_bytes

RANK = textwrap.dedent("""
    import sys
    import torch
    import torch.distributed as dist
    from geovision.models.norm import InPlaceABN
    store, out, world, rank, sizes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), eval("[" + sys.argv[5] + "]")
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=world, rank=rank)
    data = torch.load(f"{out}/data.pt", weights_only=True)
    layer = InPlaceABN(3, slope=.1, sync=True).double()
    layer.load_state_dict(data["state"])
    start = sum(sizes[:rank])
    x = data["x"][start:start + sizes[rank]].clone().requires_grad_()
    z = layer(x*1.)
    z.backward(data["up"][start:start + sizes[rank]])
    torch.save({"z": z.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad, "var": layer.running_var}, f"{out}/{rank}.pt")
    dist.destroy_process_group()
    """)


@pytest.mark.parametrize("sizes", [(3, 1), (1, 2, 2)])
def test_processes_with_unequal_shares_agree_with_one(tmp_path, sizes):
    torch.manual_seed(0)
    x, up = torch.randn(sum(sizes), 3, 4, 5, dtype=torch.float64), torch.randn(sum(sizes), 3, 4, 5, dtype=torch.float64)
    one = InPlaceABN(3, slope=.1).double()
    with torch.no_grad(): one.weight.copy_(torch.tensor([1.2, -.6, .3])), one.bias.normal_()
    torch.save({"x": x, "up": up, "state": one.state_dict()}, tmp_path/"data.pt")
    words = [[sys.executable, "-c", RANK, str(tmp_path/"store"), str(tmp_path), str(len(sizes)), str(r), ",".join(map(str, sizes))] for r in range(len(sizes))]
    ranks = [subprocess.Popen(w, env={**os.environ, "OMP_NUM_THREADS": "1"}) for w in words]
    assert [p.wait(120) for p in ranks] == [0]*len(sizes)
    leaf = x.clone().requires_grad_()
    z = one(leaf*1.)
    z.backward(up)
    found = [torch.load(tmp_path/f"{r}.pt", weights_only=True) for r in range(len(sizes))]
    assert torch.allclose(torch.cat([f["z"] for f in found]), z, atol=1e-12)
    assert torch.allclose(torch.cat([f["dx"] for f in found]), leaf.grad, atol=1e-12)
    for key, whole in (("dw", one.weight.grad), ("db", one.bias.grad)): assert torch.allclose(sum(f[key] for f in found), whole, atol=1e-12)
    assert all(torch.allclose(f["var"], one.running_var, atol=1e-12) for f in found)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet10t", "tu-mobilenetv3_small_050"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_converted_network_has_the_gradients_of_its_twin_on_copies(encoder, memory):
    torch.manual_seed(0)
    net = build("unet", encoder=encoder, bands=4, classes=2).net.double()
    assert convert(net, relu="leaky", sample=torch.zeros(1, 4, 64, 64, dtype=torch.float64)).swapped
    x, grads = torch.randn(2, 4, 64, 64, dtype=torch.float64).contiguous(memory_format=memory), []
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for in_place in (True, False):
        net.load_state_dict(state)
        for m in net.modules():
            if isinstance(m, InPlaceABN): m.in_place = in_place
        net.zero_grad()
        net.train()(x).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads))


def test_half_precision_keeps_its_statistics_in_float32():
    torch.manual_seed(0)
    layer, x = InPlaceABN(4), torch.randn(4, 4, 16, 16)
    wanted = leaky_relu(torch.nn.functional.batch_norm(x, None, None, layer.weight + layer.eps, layer.bias, True), .01)
    with torch.autocast("cpu", torch.bfloat16): z = layer(x.to(torch.bfloat16))
    assert z.dtype == torch.bfloat16 and layer.running_var.dtype == torch.float32
    assert torch.allclose(z.float(), wanted, atol=.05)


def test_build_puts_them_in_and_rebuilds_the_same():
    torch.manual_seed(0)
    usual, ours, again = build(bands=3), build(bands=3, norm="inplace_abn"), build(bands=3, norm="inplace_abn")
    again.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), ours.eval()(x))
    sizes = []
    for net in (usual, ours):
        with kept_bytes() as found: net.train()(torch.rand(2, 3, 64, 64))
        sizes.append(found["bytes"])
    assert sizes[1] < .85*sizes[0]
    with pytest.raises(UnknownName, match="inplace_abn"): build(norm="inplace")
