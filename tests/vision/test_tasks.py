"""The image classifier: what its options do to losses, weights, outputs and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from polyhead import bundle
from polyhead.errors import UserError
from vision.tasks import ImageClassifier, example_images

SMALL = {"embed_dim": [32, 48, 64], "partial_dim": [16, 16, 16], "depth": [1, 1, 1]}
CLASSES = ["cat", "dog", "owl"]


def classifier(seed: int = 0, classes: list[str] | None = None, **options: Any) -> ImageClassifier:
    torch.manual_seed(seed)
    options = {"backbone_options": SMALL, "image_size": 64, **options}
    system = ImageClassifier({"classes": classes or CLASSES}, "shvit_s1", **options)
    generator = torch.Generator().manual_seed(seed)
    for name, value in system.named_buffers():
        if "running_mean" in name:
            value.normal_(0, 0.1, generator=generator)
    for parameter in system.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return system


def batch(count: int = 6) -> dict[str, Any]:
    labels = torch.arange(count) % 3
    return {"id": [f"p{i}" for i in range(count)], "image": example_images(count, 64, 64), "label": labels}


def logits(system: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    return system.network(system.normalise(images))


@pytest.mark.parametrize("classes", [[], ["one"]])
def test_one_class_is_none(classes: list[str]) -> None:
    with pytest.raises(UserError, match="a classifier needs at least two classes"):
        ImageClassifier({"classes": classes})
    with pytest.raises(UserError, match="the data name none"):
        ImageClassifier(None)


def test_images_are_scaled_and_normalised_inside() -> None:
    system = classifier(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    white = system.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.allclose(white[0, :, 0, 0], torch.tensor([0.9 / 0.5, 0.8 / 1.0, 0.7 / 2.0]))
    own = classifier()
    assert own.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert not any("mean" in k and "running" not in k for k in own.state_dict())


# Losses


def test_the_plain_loss_is_smoothed_cross_entropy() -> None:
    system, data = classifier(label_smoothing=0.2).eval(), batch()
    expected = F.cross_entropy(logits(system, data["image"]), data["label"], label_smoothing=0.2)
    assert torch.equal(system.losses(data)["loss"], expected)
    # what is evaluated is not smoothed
    with torch.no_grad():
        plain = system.evaluate(data, system.make_metrics())["loss"]
    assert torch.allclose(plain, F.cross_entropy(logits(system, data["image"]), data["label"]))


class Fitting:
    """As much of a trainer as a loss needs."""

    class datamodule:
        @staticmethod
        def class_counts() -> list[int]:
            return [10, 20, 70]


def test_balanced_weights_are_inverse_to_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    system, data = classifier(label_smoothing=0.0, class_weights="balanced").eval(), batch()
    monkeypatch.setattr(ImageClassifier, "trainer", Fitting)
    system.on_fit_start()
    weight = torch.tensor([100 / 30, 100 / 60, 100 / 210])
    expected = F.cross_entropy(logits(system, data["image"]), data["label"], weight=weight)
    assert torch.allclose(system.losses(data)["loss"], expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_follows_the_seed_and_mixes(mixup: float, cutmix: float) -> None:
    plain = classifier().eval().losses(batch())["loss"].detach()
    values = []
    for seed in (1, 1, 2, 3, 4, 5):
        system = classifier(mixup_alpha=mixup, cutmix_alpha=cutmix).eval()
        torch.manual_seed(seed)
        values.append(float(system.losses(batch())["loss"].detach()))
    assert values[0] == values[1] and len(set(values)) >= 4
    assert float(plain) not in values


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_is_matched(kind: Any) -> None:
    system = classifier(distillation=kind, distillation_weight=0.3, temperature=2.0, label_smoothing=0.0).eval()
    teacher = classifier(seed=5, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).eval()
    system._teacher = [teacher]
    data = batch()
    student, taught = logits(system, data["image"]), logits(teacher, data["image"])
    if kind == "hard":
        distance = F.cross_entropy(student, taught.argmax(1))
    else:
        p, q = (taught / 2).softmax(1), (student / 2).log_softmax(1)
        distance = 4 * (p * (p.log() - q)).sum(1).mean()
    losses = system.losses(data)
    assert torch.allclose(losses["distillation"], distance, atol=1e-5)
    assert torch.allclose(losses["loss"], 0.7 * F.cross_entropy(student, data["label"]) + 0.3 * distance, atol=1e-5)
    losses["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not set(system.state_dict()) - set(classifier().state_dict())


def test_a_teacher_sees_what_the_student_sees() -> None:
    """With mixing, too: a teacher that is the student itself has nothing to teach."""
    system = classifier(mixup_alpha=1.0, distillation="soft").eval()
    system._teacher = [classifier().eval()]
    assert float(system.losses(batch())["distillation"].detach()) == pytest.approx(0, abs=1e-6)


# Outputs


def test_flipping_averages_an_image_and_its_mirror() -> None:
    once, twice = classifier().eval(), classifier(flip_tta=True).eval()
    images = batch()["image"]
    with torch.no_grad():
        one, other = (once.outputs(image=x)["probabilities"] for x in (images, images.flip(-1)))
        both = twice.outputs(image=images)
        assert torch.allclose(both["probabilities"], (one + other) / 2, atol=1e-6)
        mirrored = twice.outputs(image=images.flip(-1))["probabilities"]
    assert torch.allclose(both["probabilities"], mirrored, atol=1e-6) and not torch.allclose(one, other, atol=1e-4)


def test_the_deployed_form_is_another_with_the_same_outputs() -> None:
    system = classifier().eval()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    deployed = system.deployed()
    assert deployed is not system and not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.modules())
    with torch.no_grad():
        one, other = (s.outputs(image=batch()["image"])["logits"] for s in (system, deployed))
    assert torch.allclose(one, other, atol=1e-4)
    for parameter in deployed.parameters():
        parameter.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())


def test_columns_are_the_best_class_and_all_probabilities() -> None:
    system = classifier().eval()
    p = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.06, 0.04]])
    columns = system.columns({}, {"probabilities": p})
    assert columns["label"] == ["dog", "cat"] and columns["score"].tolist() == pytest.approx([0.5, 0.9])
    assert torch.equal(torch.from_numpy(columns["probabilities"]), p)


# Names


def test_results_name_the_classes() -> None:
    system, data = classifier().eval(), batch()
    metrics = system.make_metrics()
    with torch.no_grad():
        system.evaluate(data, metrics)
        predicted = system.outputs(image=data["image"])["probabilities"].argmax(1)
    system.results["val"] = metrics.compute()
    named = system.named_results("val")
    assert named["accuracy"] == pytest.approx(float((predicted == data["label"]).float().mean()))
    recalls = [float((predicted[data["label"] == k] == k).float().mean()) for k in range(3)]
    assert [named[f"sensitivity.{c}"] for c in CLASSES] == pytest.approx(recalls)
    said = [(k, data["label"][predicted == k]) for k in range(3) if (predicted == k).any()]
    precision = {f"ppv.{CLASSES[k]}": float((true == k).float().mean()) for k, true in said}
    assert {k: v for k, v in named.items() if k.startswith("ppv.")} == pytest.approx(precision)
    assert named["balanced_accuracy"] == pytest.approx(sum(recalls) / 3)
    assert {"f1_macro", "auroc", "ece"} <= named.keys() and "confusion" not in named
    drawn = ["Confusion matrix", "ROC", "Precision and recall", "Calibration"]
    assert list(system.figures("val")) == drawn and system.figures("test") == {}


def test_pictures_without_labels_cannot_be_evaluated() -> None:
    system, data = classifier().eval(), batch()
    del data["label"]
    with pytest.raises(UserError, match="the data have no labels"):
        system.evaluate(data, system.make_metrics())


def test_heads_are_what_may_be_new() -> None:
    assert set(classifier().head_prefixes()) == {"network.head.l"}


def labelled(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    options = {"backbone_options": {"token_label": True}, "image_size": 64, **options}
    return ImageClassifier({"classes": CLASSES}, "spectformer_hxs", **options)


def test_token_labels_train_through_both_classifiers() -> None:
    system = labelled(mixup_alpha=0.2, class_weights="none").train()
    assert {n.rsplit(".", 1)[0] for n in system.head_prefixes()} == {"network"}
    assert set(system.head_prefixes()) == {"network.head", "network.aux_head"}
    loss = system.losses(batch())["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system.head_parameters())
    # By hand, without mixing: the image's cross-entropy and half of the tokens' mean
    plain = labelled(backbone_options={"token_label": True, "mix_token": False}).train()
    data = batch()
    torch.manual_seed(1)
    logits, tokens, _ = plain.network(plain.normalise(data["image"]))
    label = data["label"]
    expected = F.cross_entropy(logits, label, label_smoothing=0.1) + 0.5 * F.cross_entropy(
        tokens.flatten(0, 1), label.repeat_interleave(tokens.shape[1]), label_smoothing=0.1
    )
    torch.manual_seed(1)
    assert torch.allclose(plain.losses(data)["loss"], expected, atol=1e-5)


def test_a_network_with_token_labels_gets_two_new_heads() -> None:
    old, new = labelled(), labelled()
    saved = bundle.Saved(old.state_dict(), {"class_path": "vision.ImageClassifier"}, {}, Path("old"))
    five = ImageClassifier({"classes": list("abcde")}, "spectformer_hxs", image_size=64,
                           backbone_options={"token_label": True})  # fmt: skip
    fresh = bundle.init_weights(five, saved)
    assert {name.rsplit(".", 1)[0] for name in fresh} == {"network.head", "network.aux_head"}
    assert bundle.init_weights(new, saved) == []


@pytest.mark.parametrize("options", [{"img_size": 0}, {"depths": [1, 1, 2]}, {"colour": 1}])
def test_options_of_a_network_that_do_not_fit_are_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="an option of spectformer_hxs does not fit"):
        labelled(backbone_options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 1.1}, {"distillation_weight": -0.1}, {"mixup_alpha": -1.0}, {"cutmix_alpha": -0.5},
        {"temperature": 0.0}, {"unfreeze_at": 2},
    ],
)  # fmt: skip
def test_numbers_without_sense_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"model.{name}"):
        classifier(**options)


# Freezing


def trained(system: ImageClassifier) -> set[str]:
    return {n for n, p in system.named_parameters() if p.requires_grad}


def test_freezing_takes_prefixes_or_the_whole_body() -> None:
    everything = trained(classifier())
    assert trained(classifier(freeze=["backbone"])) == {"network.head.l.weight", "network.head.l.bias"}
    stem = {n for n in everything if n.startswith("network.patch_embed")}
    assert stem and trained(classifier(freeze=["patch_embed"])) == everything - stem
    with pytest.raises(UserError, match="the network has no parameters named nothing"):
        classifier(freeze=["nothing"])


@pytest.mark.parametrize("frozen", ["backbone", "patch_embed"])
def test_frozen_norms_keep_their_statistics(frozen: str) -> None:
    system = classifier(freeze=[frozen])
    system.train()
    before = {k: v.clone() for k, v in system.state_dict().items() if "running" in k}
    system.losses(batch())
    kept = {k for k, v in system.state_dict().items() if k in before and torch.equal(v, before[k])}
    assert kept == {k for k in before if frozen == "backbone" or k.startswith("network.patch_embed")}
    assert not system.eval().training and not any(m.training for m in system.modules())


def test_what_is_thawed_later_is_in_the_optimiser_from_the_start() -> None:
    system = classifier(freeze=["backbone"], unfreeze_at=3)
    optimizer = system.configure_optimizers()
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(system.parameters()))
    assert trained(system) == {"network.head.l.weight", "network.head.l.bias"}
    for_good = classifier(freeze=["backbone"])
    assert sum(len(g["params"]) for g in for_good.configure_optimizers().param_groups) == 2
