"""Labels of scenes: each against the description of its scene."""

import pytest
import torch

from vlprune.tasks import scenes
from vlprune.tasks.scenes.labels import first_classes

COUNT = 40


@pytest.fixture(scope="module")
def described() -> list[scenes.Scene]:
    found = scenes.Scenes("test", COUNT, seed=3)
    return [found.scene(index) for index in range(COUNT)]


def whole(batches: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.cat([batch[name] for batch in batches])


def test_a_label_is_the_class_of_the_first_item_in_reading_order(described) -> None:
    batches = scenes.classification_loader("test", COUNT, 3, 16)
    assert [len(batch["image"]) for batch in batches] == [16, 16, 8]
    expected = [scenes.CLASS_NAMES.index(scene.objects[0].class_name) for scene in described]
    labels = whole(batches, "label")
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected
    assert torch.equal(
        whole(batches, "image"), scenes.Scenes("test", COUNT, 3).batch(range(COUNT))[0]
    )


def test_the_first_item_is_often_not_the_only_one_of_another_class(described) -> None:
    # were it, a bag of items would do, and places need not be learnt
    others = [{placed.class_name for placed in scene.objects[1:]} for scene in described]
    apart = [s.objects[0].class_name not in rest for s, rest in zip(described, others, strict=True)]
    assert sum(apart) > COUNT / 2


def test_every_pixel_says_what_stands_in_its_cell(described) -> None:
    labels = whole(scenes.segmentation_loader("test", COUNT, 3, 16), "label")
    assert labels.shape == (COUNT, 96, 96)
    assert labels.dtype == torch.int64
    assert len(scenes.SEGMENT_NAMES) == 11
    for found, scene in zip(labels, described, strict=True):
        expected = torch.zeros(96, 96, dtype=torch.int64)
        for placed in scene.objects:
            cell = expected[32 * placed.row :, 32 * placed.col :][:32, :32]
            cell.fill_(scenes.SEGMENT_NAMES.index(placed.class_name))
        assert torch.equal(found, expected)


def test_a_picture_of_a_place_shows_the_first_item_alone(described) -> None:
    (batch,) = scenes.place_loader("test", COUNT, 3, COUNT)
    both = scenes.Scenes("test", COUNT, 3).batch(range(COUNT))[0]
    for image, label, before, scene in zip(*batch.values(), both, described, strict=True):
        first = scene.objects[0]
        assert scenes.PLACES[label] == first.place
        rows = slice(32 * first.row, 32 * first.row + 32)
        cols = slice(32 * first.col, 32 * first.col + 32)
        assert torch.equal(image[:, rows, cols], before[:, rows, cols])
        rest = image.clone()
        rest[:, rows, cols] = image.min()
        assert (rest == image.min()).all()


def test_prompts_name_an_item_of_every_class_in_every_place() -> None:
    prompts = scenes.place_prompts()
    assert prompts.shape == (9, 10, 32)
    tokenizer = scenes.Tokenizer()
    assert tokenizer.decode(prompts[0])[8:] == ["a bag top left", "an ankle boot top left"]
    assert tokenizer.decode(prompts[4])[1] == "trousers center"


def test_labels_are_drawn_evenly() -> None:
    drawn = scenes.Scenes("train", 6000, seed=1)
    counts = torch.bincount(first_classes(drawn.layout(range(6000)), drawn.items))
    assert len(counts) == 10
    assert (counts / 600 - 1).abs().max() < 0.15
