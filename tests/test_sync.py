"""Copies of runs on real servers of this machine: whole after any kill, never torn, no secret told."""
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from geovision.core.errors import BadValue
from geovision.train.alongside import agree
from geovision.train.checkpoints import load_into, load_state, save_checkpoint
from geovision.train.fit import fit
from geovision.train.generated import Generated
from geovision.train.log import Log, read_log
from geovision.train.places import address, digest
from geovision.train.run import Run
from geovision.train.sync import bring_back, listed, place_of, push, sync

os.environ["GEOVISION_QUIET"] = "1"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
NET = {"name": "linknet", "encoder": "tu-mobilenetv3_small_050"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "Nobody's settings but ours."
    (tmp_path/"home/.ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in [n for n in os.environ if n.startswith("AWS_") or n == "SSH_AUTH_SOCK"]: monkeypatch.delenv(name)
    return tmp_path/"home"


@pytest.fixture
def s3(monkeypatch):
    from moto.server import ThreadedMotoServer
    import boto3
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    words = {"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": "hunter2secret", "AWS_EC2_METADATA_DISABLED": "true",
             "AWS_ENDPOINT_URL_S3": "http://%s:%d" % server.get_host_and_port(), "AWS_REGION": "us-east-1"}
    for name, value in words.items(): monkeypatch.setenv(name, value)
    bucket = f"maps-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/runs"
    server.stop()


@pytest.fixture
def ssh(tmp_path, home):
    if SSHD is None: pytest.skip("OpenSSH's sshd is not installed (apt-get install openssh-server)")
    etc = tmp_path/"etc"
    etc.mkdir()
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    for key in (etc/"host", home/".ssh/id_ed25519"): subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(home/".ssh/id_ed25519.pub", etc/"authorized")
    (home/".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {(etc/'host.pub').read_text()}")
    (etc/"conf").write_text(f"Port {port}\nListenAddress 127.0.0.1\nHostKey {etc/'host'}\nAuthorizedKeysFile {etc/'authorized'}\nPidFile {etc/'pid'}\n"
                            "UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nSubsystem sftp internal-sftp\n")
    if os.getuid() == 0: os.makedirs("/run/sshd", exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-f", etc/"conf"], stderr=subprocess.DEVNULL)
    for _ in range(200):
        try: socket.create_connection(("127.0.0.1", port), 1).close(); break
        except OSError: time.sleep(.05)
    else: pytest.fail("sshd did not start")
    yield f"ssh://127.0.0.1:{port}{tmp_path}/ssh"
    server.terminate(), server.wait()


@pytest.fixture(params=["folder", "s3", "ssh"])
def url(request, tmp_path): return str(tmp_path/"copies") if request.param == "folder" else request.getfixturevalue(request.param)


def a_run(path, size=1000, epoch=1):
    "A folder as a run leaves it."
    with Log(path/"metrics.h5", {"steps": ["step", "loss"]}) as log:
        for step in range(5): log.row("steps", step=step, loss=1/(step + 1))
    save_checkpoint(path/"checkpoints", torch.nn.Linear(size, 10), {"rows": {"steps": 5}}, epoch)
    for name, text in {"config.yaml": "name: town\n", "log.txt": "a line\n", "predictions/deep er/a b.tif": "pixels", "figures/loss.png": "png"}.items():
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        (path/name).write_text(text)
    return path


def same(run, back):
    "Every visible file came back with its bytes (the log with its rows)."
    hidden = lambda p: any(part.startswith(".") for part in p.parts)
    names = lambda root: sorted(p.as_posix() for q in root.rglob("*") if q.is_file() and not hidden(p := q.relative_to(root)))
    assert names(run) == names(back)
    for name in names(run):
        if name != "metrics.h5": assert digest(run/name) == digest(back/name), name
    assert read_log(run/"metrics.h5", "steps").equals(read_log(back/"metrics.h5", "steps"))


def test_there_and_back(url, tmp_path):
    run = a_run(tmp_path/"town")
    first, second = sync(run, url, say=str), sync(run, url, say=str)
    assert (first.sent, first.kept, second.sent, second.kept) == (7, 0, 0, 7)
    bring_back(url if "://" in url else f"file://{url}", tmp_path/"back")
    same(run, tmp_path/"back")


def test_only_what_changed_also_of_the_same_size(url, tmp_path):
    run = a_run(tmp_path/"town")
    sync(run, url, say=str)
    before = (run/"config.yaml").stat()
    (run/"config.yaml").write_text("name: twon\n")
    os.utime(run/"config.yaml", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    place = place_of(url)
    found = push(run, place)
    assert (found.sent, place.read("config.yaml")) == (1, b"name: twon\n")
    place.close()


def test_nothing_is_deleted_unless_asked(url, tmp_path):
    run = a_run(tmp_path/"town")
    place = place_of(url)
    push(run, place)
    (tmp_path/"mine").write_text("mine")
    place.send(tmp_path/"mine", "mine.txt", digest(tmp_path/"mine"))
    (run/"figures/loss.png").unlink()
    assert push(run, place).removed == 0 and "figures/loss.png" in place.files()
    assert push(run, place, delete=True).removed == 1
    assert "figures/loss.png" not in place.files() and "mine.txt" in place.files() and "figures/loss.png" not in listed(place)
    place.close()


SENDER = textwrap.dedent("""
    import os, signal, sys
    from geovision.train import bucket, places, ssh, sync
    url, where, after = sys.argv[2], sys.argv[3], int(sys.argv[4])
    place, calls = sync.place_of(url), [0]
    def deadly(original):
        def call(*args, **words):
            calls[0] += 1
            if calls[0] == after: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **words)
        return call
    if where == "before": place.send = deadly(place.send)
    elif url.startswith("s3"): place.part = 5 << 20; bucket._part = deadly(bucket._part)
    elif url.startswith("ssh"):
        import paramiko
        paramiko.SFTPFile.write = deadly(paramiko.SFTPFile.write)
    else:
        from shutil import copyfileobj
        def pieces(source, out, length):
            write = deadly(out.write)
            while chunk := source.read(length): write(chunk); out.flush()
        places.shutil.copyfileobj = pieces
    sync.push(sync.Path(sys.argv[1]), place)
    print("all", flush=True)
    """)


def killed(run, url, where, after):
    done = subprocess.run([sys.executable, "-c", SENDER, str(run), url, where, str(after)], capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("where, after", [("before", 4), ("inside", 3)])
def test_killed_while_sending(url, where, after, tmp_path):
    run = a_run(tmp_path/"town", size=300_000)                  # 12 MB of weights: several pieces
    assert killed(run, url, where, after)
    place = place_of(url)
    there = place.files()
    for name in there:                                          # what is there is whole
        place.fetch(name, tmp_path/"one")
        if name != "metrics.h5": assert digest(tmp_path/"one") == digest(run/name)
    assert "checkpoints/last.pt" not in there or "checkpoints/last-0001.safetensors" in there
    found = push(run, place)
    assert found.kept >= len(there) and found.sent + found.kept == 7
    place.close()
    bring_back(url if "://" in url else f"file://{url}", tmp_path/"back")
    same(run, tmp_path/"back")
    time.sleep(1.1)
    push(run, place), place.close()
    assert not list((run/".sync").glob("moment-*"))            # what the killed one left is tidied up


TRAINER = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from geovision.train.checkpoints import save_checkpoint
    from geovision.train.folder import locked
    from geovision.train.log import Log
    run = Path(sys.argv[1])
    with locked(run), Log(run/"metrics.h5", {"steps": ["step", "loss"]}) as log:
        (run/"config.yaml").write_text("name: town")
        for epoch in range(10_000):
            for step in range(10): log.row("steps", step=10*epoch + step, loss=.5)
            net = torch.nn.Linear(1000, 10)
            with torch.no_grad(): net.bias.fill_(epoch)
            save_checkpoint(run/"checkpoints", net, {"rows": {"steps": 10*epoch + 10}}, epoch)
            if epoch == 0: print("begun", flush=True)
    """)


def test_a_copy_can_be_resumed_at_every_moment(tmp_path):
    "A writer that saves as fast as it can; after every round the copy is one of its epochs, and the log is as long as its state says."
    run = tmp_path/"town"
    writer = subprocess.Popen([sys.executable, "-c", TRAINER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "begun\n"
        place, epochs = place_of(tmp_path/"copy"), []
        for _ in range(15):
            push(run, place)
            state = load_state(tmp_path/"copy/checkpoints")
            net = load_into(torch.nn.Linear(1000, 10), tmp_path/"copy/checkpoints"/state["weights"])
            assert net.bias[0] == state["epoch"]
            rows = read_log(tmp_path/"copy/metrics.h5", "steps")
            assert len(rows) >= state["rows"]["steps"] and rows.step.tolist() == list(range(len(rows)))
            epochs.append(state["epoch"])
        assert len(set(epochs)) > 3
    finally: writer.kill(), writer.wait()


def test_until_the_run_is_finished_and_ctrl_c(tmp_path):
    run = tmp_path/"town"
    writer = subprocess.Popen([sys.executable, "-c", TRAINER, str(run)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    command = [sys.executable, "-c", "from geovision.cli.main import main; raise SystemExit(main())", "sync", str(run), str(tmp_path/"copy"), "--every", ".1"]
    loops = [subprocess.Popen(command[:-3] + [str(tmp_path/name), *command[-2:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name in ("copy", "other")]
    for loop in loops: assert "sent" in loop.stdout.readline()
    loops[1].send_signal(signal.SIGINT)
    _, told = loops[1].communicate(timeout=30)
    assert loops[1].returncode == 130 and "stopped by Ctrl-C" in told and "Traceback" not in told
    assert loops[0].poll() is None                              # the run goes on
    writer.kill(), writer.wait()
    loops[0].communicate(timeout=30)
    assert loops[0].returncode == 0
    assert len(read_log(run/"metrics.h5", "steps")) == len(read_log(tmp_path/"copy/metrics.h5", "steps"))
    assert not list((run/".sync").glob("moment-*"))


def test_a_server_that_comes_back(s3, tmp_path, monkeypatch):
    "The first answers are errors of the server; the copy is whole all the same."
    run, place, failures = a_run(tmp_path/"town"), place_of(s3), []
    from geovision.train import bucket
    import botocore.exceptions
    real = bucket._in_one
    def shaky(*args):
        if len(failures) < 2: failures.append(1); raise botocore.exceptions.EndpointConnectionError(endpoint_url="x")
        return real(*args)
    monkeypatch.setattr(bucket, "_in_one", shaky)
    assert push(run, place).sent == 7 and len(failures) == 2
    place.close()


def test_refusals_tell_no_secret(s3, tmp_path, monkeypatch):
    run = a_run(tmp_path/"town")
    with pytest.raises(BadValue, match="no such bucket"): sync(run, "s3://nobody-has-this/x", say=str)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.delenv(name)
    with pytest.raises(BadValue, match="there are no keys"): sync(run, s3, say=str)
    with pytest.raises(BadValue) as e: sync(run, "s3://AKID:hunter2@maps/x", say=str)
    assert "hunter2" not in str(e.value)


def small(root, **words):
    return {"name": "town", "model": NET, "data": {"batch_size": 5}, "optimise": {"epochs": 2}, "log": {"every": 1, "sync_seconds": .3, **words}}


def test_fit_keeps_a_copy(url, tmp_path):
    torch.set_num_threads(1)
    run = fit(small(tmp_path, sync=url), Generated(), root=tmp_path/"runs", device="cpu")
    copy = bring_back(f"{url}/town" if "://" in url else f"file://{url}/town", tmp_path/"back")
    back = Run(tmp_path/"back")
    assert copy.sent > 5 and back.metrics.equals(run.metrics) and back.steps.equals(run.steps)
    assert digest(back.weights()) == digest(run.weights())
    assert "hunter2" not in "".join(p.read_text() for p in (run.path/"log.txt", run.path/"config.yaml"))


def test_a_place_that_is_away_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST"), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")                       # nobody listens
    plain = fit(small(tmp_path), Generated(), root=tmp_path/"plain", device="cpu")
    run = fit(small(tmp_path, sync="s3://maps/runs"), Generated(), root=tmp_path/"runs", device="cpu")
    assert np.array_equal(run.steps.loss, plain.steps.loss) and run.epochs == 2
    said = (run.path/"log.txt").read_text()
    assert "s3://maps/runs/town cannot be reached" in said and "hunter2" not in said


def test_a_foreign_config_is_asked_about(tmp_path):
    (tmp_path/"foreign.yaml").write_text(json.dumps(small(tmp_path, sync=str(tmp_path/"taken"))))
    with pytest.raises(BadValue, match="nobody here has agreed"): fit(tmp_path/"foreign.yaml", Generated(), root=tmp_path/"runs", device="cpu")
    command = [sys.executable, "-c", "from geovision.cli.main import main; raise SystemExit(main())",
               "run", "--config", str(tmp_path/"foreign.yaml"), "--root", str(tmp_path/"runs")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 2 and "nobody here has agreed" in done.stderr
    assert not (tmp_path/"runs").exists() and not (tmp_path/"taken").exists()
    agree(str(tmp_path/"taken"))
    run = fit(tmp_path/"foreign.yaml", Generated(), root=tmp_path/"runs", device="cpu")
    assert (tmp_path/"taken/town/model.json").read_bytes() == (run.path/"model.json").read_bytes()


def test_addresses_in_a_config_hold_no_password(tmp_path):
    with pytest.raises(BadValue) as e: fit(small(tmp_path, sync="ssh://ada:hunter2@lab/x"), Generated(), root=tmp_path/"runs", device="cpu")
    assert "hunter2" not in str(e.value) and not (tmp_path/"runs").exists()
    assert str(address("ssh://ada@lab/x")) == "ssh://ada@lab/x"
    assert Path(str(address(tmp_path))) == tmp_path
