"""What every method must do, one list for all of them.

Run as a script, this file is one of two processes of `test_two_processes_are_one`.
"""

import copy
import functools
import json
import math
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.benchmarks.gpu_parts import Halves, batch_norm_eval
from medssl.engine.monitor import ALIKE, COLLAPSED, Monitor, feature_std, similarity
from medssl.engine.parallel import Run, finish, setup, wrap
from medssl.models.momentum import momentum_at
from medssl.models.queue import KeyQueue
from medssl.train_byol import BYOL
from medssl.train_c2l import C2L
from medssl.train_concl import ConCL
from medssl.train_densecl import DenseCL
from medssl.train_genesis import Genesis
from medssl.train_insdis import InsDis
from medssl.train_mae import MAE
from medssl.train_magical import MAGICAL
from medssl.train_moco import MoCo
from medssl.train_pcl import PCL
from medssl.train_pcrl import PCRL
from medssl.train_pcrlv2 import PCRLv2
from medssl.train_simclr import SimCLR


def pcrlv2_batch(images=8, large=(32, 32), small=(32, 32), locals_=2):
    """(view1, view2, locals, target): smooth noise, views of an image alike; of volumes, the target is in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    volumes = len(large) == 3

    def noise(n, sides):
        coarse = torch.randn(n, 1 if volumes else 3, *(side // 4 for side in large), generator=generator)
        return nn.functional.interpolate(coarse, size=sides, mode="trilinear" if volumes else "bilinear")

    target = noise(images, large).sigmoid() if volumes else noise(images, large)
    return {
        "view1": target + 0.3 * noise(images, large),
        "view2": target + 0.3 * noise(images, large),
        "target": target,
        "locals": noise(locals_ * images, small),
    }


def pcrlv2_share(batch, rank, world):
    """A process's part of the batch; local views are view-major."""
    part = {k: batch[k].chunk(world)[rank] for k in ("view1", "view2", "target")}
    views = len(batch["locals"]) // len(batch["view1"])
    part["locals"] = torch.cat([v.chunk(world)[rank] for v in batch["locals"].chunk(views)])
    return part


def pair_batch(images=8, sides=(32, 32), code=6):
    """Two views of images, their clean states, their turned states, transform codes, image numbers."""
    batch = pcrlv2_batch(images, sides, sides)
    del batch["locals"]
    generator = torch.Generator().manual_seed(3)
    batch["target2"] = batch["target"].clone()
    for i in (1, 2):
        batch[f"turned{i}"] = batch[f"view{i}"].flip(2)
        batch[f"code{i}"] = (torch.rand(images, code, generator=generator) < 0.5).float()
    return batch | {"index": torch.arange(images)}


def concept_batch():
    """Two views, the reference view around them, and where they lie in it."""
    batch = pcrlv2_batch(8, (64, 64), (64, 64))
    low = 0.3 * torch.rand(8, 4, generator=torch.Generator().manual_seed(4))
    mirrored = (torch.arange(8) % 2).float()[:, None]
    boxes = {f"box{i}": torch.cat([low[:, 2 * i - 2 : 2 * i], 1 - low[:, :2], mirrored], 1) for i in (1, 2)}
    return {name: batch[name] for name in ("view1", "view2")} | {"reference": batch["target"]} | boxes


def magical_batch():
    """An image, the same changed, and its values in [0, 1]."""
    batch = pcrlv2_batch()
    return {"image": batch["view1"], "changed": batch["view2"], "target": batch["target"].sigmoid()}


def genesis_batch(sides=(32, 32)):
    """An image, changed, and its values in [0, 1]."""
    batch = pcrlv2_batch(8, sides, sides)
    return {"changed": batch["view1"], "target": batch["target"].sigmoid()}


def mae_batch(images=8, sides=(64, 64), grid=(4, 4)):
    """Smooth noise, and which of its patches are seen: two fifths, others of each image."""
    order = torch.rand(images, math.prod(grid), generator=torch.Generator().manual_seed(2)).argsort(1)
    visible = (order < round(0.4 * math.prod(grid))).view(images, 1, *grid)
    return {"image": pcrlv2_batch(images, sides, sides)["view1"], "visible": visible}


def plain_share(batch, rank, world):
    return {k: v.chunk(world)[rank] for k, v in batch.items()}


@dataclass
class Case:
    """A method, how it is made, a fixed batch, and a process's share of it."""

    make: type
    kwargs: dict
    batch: object
    share: object
    lr: float
    fall: float = 0.3  # share of the first loss that 15 steps take away
    keys: dict = field(default_factory=dict)  # how many enter each queue in a step of 8 images


ONE, THREE = {"contrast": 8}, {"contrast": 24}  # keys of an image


def clustered_pcl(**more):
    """PCL after its warm-up, with prototypes."""
    method = PCL(**more)
    method.clustered.fill_(True)
    return method


CASES = {
    "pcrlv2": Case(PCRLv2, {"locals_": 2}, pcrlv2_batch, pcrlv2_share, lr=0.02),
    "pcrlv2_3d": Case(
        PCRLv2,
        {"arch": "unet3d_quarter", "dims": 3, "locals_": 2},
        functools.partial(pcrlv2_batch, large=(16, 16, 16), small=(8, 8, 8)),
        pcrlv2_share,
        lr=0.02,
    ),
    "moco1": Case(MoCo, {"version": 1, "queue": 60}, pair_batch, plain_share, lr=0.05, keys=ONE),
    "moco2": Case(MoCo, {"queue": 60}, pair_batch, plain_share, lr=0.05, keys=ONE),
    "moco2_nce": Case(
        MoCo, {"queue": 60, "loss": "nce", "images": 50}, pair_batch, plain_share, lr=0.02, keys={"contrast": 8}
    ),
    "insdis": Case(InsDis, {"images": 20, "negatives": 16}, pair_batch, plain_share, lr=0.05),
    "insdis_nce": Case(InsDis, {"images": 20, "negatives": 16, "loss": "nce"}, pair_batch, plain_share, lr=0.05),
    "c2l": Case(C2L, {"queue": 60}, pair_batch, plain_share, lr=0.05, keys=THREE),
    "c2l_nce": Case(
        C2L, {"queue": 60, "loss": "nce", "images": 50}, pair_batch, plain_share, lr=0.05, keys={"contrast": 24}
    ),
    "pcrl": Case(PCRL, {"queue": 60}, pair_batch, plain_share, lr=0.05, keys=THREE),
    "pcrl_3d": Case(
        PCRL,
        {"arch": "unet3d_quarter", "dims": 3, "queue": 60},
        functools.partial(pair_batch, sides=(16, 16, 16), code=7),
        plain_share,
        lr=0.1,
        keys=THREE,
        fall=0.15,  # it starts near the least that 60 random negatives allow
    ),
    "simclr": Case(SimCLR, {}, pair_batch, plain_share, lr=0.02),
    "byol": Case(BYOL, {}, pair_batch, plain_share, lr=0.05),
    "densecl": Case(
        DenseCL,
        {"queue": 60},
        functools.partial(pair_batch, sides=(64, 64)),
        plain_share,
        lr=0.05,
        keys=ONE | {"dense_contrast": 8},
    ),
    "pcl": Case(
        clustered_pcl, {"queue": 60, "images": 8, "clusters": (3, 5)}, pair_batch, plain_share, lr=0.05, keys=ONE
    ),
    "concl_warm_up": Case(
        ConCL, {"queue": 60}, concept_batch, plain_share, lr=0.05, keys=ONE | {"concept_contrast": 0}
    ),
    "concl": Case(
        ConCL,
        {"queue": 60, "concepts": 3, "warm_up": 0.0, "weight": 0.7},
        concept_batch,
        plain_share,
        lr=0.05,
        keys=ONE | {"concept_contrast": 24},
    ),
    "genesis": Case(Genesis, {}, genesis_batch, plain_share, lr=0.5),
    "genesis_3d": Case(
        Genesis,
        {"arch": "unet3d_quarter", "dims": 3},
        functools.partial(genesis_batch, sides=(16, 16, 16)),
        plain_share,
        lr=0.5,
    ),
    "magical": Case(MAGICAL, {"arch": "resnet18"}, magical_batch, plain_share, lr=0.05),
    "mae": Case(MAE, {}, mae_batch, plain_share, lr=0.1, fall=0.25),  # its decoder begins with a plateau
    "mae_3d": Case(
        MAE,
        {"arch": "unet3d_quarter", "dims": 3, "channels": 1},
        functools.partial(mae_batch, sides=(16, 16, 16), grid=(4, 4, 4)),
        plain_share,
        lr=0.1,
    ),
}
TEACHERS = [name for name, case in CASES.items() if case.make in (MoCo, C2L, PCRL, BYOL, DenseCL, clustered_pcl, ConCL)]


def build(case):
    """The method with fixed weights."""
    torch.manual_seed(1)
    return case.make(**case.kwargs)


def run_with(seed, kind=Run):
    return kind(generator=torch.Generator().manual_seed(seed))


class HalvedRun(Halves):
    """Counts its calls."""

    calls = 0

    def __call__(self, net, *inputs, **options):
        HalvedRun.calls += 1
        return super().__call__(net, *inputs, **options)


def two_steps(method, batch, lr, wrapped=None, rank_mean=lambda t: t):
    """Two SGD steps with batch norms in evaluation mode → losses of each step."""
    batch_norm_eval(method)
    optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9)
    history = []
    for step in range(2):
        losses = (wrapped or method)(batch, run_with(step))
        history.append({k: rank_mean(v.detach()).item() for k, v in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        method.after_step((step + 1) / 4)
    return history


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_losses_are_finite_named_scalars(case):
    losses = build(case).train()(case.batch(), run_with(0))
    assert losses
    for name, value in losses.items():
        assert name.isidentifier()
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
    assert sum(losses.values()).requires_grad


def test_choices_come_from_the_runs_generator(case):
    method, batch = build(case).eval(), case.batch()
    torch.manual_seed(5)
    one = method(batch, run_with(3))
    torch.manual_seed(6)
    same = method(batch, run_with(3))
    assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in same.items()}


SAME_PARTS = ("moco1", "moco2_nce", "insdis_nce", "c2l_nce", "concl_warm_up")  # as others have


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SAME_PARTS)) for name in CASES]
)
def test_loss_falls_on_a_fixed_batch(name):
    case = CASES[name]
    method, batch = build(case).train(), case.batch()
    optimizer = torch.optim.SGD(method.parameters(), case.lr, momentum=0.9)
    history = []
    for _ in range(15):
        losses = method(batch, run_with(0))
        history.append({k: v.item() for k, v in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for part in history[0]:
        assert history[-1][part] < history[0][part], part
    totals = [sum(h.values()) for h in history]
    assert totals[-1] < totals[0] - case.fall * abs(totals[0])


def test_forward_changes_batch_statistics_only(case):
    method = build(case).train()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    sum(method(case.batch(), run_with(0)).values()).backward()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert all(k.endswith(statistics) for k in changed), sorted(changed)
    assert any(k.endswith("running_mean") for k in changed)


def test_encoder_state_is_the_methods_own(case):
    method = build(case)
    state = method.encoder_state()
    own = {v.data_ptr() for v in method.state_dict().values()}
    assert len(state) > 20
    assert all(v.data_ptr() in own for v in state.values())


def test_pictures_do_not_change_the_method(case):
    method, batch = build(case).eval(), case.batch()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        rows = method.pictures(batch)
    view = next(iter(batch.values()))
    assert all(x.ndim == view.ndim and x.shape[1] == view.shape[1] for x in rows.values())
    assert all(torch.isfinite(x).all() for x in rows.values())
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


def test_features_are_one_row_an_image(case):
    method, batch = build(case).train(), case.batch()
    method(batch, run_with(0))
    assert method.features.ndim == 2
    assert len(method.features) == len(next(iter(batch.values())))
    assert not method.features.requires_grad


def test_halved_run_is_the_plain_one(case):
    """What DataParallel does: networks see parts of the batch, the method all of it."""
    method, batch = batch_norm_eval(build(case)), case.batch()
    HalvedRun.calls = 0
    gradients = []
    for kind in (Run, HalvedRun):
        method.zero_grad()
        losses = method(batch, run_with(2, kind))
        sum(losses.values()).backward()
        gradients.append(({k: v.item() for k, v in losses.items()}, {k: p.grad for k, p in method.named_parameters()}))
    assert HalvedRun.calls > 0
    (plain, plain_grad), (halved, halved_grad) = gradients
    assert halved == pytest.approx(plain, rel=1e-5, abs=1e-6)
    # Sums in another order leave differences that go with the largest gradients: that of a bias before a normalisation
    # is nothing but those.
    largest = max(float(g.abs().max()) for g in plain_grad.values() if g is not None)
    for name, g in plain_grad.items():
        if g is None:
            assert halved_grad[name] is None
        else:
            near = 1e-4 * float(g.abs().max()) + 1e-6 * largest
            assert torch.allclose(g, halved_grad[name], rtol=1e-3, atol=near), name


def test_bf16_autocast(case):
    """Losses stay float32, and near those of full precision."""
    method, batch = build(case).train(), case.batch()
    full = method(batch, run_with(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = method(batch, run_with(0))
    for name in full:
        assert low[name].dtype == torch.float32
        assert low[name].item() == pytest.approx(full[name].item(), rel=0.1, abs=0.1)


@pytest.fixture(params=TEACHERS)
def taught(request):
    """A method with a teacher that is not its student's copy any more."""
    case = CASES[request.param]
    method = build(case).train()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return case, method


def test_teacher_matters_and_takes_no_gradient(taught):
    case, method = taught
    before = {k: v.clone() for k, v in method.teacher.named_parameters()}
    losses = method(case.batch(), run_with(0))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    trained = [name for name, p in method.student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) > 0.8 * len(list(method.student.parameters()))
    other = copy.deepcopy(method)
    with torch.no_grad():
        for p in other.teacher.parameters():
            p.mul_(torch.linspace(0.5, 1.5, p.shape[-1]))
    changed = other(case.batch(), run_with(0))
    assert abs(sum(changed.values()).item() - sum(losses.values()).item()) > 1e-3
    assert all(torch.equal(p, before[k]) for k, p in method.teacher.named_parameters())


def test_after_step_moves_teacher_and_queues(taught):
    case, method = taught
    teacher = {k: v.clone() for k, v in method.teacher.named_parameters()}
    student = dict(method.student.named_parameters())
    queues = {name: m for name, m in method.named_modules() if isinstance(m, KeyQueue)}
    before = {name: queue.keys.clone() for name, queue in queues.items()}
    method(case.batch(), run_with(0))
    for name, queue in queues.items():
        assert torch.equal(queue.keys, before[name])
        assert queue.pointer == 0
    method.after_step(0.5)
    m = momentum_at(0.5, method.momentum, method.schedule)
    for name, p in method.teacher.named_parameters():
        assert torch.allclose(p, m * teacher[name] + (1 - m) * student[name], atol=1e-6), name
    assert {name.partition(".")[0]: int(queue.pointer) for name, queue in queues.items()} == case.keys
    for name, queue in queues.items():
        count = int(queue.pointer)
        new, old = queue.keys[:count], before[name]
        assert torch.equal(queue.keys[count:], old[count:])
        assert not torch.isclose(new, old[:count]).all(1).any()
        assert torch.allclose(new.norm(dim=1), torch.ones(count), atol=1e-5)
        assert not new.requires_grad


def test_teachers_start_as_copies():
    for name in TEACHERS:
        method = build(CASES[name])
        for a, b in zip(method.student.state_dict().values(), method.teacher.state_dict().values()):
            assert torch.equal(a, b), name


# Two processes -------------------------------------------------------------------------------------


class Pair:
    """Two processes of a group, which run this file and take one case after the other: importing takes longer than the
    work."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(2):
            env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen([sys.executable, __file__], env=env, **pipes))

    def run(self, name, folder):
        """What both said of a case: "ok", or an error; "late" after two minutes."""
        for process in self.processes:
            process.stdin.write(f"{name} {folder}\n")
            process.stdin.flush()
        said = []
        for process in self.processes:
            ready, _, _ = select.select([process.stdout], [], [], 120)
            said.append(process.stdout.readline().strip() if ready else "late")
        return said

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def pairs():
    """The pair, in a list: a test that it failed leaves the next a new one."""
    made = [Pair()]
    yield made
    made[0].end()


def test_two_processes_are_one(case, tmp_path, pairs):
    """Losses and parameters after two steps, batch norm aside."""
    name = next(n for n, c in CASES.items() if c is case)
    said = pairs[0].run(name, tmp_path)
    if said != ["ok", "ok"]:
        pairs[0].end()
        pairs[0] = Pair()
    assert said == ["ok", "ok"]

    method = build(case)
    start = {k: v.clone() for k, v in method.state_dict().items()}
    alone = two_steps(method, case.batch(), case.lr)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for history in (r["history"] for r in results):
        for ours, theirs in zip(history, alone):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    moved = max(float((v - start[k]).abs().max()) for k, v in method.state_dict().items() if v.is_floating_point())
    assert moved > 1e-3  # the steps were no trifles next to the tolerance
    for key, value in method.state_dict().items():
        assert torch.equal(results[0]["state"][key], results[1]["state"][key]), key
        assert torch.allclose(results[0]["state"][key], value, rtol=1e-4, atol=max(1e-5, 1e-3 * moved)), key


def process_main():
    """One process of a pair: its share of each case's batch, through the loop's own wrapping."""
    torch.set_num_threads(1)
    devices = setup(None, "cpu", deterministic=False)
    for line in sys.stdin:
        name, folder = line.split()
        try:
            case = CASES[name]
            method = build(case)
            wrapped = wrap(method, devices, method.find_unused)
            batch = case.share(case.batch(), devices.rank, devices.world)
            history = two_steps(method, batch, case.lr, wrapped, devices.mean)
            torch.save({"history": history, "state": method.state_dict()}, Path(folder) / f"rank{devices.rank}.pt")
            print("ok", flush=True)
        except Exception as error:
            print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
    finish()


# Collapse alarm ------------------------------------------------------------------------------------


def alarm(folder, batches):
    """Log these features, one line each → the warnings."""
    monitor = Monitor(folder, len(batches), 0, 1, "test", tensorboard=False)
    for step, features in enumerate(batches):
        monitor.log(step + 1, 0.1, {"loss": 1.0}, features)
    monitor.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    file = folder / "warnings.txt"
    return (file.read_text().splitlines() if file.exists() else []), [line["feature_std"] for line in lines]


def test_alarm_on_identical_features(tmp_path):
    row = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    collapsed = row + 1e-4 * torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    warnings, stds = alarm(tmp_path, [collapsed] * 6)
    assert len(warnings) == 1  # said once, not at every line
    assert warnings[0].startswith("step 3: all images have nearly the same features")
    assert max(stds) < COLLAPSED


def test_alarm_needs_a_row_of_flat_lines(tmp_path):
    flat = torch.ones(8, 16)
    spread = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    warnings, stds = alarm(tmp_path, [flat, flat, spread, flat, flat])
    assert warnings == []
    assert stds[0] < COLLAPSED < 0.3 < stds[2]


def test_alarm_on_embeddings_that_point_one_way(tmp_path):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(8, 128, generator=generator)
    alike = spread + 20 * torch.randn(1, 128, generator=generator)
    monitor = Monitor(tmp_path, 9, 0, 1, "test", tensorboard=False)
    for step, embeddings in enumerate([alike, alike, spread, alike, 9 * alike, alike, alike, None, spread[:1]], 1):
        monitor.log(step, 0.1, {"loss": 1.0}, spread, embeddings)
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    over = [line["step"] for line in lines if line.get("similarity", 0) > ALIKE]
    assert over == [1, 2, 4, 5, 6, 7]
    pairs = F.cosine_similarity(spread[:, None], spread[None], dim=2)
    assert lines[2]["similarity"] == pytest.approx(float((pairs.sum() - 8) / 56), abs=1e-5)
    (warning,) = (tmp_path / "warnings.txt").read_text().splitlines()  # once, after three lines on end
    assert warning.startswith("step 6: the embeddings of different images point the same way (similarity 0.99")


def test_alarm_is_quiet_for_a_healthy_method(case, tmp_path):
    method, features = build(case).train(), []
    for seed in range(4):
        method(case.batch(), run_with(seed))
        features.append(method.features)
        if method.embeddings is not None:
            assert len(method.embeddings) == len(method.features)
            assert not method.embeddings.requires_grad
            assert -1 / 3 < similarity(method.embeddings) < ALIKE
    warnings, stds = alarm(tmp_path, features)
    assert warnings == []
    assert min(stds) > 2 * COLLAPSED


def test_feature_std_scale():
    even = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(even) == pytest.approx(1.0, abs=0.02)
    assert feature_std(7 * even) == pytest.approx(feature_std(even), rel=1e-5)
    assert feature_std(torch.ones(5, 64)) == pytest.approx(0.0, abs=1e-6)


if __name__ == "__main__":
    process_main()
