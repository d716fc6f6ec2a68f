"""The data set that ships and its small CLIP: determinism, grammar, tokens, sizes, recall."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlprune.tasks import scenes
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES, caption
from vlprune.tasks.scenes.items import ITEMS_FILE
from vlprune.tasks.scenes.model import SCENES_CLIP

NUM_LOOKED_AT = 50
FIRST_TEST_CAPTIONS = (
    "a t-shirt top, an ankle boot top right, trousers bottom left",
    "a shirt top left, a bag top right",
)
RECALL_FLOOR = 0.85
PLACES_FLOOR = 0.9


@pytest.fixture(scope="module")
def test_scenes():
    return scenes.Scenes("test", count=1000, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes.Tokenizer()


def pixels_of(image):
    """Channel 0 back as integers from 0 to 255."""
    return (255 * (image[0] * scenes.IMAGE_STD + scenes.IMAGE_MEAN)).round().to(torch.uint8)


@pytest.mark.parametrize("split", ["train", "test"])
def test_same_split_count_and_seed_give_the_same_scenes(split):
    first, second = (scenes.Scenes(split, count=20, seed=3) for _ in range(2))
    assert first.captions == second.captions
    assert torch.equal(first.batch(range(20))[0], second.batch(range(20))[0])


def test_another_seed_gives_other_scenes():
    captions = {seed: scenes.Scenes("test", count=300, seed=seed).captions for seed in (0, 1)}
    same = sum(one == other for one, other in zip(captions[0], captions[1], strict=True))
    assert same <= 1


def test_a_scene_does_not_depend_on_how_many_there_are():
    few, many = scenes.Scenes("test", 10, seed=5), scenes.Scenes("test", 10**9, seed=5)
    assert [few.scene(i) for i in range(10)] == [many.scene(i) for i in range(10)]


def test_the_draw_is_the_one_that_the_shipped_model_was_measured_on(test_scenes):
    assert test_scenes.captions[:2] == FIRST_TEST_CAPTIONS


def test_a_batch_holds_what_single_scenes_hold(test_scenes):
    images, tokens = test_scenes.batch([4, 0, 999])
    assert images.shape == (3, 3, 96, 96)
    assert images.dtype == torch.float32
    assert tokens.shape == (3, 32)
    assert tokens.dtype == torch.int64
    for position, index in enumerate([4, 0, -1]):
        image, token_ids = test_scenes[index]
        assert torch.equal(images[position], image)
        assert torch.equal(tokens[position], token_ids)


def test_iteration_ends_after_the_last_scene():
    assert len(list(scenes.Scenes("test", count=3))) == 3


def test_every_item_stands_where_the_scene_says_and_nothing_else_is_painted(test_scenes):
    for index in range(NUM_LOOKED_AT):
        expected = torch.zeros(96, 96, dtype=torch.uint8)
        for placed in test_scenes.scene(index).objects:
            item = torch.tensor(test_scenes.items.images[placed.item])
            top, left = 32 * placed.row + placed.top, 32 * placed.col + placed.left
            expected[top : top + 28, left : left + 28] = item
            assert CLASS_NAMES[test_scenes.items.labels[placed.item]] == placed.class_name
            assert 0 <= placed.top <= 4
            assert 0 <= placed.left <= 4
        image = test_scenes[index][0]
        assert torch.equal(pixels_of(image), expected)
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])


def test_a_caption_names_every_object_in_reading_order(test_scenes):
    phrase = re.compile(rf"(?:an? )?({'|'.join(CLASS_NAMES)}) ({'|'.join(PLACES)})$")
    for index in range(NUM_LOOKED_AT):
        named = [phrase.match(part).groups() for part in test_scenes.caption(index).split(", ")]
        objects = test_scenes.scene(index).objects
        assert named == [(placed.class_name, placed.place) for placed in objects]
        cells = [3 * placed.row + placed.col for placed in objects]
        assert cells == sorted(set(cells))


def test_articles_are_right():
    words = " ".join(scenes.Scenes("train", 200).captions)
    assert "an ankle boot" in words
    assert " a ankle" not in words
    assert not re.search(r"\ban (?!ankle)", words)
    assert not re.search(r"\ba trousers", words)


def test_counts_classes_and_places_are_drawn_evenly():
    drawn = scenes.Scenes("train", count=9000, seed=1)
    layout = drawn.layout(range(9000))
    counts = np.bincount(layout.present.sum(axis=1), minlength=5)
    assert counts[:2].tolist() == [0, 0]
    assert np.abs(counts[2:] / 3000 - 1).max() < 0.06
    for values, kinds in (
        (layout.cell, 9),
        (drawn.items.labels[layout.item], 10),
        (layout.top, 5),
        (layout.left, 5),
    ):
        seen = np.bincount(values[layout.present], minlength=kinds)
        assert len(seen) == kinds
        assert np.abs(seen / seen.mean() - 1).max() < 0.1


def test_equal_captions_are_rare_among_a_thousand_test_scenes(test_scenes):
    # 17 repeats: two objects allow 36 * 100 captions only, which lets about 15 pairs meet.
    assert len(set(test_scenes.captions)) == 983


@pytest.mark.parametrize("name", ["count", "seed"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} of Scenes must be 0 or more; got -1\."):
        scenes.Scenes("test", **{name: -1})


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'test'; got 'val'\."):
        scenes.Scenes("val")


def test_an_index_out_of_range_is_refused():
    with pytest.raises(IndexError, match=r"an index must lie in \[0, 10\); got 10\. Ask for more"):
        scenes.Scenes("test", 10).scene(10)


def test_the_loader_gives_all_scenes_in_order():
    batches = scenes.loader("test", count=10, seed=2, batch_size=4)
    assert [len(batch["image"]) for batch in batches] == [4, 4, 2]
    images, tokens = scenes.Scenes("test", 10, seed=2).batch(range(10))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), images)
    assert torch.equal(torch.cat([batch["text"] for batch in batches]), tokens)


def test_images_are_normalised():
    images, _ = scenes.Scenes("train", 2000).batch(range(2000))
    assert abs(images.mean().item()) < 0.01
    assert abs(images.std().item() - 1) < 0.01


def test_items_are_balanced_and_train_and_test_have_none_in_common():
    train, test = scenes.load_items("train"), scenes.load_items("test")
    assert np.bincount(train.labels).tolist() == [320] * 10
    assert np.bincount(test.labels).tolist() == [80] * 10
    assert not {item.tobytes() for item in train.images} & {item.tobytes() for item in test.images}


def test_items_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        scenes.load_items("test").images[0] = 0


def test_package_data_are_small():
    assert ITEMS_FILE.stat().st_size < 2_000_000
    assert (SCENES_CLIP / "model.safetensors").stat().st_size < 5_000_000


def test_tokens_decode_to_the_captions_that_they_came_from(test_scenes, tokenizer):
    assert tuple(tokenizer.decode(tokenizer.tokenize(test_scenes.captions))) == test_scenes.captions


def test_one_text_may_come_without_a_list(tokenizer):
    tokens = tokenizer.tokenize("a bag top left", context_length=8)
    assert tokens.shape == (1, 8)
    assert torch.equal(tokens, tokenizer.tokenize(["a bag top left"], context_length=8))
    assert tokenizer.decode(tokens[0]) == ["a bag top left"]


def test_the_end_is_the_largest_id_and_closes_every_text(test_scenes, tokenizer):
    tokens = tokenizer.tokenize(test_scenes.captions)
    assert tokenizer.end == tokenizer.vocab_size - 1
    assert (tokens.amax(dim=1) == tokenizer.end).all()
    assert torch.equal(tokens.argmax(dim=1), (tokens != 0).sum(dim=1) - 1)


def test_unknown_words_are_told_together_with_the_nearest(tokenizer):
    text = (
        "a text must hold known words only; got 'bak', 'lefft' in 'a bak top lefft'. "
        "Nearest to 'bak': 'bag', 'ankle', 'a'. Nearest to 'lefft': 'left', 'ankle', 'center'."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tokenizer.tokenize(["a bag top", "a bak top lefft"])


def test_a_text_that_is_too_long_is_refused(tokenizer):
    text = (
        "a text must need at most 5 tokens with its start and end; got 6 in 'a bag top left'. "
        "Shorten it or raise context_length."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tokenizer.tokenize("a bag top left", context_length=5)


def test_importing_scenes_spares_open_clip():
    code = "import sys, vlprune.tasks.scenes; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_clip_is_open_clips_own_in_eval_mode_and_float32(tokenizer):
    open_clip = pytest.importorskip("open_clip")
    model = scenes.load_scenes_clip()
    assert type(model) is open_clip.model.CLIP
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.vocab_size == tokenizer.vocab_size


def test_the_card_quotes_what_the_training_program_measured():
    metrics = json.loads((SCENES_CLIP / "metrics.json").read_text())
    card = (SCENES_CLIP / "README.md").read_text()
    assert f"Recall mean (of the six): **{metrics['recall_mean']:.2f}**" in card
    for way, key in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
        cells = [f"{metrics[f'{key}_recall@{k}']:.1f}" for k in (1, 5, 10)]
        assert f"| {way} | {' | '.join(cells)} |" in card


def test_the_shipped_clip_finds_test_scenes_by_their_captions():
    pytest.importorskip("open_clip")
    test_scenes = scenes.Scenes("test", count=300, seed=0)
    with torch.inference_mode():
        images, texts, _ = scenes.load_scenes_clip()(*test_scenes.batch(range(300)))
    captions = test_scenes.captions
    found = []
    for scores in (images @ texts.T, texts @ images.T):
        # Brute force: sort, with wrong candidates ahead of right ones that score the same.
        for query, row in enumerate(scores.tolist()):
            ranked = sorted((-s, captions[i] == captions[query]) for i, s in enumerate(row))
            rank = [is_correct for _, is_correct in ranked].index(True)
            found += [rank < k for k in (1, 5, 10)]
    assert np.mean(found) > RECALL_FLOOR


def test_the_shipped_clip_tells_places_apart(tokenizer):
    pytest.importorskip("open_clip")
    test_scenes = scenes.Scenes("test", count=200, seed=0)
    draw = random.Random(0)
    model = scenes.load_scenes_clip()
    hits = []
    with torch.inference_mode():
        images = model.encode_image(test_scenes.batch(range(200))[0], normalize=True)
        for index, image in enumerate(images):
            objects = test_scenes.scene(index).objects
            texts = [test_scenes.caption(index)]
            while len(texts) < 9:  # the same classes elsewhere
                places = sorted(draw.sample(range(9), len(objects)))
                named = [
                    (placed.class_name, PLACES[i])
                    for placed, i in zip(objects, places, strict=True)
                ]
                if caption(named) != texts[0]:
                    texts.append(caption(named))
            found = model.encode_text(tokenizer.tokenize(texts), normalize=True) @ image
            hits.append(int(found.argmax()) == 0)
    assert np.mean(hits) > PLACES_FLOOR  # 1 in 9 by chance
