"""MAGICAL: the published NT-Xent, tone curves and masks, the paper's loss, validation that chooses, resume."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity_tools import deterministic, published

from medssl import train_magical
from medssl.datasets.base import Request
from medssl.datasets.phantoms import radiograph
from medssl.datasets.registry import open_splits
from medssl.datasets.splits import split_for_validation
from medssl.engine.checkpoint import load_safe
from medssl.engine.parallel import Run
from medssl.errors import InputError
from medssl.losses.contrastive import nt_xent
from medssl.models.encoders import IMAGENET, initialise, make_encoder
from medssl.train_magical import MAGICAL, complete, get_parser, main
from medssl.views.draws import Columns, Draws
from medssl.views.of_images import MaskedToneViews
from medssl.views.ops2d import change_tones, mask_cells

# The loss ------------------------------------------------------------------------------------------


def test_nt_xent_is_the_published_number():
    numbers = published("magical")
    shapes = numbers["inputs"]
    z1, z2 = (torch.from_numpy(deterministic.values(name, tuple(shapes[name]))) for name in ("z1", "z2"))
    loss = float(nt_xent(z1, z2, shapes["temperature"]))
    assert loss == pytest.approx(numbers["nt_xent"], rel=1e-4)
    assert loss / 0.7 == pytest.approx(numbers["supcon_published"], rel=1e-4)


def test_nt_xent_by_hand():
    z1 = torch.tensor([[2.0, 0], [0, 1]])
    z2 = torch.tensor([[1.0, 0], [0, 3]])
    # Every embedding has its partner at cosine 1 and two others at 0.
    expected = math.log(math.exp(1 / 0.5) + 2) - 1 / 0.5
    assert float(nt_xent(z1, z2, 0.5)) == pytest.approx(expected, rel=1e-6)
    # The same image twice in a batch is no negative, and nobody's positive but its own view's.
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)
    repeated = nt_xent(one[[0, 1, 2, 1]], two[[0, 1, 2, 1]], 0.5, torch.tensor([7, 3, 5, 3]))
    z = F.normalize(torch.cat([one[[0, 1, 2, 1]], two[[0, 1, 2, 1]]]), dim=1)
    numbers, terms = [7, 3, 5, 3] * 2, []
    for i in range(8):
        others = [j for j in range(8) if numbers[j] != numbers[i]]
        s = z[i] @ z[[(i + 4) % 8, *others]].T / 0.5
        terms.append(s.logsumexp(0) - s[0])
    assert float(repeated) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)
    equal = torch.ones(8, 4)
    assert float(nt_xent(equal, equal, 0.1)) == pytest.approx(math.log(15), rel=1e-6)


# Views ---------------------------------------------------------------------------------------------

X = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
CURVES = [
    [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1],
    [0, 0.387, 0.479, 0.5, 0.521, 0.613, 1],
    [0, 0.22, 0.385, 0.5, 0.615, 0.78, 1],
]


@pytest.mark.parametrize("curve", [0, 1, 2])
@pytest.mark.parametrize("falling", [False, True])
def test_tone_curves_have_the_published_values(curve, falling):
    numbers = torch.tensor([[(curve + 0.5) / 3, 0.1 if falling else 0.9]])
    y = change_tones(X.view(1, 1, 1, 7).expand(1, 3, 2, 7), Columns(numbers))
    expected = torch.tensor(CURVES[curve][::-1] if falling else CURVES[curve])
    assert (y - expected).abs().max() < 1e-3


def test_every_image_has_its_own_curve():
    n = 6000
    numbers = Draws((3,), n).uniform(0, 2)
    y = change_tones(torch.tensor([0.0, 0.1]).expand(n, 1, 1, 2), Columns(numbers))[:, 0, 0]
    kinds = {}
    for low, tenth in y.tolist():
        kinds[round(low), round(tenth, 2)] = kinds.get((round(low), round(tenth, 2)), 0) + 1
    assert set(kinds) == {(0, 0.1), (0, 0.39), (0, 0.22), (1, 0.9), (1, 0.61), (1, 0.78)}
    assert all(abs(count / n - 1 / 6) < 0.02 for count in kinds.values())


@pytest.mark.parametrize(("size", "ratio"), [(64, 0.25), (224, 0.25), (512, 0.75), (32, 0.0)])
def test_exactly_the_ratio_of_cells_is_black(size, ratio):
    x = torch.rand(5, 3, size, size) * 0.5 + 0.5
    y = mask_cells(x, Columns(Draws((1,), 5).uniform(0, 1024)), ratio, 32, 32)
    cells = y.unflatten(3, (32, -1)).unflatten(2, (32, -1))  # (N, C, 32, s, 32, s)
    black = (cells == 0).all(3).all(4)
    assert black.sum((2, 3)).eq(round(ratio * 1024)).all()
    assert torch.equal((cells == 0).any(3).any(4), black)  # cells whole
    assert torch.equal(black[:, :1].expand_as(black), black)  # channels alike
    assert torch.equal(y[y != 0], x[y != 0])
    assert ratio in (0, 1) or not torch.equal(black[0], black[1])


@pytest.mark.parametrize(("size", "ratio", "rows"), [(28, 0.25, 7), (50, 0.5, 25), (32, 0.0, 0)])
def test_stripes_are_whole_rows(size, ratio, rows):
    x = torch.rand(5, 3, size, size) * 0.5 + 0.5
    y = mask_cells(x, Columns(Draws((1,), 5).uniform(0, size)), ratio, size, 1)
    black = (y == 0).all(3)  # (N, C, H)
    assert black.sum(2).eq(rows).all()
    assert torch.equal(y[y != 0], x[y != 0])
    assert (y != 0).sum() == 5 * 3 * size * (size - rows)
    assert rows == 0 or not torch.equal(black[0], black[1])


def test_views_with_stripes_of_grey_images_as_three_channels():
    batch = {"image": torch.randint(1, 256, (4, 1, 32, 32), dtype=torch.uint8), "size": torch.full((4, 2), 32.0)}
    out = MaskedToneViews(**IMAGENET, size=32, mask="stripes", mask_ratio=0.5, channels=3)(batch, Draws((0, 1), 4))
    assert out["target"].shape == (4, 3, 32, 32)
    assert torch.equal(out["target"][:, 0], out["target"][:, 2])
    zero = (out["changed"] == MaskedToneViews(**IMAGENET).normalise(torch.zeros(1, 3, 1, 1))).all(1)
    assert zero.all(2).sum(1).ge(16).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_views(channels):
    image = torch.randint(0, 256, (4, channels, 28, 28), dtype=torch.uint8)
    views = MaskedToneViews(**IMAGENET, size=28)
    batch, draws = {"image": image, "size": torch.full((4, 2), 28.0)}, Draws((0, 1), 8, 2, 4)
    out = views(batch, draws)
    assert torch.allclose(out["target"], image / 255, atol=1e-5)
    assert torch.allclose(out["image"], views.normalise(image / 255), atol=1e-4)
    changed = mask_cells(
        change_tones(image / 255, Columns(draws.uniform(0, 2))), Columns(draws.uniform(1, 1024)), 0.25, 32, 32
    )
    assert torch.allclose(out["changed"], views.normalise(changed), atol=5e-2)
    part = views({key: value[1:3] for key, value in batch.items()}, Draws((0, 1), 8, 3, 2))  # another process
    assert torch.allclose(part["changed"], out["changed"][1:3], atol=1e-6)


def test_crops():
    """Two crops in training, of which the second is changed; whole images in validation."""
    image = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    batch, draws = {"image": image, "size": torch.full((4, 2), 64.0)}, Draws((0, 1), 4)
    views = MaskedToneViews(**IMAGENET, size=32, mask_ratio=0.0, crop_scale=0.2)
    out, plain = views(batch, draws), MaskedToneViews(**IMAGENET, size=32, mask_ratio=0.0)
    for name in ("image", "target"):
        assert (out[name] - plain(batch, draws)[name]).flatten(1).abs().amax(1).gt(0.1).all()
    assert (views.normalise(out["target"]) - out["image"]).flatten(1).abs().amax(1).gt(0.1).all()
    tones = change_tones(out["target"], Columns(draws.uniform(0, 2)))
    assert torch.allclose(out["changed"], views.normalise(tones), atol=1e-4)
    views.eval()
    assert torch.equal(views(batch, draws)["image"], plain(batch, draws)["image"])


# The method ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_the_papers():
    torch.manual_seed(0)
    method = MAGICAL("resnet18", channels=1).train()
    images = {"image": torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8), "size": torch.full((4, 2), 64.0)}
    batch = MaskedToneViews(**IMAGENET, size=64)(images, Draws((5,), 4))
    losses = method(batch, Run())
    net = method.network
    maps = net.encoder(torch.cat([batch["image"], batch["changed"]]))
    features = maps[-1].mean((2, 3))
    z = F.normalize(net.projector(features), dim=1)
    maps = [m[4:] for m in maps]
    restored = torch.sigmoid(net.output(net.decoder(maps)[-1]))
    assert float(losses["restoration"]) == pytest.approx(float((restored - batch["target"]).abs().mean()), rel=1e-5)
    s = torch.exp(z @ z.T / 0.1).fill_diagonal_(0)
    positive = torch.cat([s.diagonal(4), s.diagonal(-4)])
    assert float(losses["contrast"]) == pytest.approx(float(-(positive / s.sum(1)).log().mean()), rel=1e-4)
    assert torch.allclose(method.features, features[:4], atol=1e-5)


@pytest.mark.slow
def test_running_statistics_are_those_of_training(monkeypatch):
    """Validation, which chooses the epoch, sees what training sees; with a pass for each of x and x+ it did not."""
    torch.manual_seed(0)
    method = MAGICAL("resnet18", channels=1).train()
    monkeypatch.setattr(radiograph, "SPLITS", {"train": 8})
    image = open_splits(Request(image_size=32), ["train"])["train"]
    images = {key: torch.stack([image[i][key] for i in range(8)]) for key in ("image", "size")}
    batch = MaskedToneViews(**IMAGENET, size=32)(images, Draws((5,), 8))
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    for _ in range(40):
        losses = method(batch, Run())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    trained = float(losses["restoration"].detach())
    with torch.no_grad():
        restored = method.eval().network(batch["changed"])["restored"]
    assert trained < 0.1
    assert float(F.l1_loss(restored, batch["target"])) < 1.3 * trained


def test_networks_with_one_thing_changed():
    """Without skips, with a norm in the projector, with statistics of their own for images and changed ones."""
    g = torch.Generator().manual_seed(0)
    x, changed = torch.randn(8, 3, 32, 32, generator=g), 3 * torch.randn(8, 3, 32, 32, generator=g)
    torch.manual_seed(0)
    blind = MAGICAL("resnet18", skips=False)
    maps = [torch.randn(2, c, 32 >> i, 32 >> i) for i, c in enumerate(blind.network.encoder.out_channels)]
    one = blind.network.decode(maps)
    assert torch.equal(one, blind.network.decode([torch.randn_like(m) for m in maps[:-1]] + maps[-1:]))
    assert blind.decoder_state() is None
    assert isinstance(MAGICAL("resnet18", projector="norm").network.projector[1], torch.nn.BatchNorm1d)
    apart = MAGICAL("resnet18", joint=False).train()
    maps = apart.network.encoder(x)
    out = apart.network(x, changed)
    assert torch.allclose(out["features"], maps[-1].mean((2, 3)), atol=1e-4)  # as if the others were not there
    assert out["z"].shape == out["z_changed"].shape == (8, 128)
    together = MAGICAL("resnet18").train()
    together.load_state_dict(apart.state_dict())
    assert not torch.allclose(together.network(x, changed)["features"], out["features"], atol=1e-2)


def test_a_run_with_one_thing_changed(tmp_path):
    more = ["--crop-scale", "0.3", "--no-skips", "--projector", "norm", "--no-joint-norm", "--steps", "2"]
    main([*SMALL, *more, "--output", str(tmp_path)])
    content = load_safe(tmp_path / "encoder.pt")
    assert "decoder_state_dict" not in content
    assert initialise(make_encoder("resnet18"), "resnet18", str(tmp_path / "encoder.pt"))["missing"] == 0
    with pytest.raises(InputError, match="was started with skips False, now True"):
        main([*SMALL, "--crop-scale", "0.3", "--projector", "norm", "--no-joint-norm", "--output", str(tmp_path)])


def test_small_and_odd_images_keep_their_size():
    network = MAGICAL("resnet18").network
    for side in (28, 45):
        assert network(torch.zeros(2, 3, side, side))["restored"].shape == (2, 3, side, side)


# Runs ----------------------------------------------------------------------------------------------

SMALL = ["--arch", "resnet18", "--image-size", "32", "-b", "8", "--workers", "0", "--device", "cpu"]
SMALL += ["--ratio", "0.03"]  # 55 images train


def test_four_steps_are_two_and_two(tmp_path):
    """An epoch is 7 steps, and ends with a validation: what was best before the cuts must be known after them, and what
    the cuts validated must not count."""
    more = [*SMALL, "--epochs", "3", "--patience", "1"]
    main([*more, "--steps", "10", "--output", str(tmp_path / "a")])
    for steps in ("5", "9", "10"):
        main([*more, "--steps", steps, "--output", str(tmp_path / "b")])
    a, b = (load_safe(tmp_path / run / "last.pt") for run in "ab")
    assert a["best"]["epoch"] == b["best"]["epoch"]
    pairs = [(a["method"], b["method"]), (a["best"]["state"], b["best"]["state"])]
    a, b = (load_safe(tmp_path / run / "encoder.pt") for run in "ab")
    pairs += [(a[key], b[key]) for key in ("state_dict", "decoder_state_dict")]
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_best_restoration_is_exported(tmp_path, monkeypatch):
    """The second of three epochs is made the best, and is what the export holds; patience ends the run."""
    scores, seen = iter([0.5, 0.9, 0.7, 0.6, 0.6]), []

    def validate(network, *_):
        seen.append(network.encoder.conv1.weight.detach().clone())
        return {"score": next(scores)}

    monkeypatch.setattr(train_magical, "validate", validate)
    main([*SMALL, "--epochs", "9", "--patience", "2", "--output", str(tmp_path)])
    exported = load_safe(tmp_path / "encoder.pt")
    assert len(seen) == 4
    assert torch.equal(exported["state_dict"]["conv1.weight"], seen[1])
    assert exported["method"] == "MAGICAL"
    decoder = MAGICAL("resnet18").network.decoder
    decoder.load_state_dict(exported["decoder_state_dict"])
    assert initialise(make_encoder("resnet18"), "resnet18", str(tmp_path / "encoder.pt"))["missing"] == 0


def test_validation_is_the_mean_over_images(tmp_path):
    args = complete(get_parser().parse_args([*SMALL, "--output", str(tmp_path)]))
    data = open_splits(Request(image_size=32), ["train"])["train"].subset(range(20))
    method = MAGICAL("resnet18", channels=1).eval()
    views = MaskedToneViews(**IMAGENET, size=32).eval()
    devices = train_magical.setup(None, "cpu", True)
    found = [train_magical.validate(method.network, views, data, args, devices)["val_restoration"] for _ in range(2)]
    assert found[0] == found[1]
    errors = []
    for i in range(20):  # an image's changes are its own, whatever the batch
        batch = {key: data[i][key][None] for key in ("image", "size")}
        inputs = views(batch, Draws((0, i), 1))
        with torch.no_grad():
            restored = method.network(inputs["changed"])["restored"]
        errors.append((restored - inputs["target"]).abs().mean().item())
    assert found[0] == pytest.approx(sum(errors) / 20, rel=1e-5)


def test_patients_are_held_out_whole():
    data = open_splits(Request(image_size=32), ["train"])["train"].subset(range(200))
    data.patients = [str(i // 4) for i in range(200)]
    train, val = split_for_validation(data)
    assert len(set(val.patients)) == 5
    assert not set(val.patients) & set(train.patients)
    assert split_for_validation(data)[1].ids == val.ids
    data.patients = ["one"] * 200
    with pytest.raises(InputError, match="of one patient; some must validate"):
        split_for_validation(data)


@pytest.mark.parametrize(
    ("given", "size", "b", "lr", "epochs"),
    [
        ("lits", 512, 12, 1e-3, 200), ("chexpert", 224, 32, 2e-4, 200), ("pathMNIST", 28, 128, 1e-3, 100),
        ("chest", 224, 32, 2e-4, 200),
    ],
)  # fmt: skip
def test_published_defaults(given, size, b, lr, epochs):
    args = complete(get_parser().parse_args(["--data_set", given]))
    assert (args.image_size, args.b, args.lr, args.epochs) == (size, b, lr, epochs)
    assert (args.arch, args.betas, args.weight_decay, args.optimizer) == ("resnet50", [0.9, 0.99], 0, "adam")
    own = complete(get_parser().parse_args(["--data_set", given, "-b", "7", "--lr", "0.5"]))
    assert (own.image_size, own.b, own.lr) == (size, 7, 0.5)
    assert str(b) in get_parser().format_help()


def test_published_options(tmp_path):
    published = ["--suffix", "x", "--nb_class", "1", "--steps", "1", "--output", str(tmp_path / "o")]
    main([*SMALL, *published])
    assert load_safe(tmp_path / "o_x" / "last.pt")["method"]["network.output.weight"].shape[0] == 1
    main([*SMALL, "--nb_class", "3", "--steps", "1", "--mask", "stripes", "--output", str(tmp_path / "three")])
    assert load_safe(tmp_path / "three" / "last.pt")["method"]["network.output.weight"].shape[0] == 3
    with pytest.raises(InputError, match="--nb_class 2: images of phantom2d have 1 channels"):
        main([*SMALL, "--nb_class", "2", "--output", str(tmp_path / "p")])
    with pytest.raises(InputError, match="--grid 257: at most 256 cells"):
        main([*SMALL, "--grid", "257", "--output", str(tmp_path / "p")])
    with pytest.raises(InputError, match="--dataset nothing: unknown"):
        complete(get_parser().parse_args(["--data_set", "nothing"]))
