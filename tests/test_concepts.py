"""ConCL: the published k-means, maps and means, views, keys of their own image; SimCLR, BYOL and DenseCL by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_tools import assert_close, deterministic, published
from test_methods import HalvedRun, batch_norm_eval, concept_batch, run_with

from medssl import train_byol, train_concl, train_densecl, train_pcl, train_simclr
from medssl.engine.checkpoint import load_safe
from medssl.engine.order import make_optimizer
from medssl.engine.parallel import Run
from medssl.errors import InputError
from medssl.models.concepts import concept_means, cosine_kmeans, random_pixels, view_maps
from medssl.models.encoders import IMAGENET, initialise, make_encoder
from medssl.train_byol import BYOL
from medssl.train_concl import ConCL
from medssl.train_densecl import match
from medssl.train_pcl import PCL, cluster
from medssl.views.draws import Columns, Draws
from medssl.views.of_images import ConceptViews, MultiCropViews
from medssl.views.ops2d import box_around, sample, solarise


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Concepts ------------------------------------------------------------------------------------------


def test_published_concepts():
    """Assignments and maps exactly; centroids and prototypes to 1e-5."""
    numbers = published("concl")
    inputs = numbers["inputs"]

    def make(name):
        return torch.from_numpy(deterministic.values(name, tuple(inputs[name])))

    seeds = torch.tensor(inputs["kmeans_start_indices"])
    spare = seeds.expand(inputs["iterations"], *seeds.shape)
    clusters, centroids = cosine_kmeans(make("reference"), seeds, spare)
    assert clusters.tolist() == numbers["assignments"]
    assert_close(centroids, numbers["centroids"], "centroids", 1e-5)
    fine = clusters.view(2, 7, 7).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for view in "qk":
        maps = view_maps(fine, torch.tensor(inputs[f"transforms_{view}"]), 4, 7)
        assert maps.tolist() == numbers[f"view_map_{view}"]
        means, there = concept_means(make(f"{view}_map"), maps, 4)
        assert there.all()
        assert_close(means.flatten(0, 1), numbers[f"prototypes_{view}"], view, 1e-5)


def test_an_empty_cluster_takes_a_spare_pixel():
    x = torch.eye(4).repeat_interleave(3, 0)[None]  # 12 pixels in 4 directions
    seeds = torch.tensor([[0, 1, 3]])  # two of the same direction: the second stays empty
    clusters, centroids = cosine_kmeans(x, seeds, torch.tensor([[[9, 9, 9]]]))
    assert torch.equal(centroids[0, 1], x[0, 9])
    clusters, _ = cosine_kmeans(x, seeds, torch.tensor([[[9, 9, 9]]] * 3))
    assert clusters[0].tolist() == [0] * 3 + [2] * 3 + [0] * 3 + [1] * 3


def test_random_pixels():
    seeds, spare = random_pixels(run_with(0), 5, 9, 6, 10)
    assert all(len(set(row)) == 6 for row in seeds.tolist())
    assert (spare.shape, int(spare.min()), int(spare.max())) == ((10, 5, 6), 0, 8)
    few, _ = random_pixels(run_with(0), 5, 4, 6, 10)
    assert few.shape == (5, 6)
    assert set(few.flatten().tolist()) == set(range(4))


def test_of_concepts_that_cover_a_cell_alike_the_first_wins():
    """Counted; shares of a cell, summed in floating point, differ in their last bits."""
    clusters = torch.randint(0, 3, (64, 10, 10), generator=torch.Generator().manual_seed(1))
    maps = view_maps(clusters, torch.tensor([[0.0, 0, 1, 1, 0]]).expand(64, 5), 3, 4)
    bins = [slice(i * 10 // 4, -(-(i + 1) * 10 // 4)) for i in range(4)]
    counts = [[F.one_hot(clusters[:, rows, columns].flatten(1), 3).sum(1) for columns in bins] for rows in bins]
    counted = torch.stack([torch.stack(row, 1) for row in counts], 1)  # (64, 4, 4, 3)
    best, second = counted.topk(2, dim=3).values.unbind(3)
    assert (best == second).float().mean() > 0.1
    assert torch.equal(maps, counted.argmax(3))


def test_view_maps_are_adaptive_averages():
    g = seeded(0)
    for _ in range(40):
        clusters = torch.randint(0, 8, (4, 14, 14), generator=g)
        low = 0.7 * torch.rand(4, 2, generator=g)
        boxes = torch.cat([low, low + 0.01 + (0.99 - low) * torch.rand(4, 2, generator=g)], 1)
        boxes = torch.cat([boxes, (torch.rand(4, 1, generator=g) < 0.5).float()], 1)
        maps = view_maps(clusters, boxes, 8, 7)
        one_hot = F.one_hot(clusters, 8).permute(0, 3, 1, 2).float()
        for i, (*box, mirrored) in enumerate(boxes.tolist()):
            top, left, bottom, right = (round(14 * side) for side in box)
            part = one_hot[i : i + 1, :, top : max(bottom, top + 1), left : max(right, left + 1)]
            expected = F.adaptive_avg_pool2d(part, 7).argmax(1)[0]
            assert torch.equal(maps[i], expected.flip(1) if mirrored else expected)


def test_concept_means_by_hand():
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    means, there = concept_means(maps, torch.tensor([[[0, 0], [2, 0]]]), 3)
    assert there.tolist() == [[True, False, True]]
    assert torch.allclose(means[0, 0], torch.tensor([4 / 3, 16 / 3]))
    assert means[0, 1].tolist() == [0, 0]
    assert means[0, 2].tolist() == [2, 6]


# Views ---------------------------------------------------------------------------------------------


def test_boxes_say_where_views_lie():
    """Views of an image that holds its own coordinates."""
    axis = torch.linspace(0, 255, 96).round().to(torch.uint8)
    texture = torch.stack([axis.expand(96, 96), axis[:, None].expand(96, 96), 128 * torch.ones(96, 96).byte()])
    batch = {"image": texture.expand(6, 3, 96, 96).contiguous(), "size": torch.tensor([[96.0, 96.0]] * 6)}
    views = ConceptViews([0] * 3, [1] * 3, size=32, gray=0.0, blur=0.0, jitter=(0, 0, 0, 0), scale=(0.2, 0.6))
    out = views(batch, Draws((0, 1), 6))
    assert out["reference"].shape == (6, 3, 32, 32)
    reference = out["reference"]
    for view, box in ((out["view1"], out["box1"]), (out["view2"], out["box2"])):
        for i in range(6):
            top, left, bottom, right, mirrored = box[i].tolist()
            first, last = reference[i, :2].amin((1, 2)), reference[i, :2].amax((1, 2))
            shown = view[i].flip(2) if mirrored else view[i]
            assert shown[0, 0, 0] < shown[0, 0, -1]  # the flag says which views are mirrored
            for channel, sides in enumerate([(left, right), (top, bottom)]):
                expected = first[channel] + (last[channel] - first[channel]) * torch.tensor(sides)
                assert torch.allclose(torch.stack(shown[channel].aminmax()), expected, atol=0.03)
    assert {bool(m) for box in (out["box1"], out["box2"]) for m in box[:, 4]} == {True, False}


def test_the_reference_is_the_smallest_box():
    crops = MultiCropViews([0], [1]).random_crops(
        torch.full((50, 2), 64.0), Columns(torch.rand(50, 48)), 2, (0.2, 1), 0
    )
    whole, boxes = box_around(crops)
    assert torch.allclose(boxes[..., :2].amin(1), torch.zeros(50, 2), atol=1e-5)
    assert torch.allclose(boxes[..., 2:4].amax(1), torch.ones(50, 2), atol=1e-5)
    assert (boxes[..., 2:4] > boxes[..., :2]).all()
    assert (whole[:, 0, 0] > 0).all()


def test_solarise():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3).repeat(3, 1, 1, 1)
    out = solarise(x, Columns(torch.tensor([[0.5], [0.5], [0.5]])), torch.tensor([0.0, 0.4, 0.6]))
    assert torch.equal(out[:2], x[:2])
    assert torch.allclose(out[2].flatten(), torch.tensor([0.2, 0.5, 0.1]))


def test_views_blur_and_solarise_by_their_own_chances():
    noise = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=seeded(0))
    batch = {"image": noise, "size": torch.full((8, 2), 32.0)}
    same = {"size": 32, "jitter": (0, 0, 0, 0), "gray": 0.0, "degrees": 0.0, "hole": 0, "locals_": 0, "targets": 0,
            "scale": (1.0, 1.0)}  # fmt: skip
    plain = MultiCropViews([0] * 3, [1] * 3, blur=0.0, **same)(batch, Draws((0, 1), 8))
    views = MultiCropViews([0] * 3, [1] * 3, blur=(1.0, 0.0), blur_sigma=(1.0, 2.0), solarised=(0.0, 1.0), **same)
    out = views(batch, Draws((0, 1), 8))
    assert (out["view1"].std((1, 2, 3)) < 0.5 * plain["view1"].std((1, 2, 3))).all()
    assert torch.allclose(out["view2"], torch.where(plain["view2"] >= 0.5, 1 - plain["view2"], plain["view2"]))


def test_jitter_comes_first_where_it_should(monkeypatch):
    order = []
    for name in ("random_gray", "random_blur", "color_jitter"):
        monkeypatch.setattr(f"medssl.views.of_images.{name}", lambda x, *_, name=name, **more: order.append(name) or x)
    for first in (True, False):
        MultiCropViews([0], [1], jitter_first=first).color(torch.zeros(1, 3, 4, 4), Columns(torch.rand(1, 12)))
    assert order == ["color_jitter", "random_gray", "random_blur", "random_gray", "random_blur", "color_jitter"]


# ConCL ---------------------------------------------------------------------------------------------


def concepts_alone(**more):
    """ConCL after its warm-up, its teacher a copy of the student, with fixed statistics."""
    torch.manual_seed(1)
    return batch_norm_eval(ConCL(queue=60, concepts=3, warm_up=0.0, **more))


class ForgetfulRun(HalvedRun):
    """The published defect: embeddings are put back in order, maps are not."""

    def shuffled(self, net, x):
        state = self.generator.get_state()
        out = super().shuffled(net, x)
        self.generator.set_state(state)
        order = self.permutation(len(x))
        return out | {"maps": [self.rows(m, order) for m in out["maps"]]}


@pytest.mark.parametrize("kind", ["plain", "halves", "published"])
def test_keys_are_of_their_own_image(kind):
    """Where both views are one and the teacher is the student, every concept's key is its query."""
    method, batch = concepts_alone(), concept_batch()
    batch |= {"view2": batch["view1"], "box2": batch["box1"]}
    seen = []
    method.concept_contrast.register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    run = {"plain": Run, "halves": HalvedRun, "published": ForgetfulRun}[kind]
    method(batch, run_with(0, run))
    ((q, k),) = seen
    assert len(q) == len(k) > 8
    same = F.cosine_similarity(q, k)
    assert (same > 0.9999).all() == (kind != "published")


def test_concl_loss_is_the_papers():
    method, batch = concepts_alone(weight=0.7), concept_batch()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(p.numel())))
    losses = method(batch, run_with(0))
    assert set(losses) == {"concept", "instance"}
    reference = concepts_alone(weight=0.7)
    reference.load_state_dict(method.state_dict())
    run = run_with(0)
    run.permutation(8)  # the teacher's order
    q, k = reference.student(batch["view1"]), reference.teacher(batch["view2"])
    layer3 = reference.teacher(batch["reference"])["maps"][-2]
    assert layer3.shape == (8, 256, 4, 4)
    seeds, spare = random_pixels(run, 8, 16, 3, 10)
    concepts = cosine_kmeans(layer3.flatten(2).transpose(1, 2), seeds, spare)[0].view(8, 4, 4)
    total, count = 0.0, 0
    for i in range(8):
        one, other = (view_maps(concepts[i : i + 1], batch[f"box{v}"][i : i + 1], 3, 2)[0] for v in (1, 2))
        for c in range(3):
            if (one == c).any() and (other == c).any():
                a = F.normalize(reference.student.head(q["maps"][-1][i][:, one == c].mean(1)), dim=0)
                b = F.normalize(reference.teacher.head(k["maps"][-1][i][:, other == c].mean(1)), dim=0)
                s = torch.cat([(a @ b)[None], method.concept_contrast.queue.keys @ a]) / 0.2
                total, count = total - F.log_softmax(s, 0)[0], count + 1
    assert losses["concept"].item() == pytest.approx(0.7 * total.item() / count, rel=1e-4)
    s = torch.cat([(F.normalize(q["z"]) * F.normalize(k["z"])).sum(1, keepdim=True),
                   F.normalize(q["z"]) @ method.contrast.queue.keys.T], 1) / 0.2  # fmt: skip
    instance = F.cross_entropy(s, torch.zeros(8, dtype=torch.int64))
    assert losses["instance"].item() == pytest.approx(0.3 * instance.item(), rel=1e-4)


def test_warm_up_and_weight():
    method, batch = ConCL(queue=60, concepts=3, warm_up=0.5).train(), concept_batch()
    assert set(method(batch, run_with(0))) == {"instance"}
    method.after_step(0.5)
    assert method.concept_contrast.queue.pointer == 0
    assert set(method(batch, run_with(0))) == {"concept"}
    method.after_step(0.6)
    assert method.concept_contrast.queue.pointer == 24
    other = ConCL(queue=60, concepts=3, warm_up=0.5).train()
    other.load_state_dict(method.state_dict())  # a continuation knows how far the run is
    assert set(other(batch, run_with(0))) == {"concept"}


@pytest.mark.parametrize(("concepts", "expected"), [(3, 3), (8, 8), (12, 4)])
def test_a_fixed_number_of_keys_enters_the_queue(concepts, expected):
    method, run = ConCL(queue=60, concepts=concepts, warm_up=0.0), run_with(0)
    k = F.normalize(torch.randn(5, concepts, 128, generator=seeded(0)), dim=2)
    for both in (torch.ones(5, concepts).bool(), torch.eye(5, concepts).bool(), torch.zeros(5, concepts).bool()):
        keys = method.choose_keys(k, both, run)
        if not both.any():
            assert len(keys) == 0
            continue
        assert len(keys) == expected * 5
        rows = (keys[:, None] == k[both][None]).all(2)
        assert rows.any(1).all()  # nothing but keys of concepts in both views
        used = rows.sum(0)
        assert used.max() - used.min() <= 1  # each as often as the others, or once more


def test_no_concept_in_both_views():
    method, batch = concepts_alone(), concept_batch()
    corners = torch.tensor([0.0, 0.0, 0.01, 0.01, 0.0]), torch.tensor([0.99, 0.99, 1.0, 1.0, 0.0])
    batch |= {f"box{i}": corner.expand(8, 5) for i, corner in enumerate(corners, 1)}
    method.cluster = lambda reference, run: torch.arange(3).repeat(6)[:16].view(4, 4).expand(8, 4, 4).clone()
    concepts = method.cluster(None, None)
    concepts[:, 0, 0], concepts[:, -1, -1] = 0, 1
    method.cluster = lambda reference, run: concepts
    loss = method(batch, run_with(0))["concept"]
    assert loss.item() == 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters() if p.grad is not None)
    method.after_step(0.5)
    assert method.concept_contrast.queue.pointer == 0


# The others ----------------------------------------------------------------------------------------


def test_byol_loss_is_the_papers():
    torch.manual_seed(0)
    method = batch_norm_eval(BYOL())
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(p.numel())))
    batch = {k: v for k, v in concept_batch().items() if k.startswith("view")}
    expected = 0.0
    for one, other in (("view1", "view2"), ("view2", "view1")):
        p = F.normalize(method.predictor(method.student(batch[one])[1]), dim=1)
        z = F.normalize(method.teacher(batch[other])[1], dim=1)
        expected += ((p - z) ** 2).sum(1).mean().item()
    assert method(batch, run_with(0))["prediction"].item() == pytest.approx(expected, rel=1e-5)


def test_cells_are_matched_by_the_encoders_maps():
    q_map = torch.randn(2, 6, 3, 3, generator=seeded(0))
    order = torch.randperm(9, generator=seeded(1))
    k_map = 2 * q_map.flatten(2)[..., order].view(2, 6, 3, 3)
    keys = torch.arange(9.0).expand(2, 4, 9).reshape(2, 4, 3, 3)
    found = match(q_map, k_map, keys)
    assert found.shape == (2, 9, 4)
    assert torch.equal(order[found[0, :, 0].long()], torch.arange(9))


def test_densecl_loss_is_the_papers():
    torch.manual_seed(0)
    method = batch_norm_eval(train_densecl.DenseCL(queue=20, weight=0.3))
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(p.numel())))
    batch = {k: torch.randn(4, 3, 64, 64, generator=seeded(i)) for i, k in enumerate(("view1", "view2"))}
    losses = method(batch, run_with(0))
    q, k = method.student(batch["view1"]), method.teacher(batch["view2"])
    total = 0.0
    for i in range(4):
        f, g = (out["maps"][-1][i].flatten(1).T for out in (q, k))  # (4 cells, C)
        d, e = (F.normalize(out["dense"][i].flatten(1).T, dim=1) for out in (q, k))
        for s in range(4):
            t = F.cosine_similarity(f[s], g, dim=1).argmax()
            logits = torch.cat([(d[s] @ e[t])[None], method.dense_contrast.queue.keys @ d[s]]) / 0.2
            total -= F.log_softmax(logits, 0)[0].item() / 16
    assert losses["dense"].item() == pytest.approx(0.3 * total, rel=1e-4)
    z, w = F.normalize(q["z"], dim=1), F.normalize(k["z"], dim=1)
    logits = torch.cat([(z * w).sum(1, keepdim=True), z @ method.contrast.queue.keys.T], 1) / 0.2
    whole = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).item()
    assert losses["contrast"].item() == pytest.approx(0.7 * whole, rel=1e-4)


def test_embeddings_of_simclr_are_normalised_over_the_batch():
    _, z = train_simclr.SimCLR().train().student(torch.randn(6, 3, 64, 64, generator=seeded(0)))
    assert torch.allclose(z.mean(0), torch.zeros(128), atol=1e-5)
    assert torch.allclose(z.var(0, unbiased=False), torch.ones(128), atol=1e-2)


def test_clusters_and_means_do_not_depend_on_mixed_precision():
    x, maps = torch.randn(8, 196, 256, generator=seeded(0)), torch.randn(8, 64, 14, 14, generator=seeded(1))
    seeds, spare = random_pixels(run_with(0), 8, 196, 8, 10)
    clusters = cosine_kmeans(x, seeds, spare)[0]
    means = concept_means(maps, clusters.view(8, 14, 14), 8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine_kmeans(x, seeds, spare)[0], clusters)
        assert torch.equal(concept_means(maps, clusters.view(8, 14, 14), 8)[0], means)


def test_published_concl_checkpoints_are_read(tmp_path):
    encoder = make_encoder("resnet18")
    for prefix in ("backbone.", "encoder_q.0.", "module.encoder_q."):
        state = {prefix + key: value for key, value in encoder.state_dict().items()}
        head = {prefix.replace(".0.", ".1.") + "head.0.weight": torch.zeros(3)}
        torch.save({"state_dict": state | head}, tmp_path / "published.pth")
        other = make_encoder("resnet18")
        assert initialise(other, "resnet18", str(tmp_path / "published.pth"))["matched"] == 100
        assert torch.equal(other.conv1.weight, encoder.conv1.weight)


def test_a_run_that_is_all_warm_up_is_refused():
    for module, what in ((train_concl, "concepts"), (train_pcl, "prototypes")):
        with pytest.raises(InputError, match=f"--warm-up 20: a run of 10 epochs would never learn from {what}"):
            module.main(["--epochs", "10"])


def test_lars_adapts_weights_that_do_not_decay():
    args = train_simclr.get_parser().parse_args(["--lr", "1", "--momentum", "0", "--weight-decay", "0"])
    layer = torch.nn.Linear(3, 2, bias=False)
    weight = layer.weight.detach().clone()
    layer.weight.grad = torch.full((2, 3), 5.0)
    trust = 0.001 * weight.norm() / layer.weight.grad.norm()
    make_optimizer([{"params": [layer.weight]}], args).step()
    assert torch.allclose(layer.weight, weight - trust * 5, atol=1e-6)


def test_lars_leaves_norms_and_biases_alone():
    args = train_simclr.get_parser().parse_args(["--lr", "1", "--momentum", "0", "--weight-decay", "0.1"])
    layer = torch.nn.Linear(3, 2)
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 5.0), torch.full((2,), 5.0)
    make_optimizer([{"params": list(layer.parameters())}], args).step()
    assert torch.allclose(layer.bias, bias - 5)  # plain SGD without decay
    g = 5.0 + 0.1 * weight
    trust = 0.001 * weight.norm() / (torch.full((2, 3), 5.0).norm() + 0.1 * weight.norm())
    assert torch.allclose(layer.weight, weight - trust * g, atol=1e-6)


def test_prototypes_by_hand():
    g = seeded(0)
    centres = F.normalize(torch.randn(3, 8, generator=g), dim=1)
    z = F.normalize(centres.repeat_interleave(10, 0) + 0.05 * torch.randn(30, 8, generator=g), dim=1).numpy()
    assigned, prototypes, density = cluster(z, 3, 0.2, 0)
    own = [z[assigned == k] for k in range(3)]
    assert min(map(len, own)) > 1
    phi = np.array([np.linalg.norm(x - x.mean(0), axis=1).mean() / np.log(len(x) + 10) for x in own])
    phi = np.clip(phi, *np.percentile(phi, (10, 90)))
    assert np.allclose(density, 0.2 * phi / phi.mean(), rtol=1e-4)
    for prototype, x in zip(prototypes, own):
        assert np.allclose(prototype, x.mean(0) / np.linalg.norm(x.mean(0)), atol=1e-5)
    equal = cluster(np.ones((6, 4), np.float32) / 2, 2, 0.2, 0)  # nothing to tell apart, and nothing not finite
    assert all(np.isfinite(values).all() for values in equal)
    assert (equal[2] > 0).all()


def test_pcl_loss_is_the_papers():
    torch.manual_seed(0)
    method = batch_norm_eval(PCL(images=9, clusters=(2, 4), queue=20))
    batch = {k: v for k, v in concept_batch().items() if k.startswith("view")} | {"index": torch.arange(1, 9)}
    assert set(method(batch, run_with(0))) == {"contrast"}
    method.clustered.fill_(True)
    with torch.no_grad():
        for m, count in enumerate((2, 4)):
            method.get_buffer(f"assigned{m}").copy_(torch.randint(0, count, (9,), generator=seeded(m)))
            method.get_buffer(f"density{m}").copy_(0.1 + torch.rand(count, generator=seeded(m)))
    losses = method(batch, run_with(0))
    v = F.normalize(method.student(batch["view1"])[1], dim=1)
    expected = 0
    for m in range(2):
        prototypes, density = method.get_buffer(f"prototypes{m}"), method.get_buffer(f"density{m}")
        for i in range(8):
            s = torch.stack([v[i] @ c / phi for c, phi in zip(prototypes, density)])
            expected += (s.logsumexp(0) - s[method.get_buffer(f"assigned{m}")[i + 1]]) / 16
    assert losses["prototypes"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_prototypes_are_made_of_all_images(tmp_path, monkeypatch):
    """Before every epoch after the warm-up, from whole images, by the teacher."""
    seen, real = [], train_pcl.cluster
    monkeypatch.setattr(train_pcl, "cluster", lambda z, *more: seen.append((z, *more)) or real(z, *more))
    run = ["--ratio", "0.01", "--b", "4", "--workers", "0", "--device", "cpu", "--image-size", "32", "--queue", "8"]
    train_pcl.main([*run, "--clusters", "3", "--epochs", "4", "--warm-up", "1", "--output", str(tmp_path)])
    assert [(z.shape, count, seed) for z, count, _, seed in seen] == [((20, 128), 3, step) for step in (5, 10, 15)]
    assert all(np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5) for z, *_ in seen)
    state = load_safe(tmp_path / "last.pt")["method"]
    assert torch.equal(state["assigned0"], torch.from_numpy(real(*seen[-1])[0]))
    # A warm-up that ends within an epoch lasts to its end: there are no prototypes before.
    seen.clear()
    half = ["--epochs", "4", "--warm-up", "1.5", "--log-every", "1", "--output", str(tmp_path / "half")]
    train_pcl.main([*run, "--clusters", "3", *half])
    assert [seed for *_, seed in seen] == [10, 15]
    lines = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert ["prototypes" in line for line in lines] == [False] * 10 + [True] * 10
    with pytest.raises(InputError, match="--clusters 3 21: 20 images make 2 to 20"):
        train_pcl.main([*run, "--clusters", "3", "21", "--output", str(tmp_path / "more")])
    assert train_pcl.get_parser().parse_args([]).clusters is None


@pytest.mark.parametrize("module", [train_concl, train_simclr, train_byol, train_densecl, train_pcl])
def test_options_reach_the_method_and_its_views(module, tmp_path, monkeypatch):
    weights = make_encoder("resnet18").state_dict()
    torch.save({"state_dict": weights, "arch": "resnet18", "dims": 2}, tmp_path / "start.pt")
    seen = []
    monkeypatch.setattr(module, "pretrain", lambda *given, **more: seen.append(given))
    given = ["--device", "cpu", "--workers", "0", "--image-size", "32", "--crop-scale", "0.6", "--init"]
    given += [str(tmp_path / "start.pt"), "--jitter", "0.1", "0.2", "0.3", "0.4", "--output", str(tmp_path)]
    own = {
        train_concl: ["--concepts", "5", "--warm-up", "4", "--epochs", "8", "--concept-weight", "0.25"],
        train_densecl: ["--dense-weight", "0.25"],
        train_pcl: ["--warm-up", "4", "--epochs", "8", "--clusters", "3", "5"],
        train_simclr: [],
        train_byol: [],
    }[module]
    if module is not train_byol:
        own += ["--temperature", "0.3", "--blur", "0.7", "--blur-sigma", "0.5", "0.6"]
    if module is not train_simclr:
        own += ["--ema", "0.7", "--ema-schedule", "constant"]
    if module in (train_concl, train_densecl, train_pcl):
        own += ["--queue", "40"]
    module.main([*given, *own])
    ((method, _, views, _, _),) = seen
    assert torch.equal(method.student.encoder.state_dict()["conv1.weight"], weights["conv1.weight"])
    assert (views.size, views.scale, views.jitter) == (32, (0.6, 1.0), [0.1, 0.2, 0.3, 0.4])
    assert (views.degrees, views.hole, views.jitter_chance, views.jitter_first) == (0, 0, 0.8, True)
    if module is train_byol:
        assert (views.blur, views.solarised) == ((1.0, 0.1), (0.0, 0.2))
    else:
        assert (views.blur, list(views.blur_sigma)) == (0.7, [0.5, 0.6])
    if module is train_simclr:
        assert method.temperature == 0.3
        return
    assert (method.momentum, method.schedule) == (0.7, "constant")
    for key, value in method.student.state_dict().items():
        assert torch.equal(method.teacher.state_dict()[key], value), key
    own = {train_concl: ["concept_contrast"], train_densecl: ["dense_contrast"]}.get(module, [])
    for name in [] if module is train_byol else ["contrast", *own]:
        assert getattr(method, name).loss.temperature == 0.3
        assert len(getattr(method, name).queue.keys) == 40
    if module is train_concl:
        assert (method.concepts, method.warm_up, method.weight) == (5, 0.5, 0.25)
        assert method.normalization == IMAGENET
    if module is train_densecl:
        assert method.weight == 0.25
    if module is train_pcl:
        assert method.clusters == (3, 5)


def test_published_defaults():
    expected = {  # batch, learning rate, decay, optimiser, momentum of the teacher
        train_concl: (256, 0.03, 1e-4, "sgd", 0.999), train_densecl: (256, 0.03, 1e-4, "sgd", 0.999),
        train_pcl: (256, 0.03, 1e-4, "sgd", 0.999), train_simclr: (1024, 0.6, 1e-6, "lars", None),
        train_byol: (1024, 0.8, 1.5e-6, "lars", 0.996),
    }  # fmt: skip
    for module, values in expected.items():
        args = module.get_parser().parse_args([])
        found = args.b, args.lr, args.weight_decay, args.optimizer, getattr(args, "ema", None)
        assert (*found, args.epochs, args.schedule, args.arch) == (*values, 200, "cosine", "resnet18")
    args = train_concl.get_parser().parse_args([])
    assert (args.concepts, args.warm_up, args.concept_weight, args.temperature, args.queue) == (8, 20, 1, 0.2, 16384)


def test_sample_of_the_whole_is_the_image():
    """What the reference of two whole-image crops is."""
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=seeded(0))
    whole, _ = box_around(torch.eye(2, 3).expand(1, 2, 2, 3))
    assert torch.allclose(sample(image, whole[:, None], 32), image / 255, atol=1e-5)
