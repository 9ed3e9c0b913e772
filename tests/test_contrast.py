"""Teachers, queues, memory, mixtures, and the losses over them: MoCo, InsDis and C2L."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity_tools import assert_close, deterministic, published
from torch import nn

from medssl import (
    train_byol,
    train_c2l,
    train_concl,
    train_densecl,
    train_insdis,
    train_moco,
    train_pcl,
    train_pcrl,
    train_simclr,
)
from medssl.datasets.phantoms import ct
from medssl.engine.checkpoint import load_safe
from medssl.engine.parallel import Run
from medssl.errors import InputError
from medssl.losses.contrastive import InfoNCE, l2_normalize, make_contrast, similarities
from medssl.models.encoders import initialise, make_encoder
from medssl.models.heads import Embedder
from medssl.models.mixup import Mixup, mixing_weight
from medssl.models.momentum import ema_update, make_teacher, momentum_at
from medssl.models.queue import KeyQueue, MemoryBank
from medssl.train_c2l import C2L
from medssl.train_insdis import InsDis
from medssl.train_moco import MoCo


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=seeded(seed)), dim=1)


# Losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infonce", "nce"])
def test_three_published_steps(kind):
    """Losses, candidates, gradients and the queue. The published NCE cuts Z to an integer: so does this test, after
    checking that ours is the number before the cut."""
    numbers = published(f"queue_{kind}")

    def make(name, rows):
        return F.normalize(torch.from_numpy(deterministic.values(name, (rows, 16))), dim=1)

    queue, contrast = KeyQueue(32, 16), make_contrast(kind, temperature=0.2, images=1000)
    queue.keys.copy_(make("queue", 32))
    for i, step in enumerate(numbers["steps"]):
        q, k = make(f"q{i}", 12).requires_grad_(), make(f"k{i}", 12)
        s = similarities(q, k, queue.keys)
        if kind == "nce" and i == 0:
            contrast(s)
            z = float(contrast.first.exp())
            assert step["Z"] <= z < step["Z"] + 1
            contrast.first.fill_(math.log(step["Z"]))
        loss = contrast(s)
        loss.backward()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
        candidates = s / 0.2 if kind == "infonce" else contrast.log_probabilities(s).exp()
        assert_close(candidates, step["logits"], f"logits {i}")
        assert_close(q.grad, step["grad_q"], f"gradient {i}")
        queue.enqueue(k)
        contrast.after_step()
    assert_close(queue.keys, numbers["queue_after"], "queue")
    assert queue.pointer == numbers["pointer"]
    assert kind == "infonce" or float(contrast.log_z.exp()) == pytest.approx(numbers["steps"][0]["Z"], rel=1e-6)


def test_infonce_by_hand():
    s = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, -torch.inf]])
    e = [math.exp(2 * value) for value in (1, 0, -1)]
    expected = (-math.log(e[0] / sum(e)) + math.log(2)) / 2
    assert InfoNCE(0.5)(s).item() == pytest.approx(expected, rel=1e-6)


def test_infonce_of_chance_is_the_log_of_the_candidates():
    q, k, negatives = directions(512, 128), directions(512, 128, seed=1), directions(4096, 128, seed=2)
    assert InfoNCE(1.0)(similarities(q, k, negatives)).item() == pytest.approx(math.log(4097), abs=0.02)


def test_nce_by_hand():
    s = torch.tensor([[0.3, -0.2, 0.1]])
    contrast = make_contrast("nce", 0.5, images=10)
    p = [math.exp(value / 0.5) for value in (0.3, -0.2, 0.1)]
    z = sum(p) / 3 * 10
    noise = 2 / 10
    expected = -math.log(p[0] / z / (p[0] / z + noise + 1e-5))
    expected -= sum(math.log(noise / (one / z + noise + 1e-5)) for one in p[1:])
    assert contrast(s).item() == pytest.approx(expected, rel=1e-6)
    # The first call of the first step decides Z for its other calls, and for all steps.
    contrast(2 * s)
    assert contrast.log_z == -math.inf
    contrast.after_step()
    assert contrast.log_z.exp().item() == pytest.approx(z, rel=1e-6)
    contrast(5 * s)
    contrast.after_step()
    assert contrast.log_z.exp().item() == pytest.approx(z, rel=1e-6)
    again = make_contrast("nce", 0.5, images=10)
    again.load_state_dict(contrast.state_dict())
    assert again(s).item() == pytest.approx(expected, rel=1e-6)


def test_nce_of_a_low_temperature_is_finite():
    """exp(1/T) leaves float32 at T = .01."""
    s = torch.tensor([[1.0, 0.9, -torch.inf]], requires_grad=True)
    loss = make_contrast("nce", 0.001, images=10)(s)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def test_similarities_stay_exact_under_autocast():
    q, k, negatives = directions(4, 128), directions(4, 128, seed=1), directions(64, 128, seed=2)
    exact = similarities(q, k, negatives)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarities(q, k, negatives), exact)
    q.requires_grad_()
    k.requires_grad_()
    similarities(q, k, negatives).sum().backward()
    assert k.grad is None
    assert q.grad is not None


def test_l2_normalize():
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.bfloat16)
    assert torch.equal(l2_normalize(x), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


# Teacher, queue, memory ----------------------------------------------------------------------------


def test_teacher_follows():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = make_teacher(student)
    start = {key: value.clone() for key, value in teacher.state_dict().items()}
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    student[1].running_mean.fill_(7)
    ema_update(teacher, student, 0.9)
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, start[name] + 0.1, atol=1e-6), name
    assert torch.equal(teacher[1].running_mean, torch.zeros(3))  # its own
    assert torch.equal(student[0].weight, start["0.weight"] + 1)


def test_momentum_schedules():
    assert [momentum_at(p, 0.996, "cosine") for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    assert [momentum_at(p, 0.996, "constant") for p in (0, 0.5, 1)] == [0.996] * 3


def test_queue_wraps_around():
    queue, expected, written = KeyQueue(10, 4), None, 0
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    expected = queue.keys.clone()
    for count in (3, 4, 7, 10, 1, 23):  # also as many as fit, and more
        keys = directions(count, 4, seed=count)
        for key in keys:
            expected[written % 10] = key
            written += 1
        queue.enqueue(keys)
        assert torch.equal(queue.keys, expected)
        assert queue.pointer == written % 10


def test_memory_bank():
    bank = MemoryBank(5, 4)
    before, new = bank.slots.clone(), directions(3, 4, seed=9)
    bank.update(torch.tensor([4, 1, 4]), new, 0.5)
    mixed = F.normalize(0.5 * before + 0.5 * new[[0, 1, 0, 0, 2]], dim=1)
    assert torch.allclose(bank.slots[[1, 4]], mixed[[1, 4]])  # the last of two that are the same counts
    assert torch.equal(bank.slots[[0, 2, 3]], before[[0, 2, 3]])


def test_mixup():
    run = Run(generator=seeded(4))
    mix = Mixup.draw(run, 6)
    x = torch.randn(6, 2, 3)
    assert 0.5 <= mix.weight <= 1
    assert sorted(mix.order.tolist()) == list(range(6))
    assert torch.allclose(mix(x), mix.weight * x + (1 - mix.weight) * x[mix.order], atol=1e-6)
    weights = torch.tensor([mixing_weight(run) for _ in range(2000)])
    assert weights.min() >= 0.5
    assert weights.mean().item() == pytest.approx(0.75, abs=0.02)
    assert weights.std().item() == pytest.approx(0.5 / 12**0.5, abs=0.01)  # uniform


class TwoParts(Run):
    """Networks see halves of a batch, as on two devices."""

    parts = 2

    def __call__(self, net, *inputs, **options):
        return torch.cat([net(*half, **options) for half in zip(*(x.chunk(2) for x in inputs))])


def test_shuffled_halves_are_normalised_with_others_and_put_back():
    x = torch.arange(8.0)[:, None]
    seen = []

    class Centre(nn.Module):
        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return x - x.mean()  # as batch norm does

    out = TwoParts(generator=seeded(1)).shuffled(Centre(), x)
    assert sorted(seen[0] + seen[1]) == x[:, 0].tolist()
    assert set(seen[0]) not in ({0, 1, 2, 3}, {4, 5, 6, 7})  # other company than in order
    means = {value: sum(half) / 4 for half in seen for value in half}
    assert out[:, 0].tolist() == [value - means[value] for value in x[:, 0].tolist()]
    # One device draws as much, so that what is drawn next is the same.
    one, two = Run(generator=seeded(1)), TwoParts(generator=seeded(1))
    assert torch.equal(one.shuffled(nn.Identity(), x), two.shuffled(nn.Identity(), x))
    assert torch.equal(one.permutation(5), two.permutation(5))


def test_shuffled_puts_every_output_back():
    class Many(nn.Module):
        def forward(self, x):
            return {"a": x, "b": [x + 1, (x + 2,)]}

    class Whole(Run):
        parts = 2

    x = torch.arange(6.0)[:, None].requires_grad_()
    out = Whole(generator=seeded(0)).shuffled(Many(), x)
    assert torch.equal(out["a"], x)
    assert torch.equal(out["b"][0], x + 1)
    assert torch.equal(out["b"][1][0], x + 2)
    assert not out["a"].requires_grad


# Methods -------------------------------------------------------------------------------------------


@pytest.fixture
def views():
    x = torch.randn(6, 3, 32, 32, generator=seeded(5))
    return {"view1": x, "view2": x + 0.3 * torch.randn(x.shape, generator=seeded(6)), "index": torch.arange(6)}


def test_c2l_is_the_papers_loss(views):
    """Recomputed step by step; keys enter the queue in the order of the terms."""
    torch.manual_seed(0)
    method = C2L(queue=40).train()
    reference = C2L(queue=40).train()
    reference.load_state_dict(method.state_dict())
    losses = method(views, Run(generator=seeded(7)))

    generator = seeded(7)
    torch.randperm(6, generator=generator)  # Shuffle-BN of k
    lam = torch.rand((), generator=generator).item()
    lam, order = max(lam, 1 - lam), torch.randperm(6, generator=generator)

    def mix(a):
        return lam * a + (1 - lam) * a[order]

    f, teacher = (lambda x: reference.student(x)[1]), (lambda x: reference.teacher(x)[1])
    q, k = f(views["view1"]), teacher(views["view2"])
    q2, k2 = f(mix(views["view1"])), teacher(mix(views["view2"]))
    pairs = {"contrast": (q, k), "mixed_images": (q2, k2), "mixed_features": (q2, mix(k))}
    assert list(losses) == list(pairs)
    for name, (a, b) in pairs.items():
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        s = torch.cat([(a * b).sum(1, keepdim=True), a @ method.contrast.queue.keys.T], 1) / 0.07
        assert losses[name].item() == pytest.approx(F.cross_entropy(s, torch.zeros(6).long()).item() / 3, rel=1e-4)
    before = method.contrast.queue.keys.clone()
    method.after_step(0.1)
    assert method.contrast.queue.pointer == 18
    for i, key in enumerate((k, k2, mix(k))):
        assert torch.allclose(method.contrast.queue.keys[6 * i : 6 * i + 6], F.normalize(key, dim=1), atol=1e-5)
    assert torch.equal(method.contrast.queue.keys[18:], before[18:])


def test_without_mixup_c2l_is_moco(views):
    torch.manual_seed(0)
    c2l = C2L(queue=40, temperature=0.07, mixup=False).train()
    moco = MoCo(version=1, queue=40, temperature=0.07).train()
    moco.load_state_dict(c2l.state_dict())
    losses = [method(views, Run(generator=seeded(0))) for method in (c2l, moco)]
    assert losses[0].keys() == losses[1].keys() == {"contrast"}
    assert losses[0]["contrast"].item() == losses[1]["contrast"].item()


def test_moco_versions(views):
    assert isinstance(MoCo(version=1).student.head, nn.Linear)
    assert [type(layer) for layer in MoCo(version=2).student.head] == [nn.Linear, nn.ReLU, nn.Linear]
    for version, temperature in ((1, 0.07), (2, 0.2)):
        args = train_moco.get_parser().parse_args(["--version", str(version)])
        assert args.temperature is None
        assert train_moco.VERSIONS[version]["temperature"] == temperature


def test_insdis_is_the_papers_loss(views):
    torch.manual_seed(0)
    method = InsDis(images=9, negatives=5).train()
    slots = method.memory.slots.clone()
    loss = method(views, Run(generator=seeded(3)))["contrast"]
    drawn = torch.randint(9, (5,), generator=seeded(3))
    assert set(drawn.tolist()) & set(range(6))  # some query's own slot is among them
    z = F.normalize(method.train().student(views["view1"])[1], dim=1)
    terms = []
    for i in range(6):
        candidates = torch.cat([slots[i : i + 1], slots[drawn[drawn != i]]])
        terms.append(F.cross_entropy(candidates @ z[i] / 0.07, torch.tensor(0)))
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    method.after_step(0.1)
    assert torch.allclose(method.memory.slots[:6], F.normalize(slots[:6] + z, dim=1), atol=1e-5)
    assert torch.equal(method.memory.slots[6:], slots[6:])


# Scripts -------------------------------------------------------------------------------------------

SCRIPTS = {
    "c2l": (train_c2l, ["--queue", "40"]),
    "c2l_nce": (train_c2l, ["--queue", "40", "--loss", "nce"]),
    "moco1": (train_moco, ["--queue", "40", "--version", "1", "--ema-schedule", "cosine"]),
    "moco2_nce": (train_moco, ["--queue", "40", "--loss", "nce"]),
    "moco2": (train_moco, ["--queue", "40"]),
    "insdis": (train_insdis, ["--negatives", "16"]),
    "insdis_nce": (train_insdis, ["--negatives", "16", "--loss", "nce"]),
    "simclr": (train_simclr, []),
    "byol": (train_byol, []),
    "densecl": (train_densecl, ["--queue", "40"]),
    "pcl": (  # 20 images, 5 steps an epoch; prototypes from the second step on, made anew at the sixth
        train_pcl,
        ["--queue", "40", "--ratio", "0.01", "--clusters", "3", "6", "--epochs", "2", "--warm-up", "0.3"],
    ),
    "concl": (train_concl, ["--queue", "40", "--concepts", "3", "--epochs", "1", "--warm-up", "0.003"]),
    "pcrl_nce": (train_pcrl, ["--queue", "40", "--loss", "nce"]),
    "pcrl": (train_pcrl, ["--queue", "40"]),
    "pcrl_3d": (
        train_pcrl,
        ["--queue", "40", "--d", "3", "--arch", "unet3d_quarter", "--cube-size", "16", "16", "16"],
    ),
}
SMALL = ["--b", "4", "--workers", "0", "--device", "cpu", "--log-every", "1"]


# Whose parts (queue, memory, teacher, a decoder) the others have too.
SAME_PARTS = ("c2l_nce", "moco1", "moco2_nce", "insdis_nce", "byol", "densecl", "concl", "pcrl_nce")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SAME_PARTS)) for name in SCRIPTS])
def script(request, monkeypatch):
    monkeypatch.setattr(ct, "SPLITS", {"train": 60})
    module, more = SCRIPTS[request.param]
    sides = [] if "3d" in request.param else ["--image-size", "32"]
    return lambda steps, output: module.main([*SMALL, *sides, *more, "--steps", str(steps), "--output", str(output)])


def test_four_steps_are_two_and_two(script, tmp_path, request):
    """The state is the same to the last bit: weights, teacher, queue, pointer, memory, Z."""
    script(4, tmp_path / "whole")
    script(2, tmp_path / "parts")
    script(4, tmp_path / "parts")
    whole, parts = (load_safe(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    kept = [key for key in whole["method"] if {"teacher", "queue", "memory", "log_z"} & {*key.split(".")}]
    assert kept or "simclr" in request.node.name  # which has its weights alone
    for key in kept:
        assert not key.endswith("log_z") or whole["method"][key].isfinite()  # estimated, and not anew after the pause
    for key, value in whole["method"].items():
        assert torch.equal(value, parts["method"][key]), key
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert lines[-1]["loss"] == pytest.approx(whole_loss(tmp_path / "whole"))
    encoder = load_safe(tmp_path / "whole/encoder.pt")
    network = make_encoder(encoder["arch"], dims=encoder["dims"])
    assert initialise(network, encoder["arch"], str(tmp_path / "whole/encoder.pt"))["missing"] == 0
    assert len(list((tmp_path / "whole/samples").glob("*.png"))) == 2


def whole_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def test_another_queue_is_not_continued(tmp_path):
    module, more = SCRIPTS["moco2"]
    command = [*SMALL, "--image-size", "32", *more, "--steps", "1", "--output", str(tmp_path)]
    module.main(command)
    with pytest.raises(InputError, match="was started with queue 40, now 50"):
        module.main([*command, "--queue", "50", "--steps", "2"])


COMMON = ["--temperature", "0.3", "--jitter", "0.1", "0.2", "0.3", "0.4", "--blur", "0.7", "--crop-scale", "0.6"]
TAUGHT = ["--queue", "40", "--ema", "0.7", "--ema-schedule", "cosine"]


@pytest.mark.parametrize("kind", ["infonce", "nce"])
@pytest.mark.parametrize(
    ("module", "more", "negatives"),
    [
        (train_c2l, [*TAUGHT, "--no-mixup"], 40), (train_moco, [*TAUGHT, "--version", "1"], 40),
        (train_insdis, ["--negatives", "40", "--memory-momentum", "0.7"], 40), (train_pcrl, TAUGHT, 40),
    ],
)  # fmt: skip
def test_options_reach_the_method_and_its_views(module, more, negatives, kind, tmp_path, monkeypatch):
    weights = make_encoder("resnet18").state_dict()
    torch.save({"state_dict": weights, "arch": "resnet18", "dims": 2}, tmp_path / "start.pt")
    seen = []
    monkeypatch.setattr(module, "pretrain", lambda *given: seen.append(given))
    given = ["--init", str(tmp_path / "start.pt"), "--output", str(tmp_path / "out"), "--loss", kind]
    module.main([*SMALL, "--image-size", "32", *COMMON, *more, *given])
    ((method, data, views, _, _),) = seen
    loss = getattr(method.contrast, "loss", method.contrast)
    assert loss.temperature == 0.3
    assert type(loss).__name__.lower() == kind
    assert kind == "infonce" or loss.images == len(data)
    assert method.momentum == 0.7
    assert torch.equal(method.student.encoder.state_dict()["conv1.weight"], weights["conv1.weight"])
    if module is not train_insdis:
        assert method.schedule == "cosine"
        assert len(method.contrast.queue.keys) == negatives
        for key, value in method.student.state_dict().items():
            assert torch.equal(method.teacher.state_dict()[key], value), key
    else:
        assert (method.negatives, len(method.memory.slots)) == (negatives, len(data))
    assert (views.jitter, views.blur, views.scale, views.size) == ([0.1, 0.2, 0.3, 0.4], 0.7, (0.6, 1.0), 32)
    assert module is not train_c2l or not method.mixup
    assert module is not train_moco or isinstance(method.student.head, nn.Linear)


@pytest.mark.parametrize(
    ("version", "temperature", "schedule", "jitter", "chance", "blur"),
    [(1, 0.07, "step", [0.4, 0.4, 0.4, 0.4], 1.0, 0.0), (2, 0.2, "cosine", [0.4, 0.4, 0.4, 0.1], 0.8, 0.5)],
)
def test_moco_recipes(version, temperature, schedule, jitter, chance, blur, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_moco, "pretrain", lambda *given: seen.append(given))
    train_moco.main([*SMALL, "--version", str(version), "--epochs", "50", "--queue", "8", "--output", str(tmp_path)])
    ((method, _, views, args, _),) = seen
    assert (method.contrast.loss.temperature, args.schedule, args.milestones) == (temperature, schedule, [30, 40])
    assert (views.jitter, views.jitter_chance, views.blur) == (jitter, chance, blur)


def test_one_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="1 image; there is nothing to tell it from"):
        train_insdis.main([*SMALL, "--ratio", "0.0005", "--output", str(tmp_path)])


@pytest.mark.parametrize("module", [train_c2l, train_moco, train_insdis])
def test_volumes_are_refused(module, tmp_path):
    with pytest.raises(InputError, match="data set phantom3d has 3 dimensions, and this method takes images of 2"):
        module.main([*SMALL, "--d", "3", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_published_commands():
    """C2L's, with the script's name changed."""
    line = "--model resnet18 --batch_size 128 --num_workers 24"
    args = train_c2l.get_parser().parse_args(line.split())
    assert (args.arch, args.b, args.workers) == ("resnet18", 128, 24)
    recipe = (args.lr, args.momentum, args.weight_decay, args.epochs, args.milestones, args.schedule, args.gamma)
    assert recipe == (0.03, 0.9, 1e-4, 120, [60, 80, 100], "step", 0.1)
    assert (args.queue, args.temperature, args.ema, args.loss, args.mixup) == (16384, 0.07, 0.999, "infonce", True)
    assert (args.crop_scale, args.rotation, args.blur, args.cutout, args.jitter) == (0.2, 10, 0, 32, [0.4] * 4)
    assert train_c2l.get_parser().parse_args(["--model", "densenet121"]).arch == "densenet121"


@pytest.mark.parametrize(("arch", "prefix"), [("resnet18", "encoder.module."), ("densenet121", "densenet121.module.")])
def test_published_c2l_files_load(tmp_path, arch, prefix):
    encoder = make_encoder(arch)
    state = {prefix + key: value for key, value in encoder.state_dict().items()}
    state[prefix + ("fc.weight" if arch == "resnet18" else "classifier.0.weight")] = torch.zeros(128, 8)
    contrast = {"params": torch.zeros(5), "memory": torch.zeros(4, 128)}
    torch.save({"model": state, "contrast": contrast, "model_ema": state, "epoch": 3}, tmp_path / "c2l.pth")
    other = make_encoder(arch)
    report = initialise(other, arch, str(tmp_path / "c2l.pth"))
    assert report["missing"] == 0
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_densenet_trains(tmp_path):
    train_c2l.main(
        [*SMALL, "--arch", "densenet121", "--queue", "8", "--image-size", "32", "--steps", "1", "--b", "2", "--output"]
        + [str(tmp_path)]
    )
    assert load_safe(tmp_path / "encoder.pt")["arch"] == "densenet121"


def test_embedder():
    embedder = Embedder(make_encoder("resnet18"), nn.Linear(512, 7))
    features, z = embedder(torch.randn(2, 3, 32, 32))
    assert (features.shape, z.shape) == ((2, 512), (2, 7))
