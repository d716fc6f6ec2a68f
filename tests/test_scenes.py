"""The data set that ships and its small CLIP: determinism, grammar, tokens, sizes, recall."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from vlprune.tasks import scenes
from vlprune.tasks.scenes.blip import SCENES_BLIP
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES, caption
from vlprune.tasks.scenes.items import ITEMS_FILE
from vlprune.tasks.scenes.model import SCENES_CLIP

NUM_LOOKED_AT = 50
FIRST_TEST_CAPTIONS = (
    "a t-shirt top, an ankle boot top right, trousers bottom left",
    "a shirt top left, a bag top right",
)
FIRST_TEST_QUESTIONS = (("is there an ankle boot?", "yes"), ("how many shirts?", "one"))
FIRST_TEST_STATEMENTS = (
    ("exactly one picture shows a shirt", True),
    ("the left picture shows trousers", True),
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
    for folder in (SCENES_CLIP, SCENES_BLIP):
        assert (folder / "model.safetensors").stat().st_size < 5_000_000


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


def test_the_words_of_questions_come_on_top_and_change_no_id_of_captions(tokenizer):
    assert tokenizer.vocab_size == 22
    caption_ids = tokenizer.tokenize("a bag top left, trousers right", 10).tolist()
    assert caption_ids == [[1, 3, 6, 19, 12, 2, 20, 14, 21, 0]]  # as scenes-clip was trained
    larger = scenes.blip_tokenizer()
    assert set(tokenizer.words) < set(larger.words)
    assert larger.decode(larger.tokenize("how many ankle boots?")) == ["how many ankle boots?"]
    config = json.loads((SCENES_BLIP / "config.json").read_text())["text_config"]
    assert config["vocab_size"] == larger.vocab_size
    assert (config["pad_token_id"], config["bos_token_id"]) == (0, 1)
    assert config["sep_token_id"] == config["eos_token_id"] == larger.end


# -- questions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    """Questions about 2,000 scenes, with the scenes."""
    questions = scenes.Questions("test", 2000, seed=3)
    return [(questions.scenes.scene(i), questions.question(i)) for i in range(2000)]


def test_questions_depend_on_split_seed_and_index_alone():
    few, many = (scenes.Questions("test", count, seed=3) for count in (5, 10**6))
    assert [few.question(i) for i in range(5)] == [many.question(i) for i in range(5)]
    other = scenes.Questions("test", 5, seed=4)
    assert [few.question(i) for i in range(5)] != [other.question(i) for i in range(5)]
    first = scenes.Questions("test", 2, seed=0)
    assert tuple((q.text, q.answer) for q in map(first.question, (0, 1))) == FIRST_TEST_QUESTIONS
    assert few.question(-1) == few.question(4)


def answer_by_hand(scene, text):
    """The answer that a reader of the scene's caption gives."""
    shown = [
        tuple(part.split(" ", 1))
        for part in scene.caption.replace("ankle boot", "ankle_boot").split(", ")
    ]
    named = []
    for first, rest in shown:
        name, place = (first, rest) if first == "trousers" else rest.split(" ", 1)
        named.append((name.replace("_", " "), place))
    words = text.removesuffix("?").split()
    rest = " ".join(words[2:])
    if words[0] == "what":
        return {place: name for name, place in named}.get(rest, "nothing")
    if words[0] == "where":
        (place,) = [place for name, place in named if name == rest.removeprefix("the ")]
        return place
    if words[:2] == ["how", "many"]:
        single = {"trousers": "trousers", "dresses": "dress"}.get(rest, rest.removesuffix("s"))
        count = len(named) if rest == "items" else sum(name == single for name, _ in named)
        return ("zero", "one", "two", "three", "four")[count]
    rest = re.sub("^(a|an) ", "", rest)
    return "yes" if rest in dict(named) else "no"


def test_answers_are_right(asked):
    for scene, question in asked:
        assert question.answer == answer_by_hand(scene, question.text), (scene.caption, question)


def test_kinds_are_balanced_and_the_questions_alone_tell_little(asked):
    kinds = Counter(question.text.split()[0].replace("are", "is") for _, question in asked)
    assert set(kinds) == {"what", "where", "is", "how"}
    assert max(kinds.values()) < 0.29 * len(asked)
    answers = Counter(question.answer for _, question in asked)
    assert set(answers) == set(scenes.ANSWERS)
    assert max(answers.values()) < 0.15 * len(asked)
    of_text = {}
    for _, question in asked:
        of_text.setdefault(question.text, Counter())[question.answer] += 1
    blind = sum(max(counts.values()) for counts in of_text.values())
    assert blind < 0.36 * len(asked)  # fitted to these very questions


def test_batches_of_questions_hold_what_single_ones_hold():
    batches = scenes.question_loader("test", 5, 3, 2)
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    questions = scenes.Questions("test", 5, seed=3)
    question = questions.question(3)
    batch = {name: values[1] for name, values in batches[1].items()}
    assert questions.tokenizer.decode(batch["question"]) == [question.text]
    assert scenes.ANSWERS[batch["answer"]] == question.answer
    assert torch.equal(batch["image"], questions.scenes[3][0])
    for name, value in questions[3].items():
        assert torch.equal(value, batch[name])
    answers = scenes.answer_tokens()
    assert tuple(questions.tokenizer.decode(answers)) == scenes.ANSWERS
    assert len(answers.unique(dim=0)) == len(answers)


# -- statements ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stated():
    """Statements about 2,000 pairs of scenes, with the pairs."""
    statements = scenes.Statements("test", 2000, seed=3)
    return [(statements.pair(i), statements.statement(i)) for i in range(2000)]


def test_statements_depend_on_split_seed_and_index_alone():
    few, many = (scenes.Statements("test", count, seed=3) for count in (5, 10**6))
    assert [few.statement(i) for i in range(5)] == [many.statement(i) for i in range(5)]
    other = scenes.Statements("test", 5, seed=4)
    assert [few.statement(i) for i in range(5)] != [other.statement(i) for i in range(5)]
    first = scenes.Statements("test", 2, seed=0)
    said = tuple((s.text, s.is_true) for s in map(first.statement, (0, 1)))
    assert said == FIRST_TEST_STATEMENTS


def truth_by_hand(left, right, text):
    """What a reader of both captions says to a statement."""
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    captions = [f"{scene.caption}," for scene in (left, right)]
    if text.endswith(" in all"):
        number, noun = re.fullmatch(r"there (?:is|are) (\w+) (.+) in all", text).groups()
        name = noun if noun in CLASS_NAMES else {"dresses": "dress"}.get(noun, noun[:-1])
        shown = re.findall(
            rf"(?:^|, |an? ){name} ", " ".join(captions).replace("trousers ", ", trousers ")
        )
        return len(shown) == numbers.index(number)
    if "items" in text:
        more = captions[0].count(",") - captions[1].count(",")
        return {"left": more > 0, "right": more < 0, "pictures": more == 0}[text.split()[1]]
    subject, what = re.fullmatch(r"(.+) shows? (.+)", text).groups()
    anywhere = not any(what.endswith(f" {place}") for place in PLACES)
    shows = [f", {what}{' ' if anywhere else ','}" in f", {caption}" for caption in captions]
    return {
        "both pictures": all(shows),
        "neither picture": not any(shows),
        "exactly one picture": sum(shows) == 1,
        "the left picture": shows[0],
        "the right picture": shows[1],
    }[subject]


def test_statements_are_true_where_they_say_so(stated):
    for (left, right), statement in stated:
        told = (left.caption, right.caption, statement)
        assert truth_by_hand(left, right, statement.text) == statement.is_true, told


def test_a_reader_who_takes_left_for_right_is_caught(stated):
    """A planted fault: with the pictures in the other order, sided statements come out wrong."""
    sided = [entry for entry in stated if {"left", "right"} & set(entry[1].text.split()[:2])]
    assert len(sided) > 500
    wrong = [truth_by_hand(right, left, s.text) != s.is_true for (left, right), s in sided]
    assert np.mean(wrong) > 0.5


def test_no_kind_of_statement_is_true_more_often_than_false(stated):
    kinds = {}
    for _, statement in stated:
        kind = " ".join(statement.text.split()[:2]).replace("right", "left").replace(" are", " is")
        kinds.setdefault(kind, []).append(statement.is_true)
    assert set(kinds) == {"both pictures", "neither picture", "exactly one", "the left", "there is"}
    for kind, truths in kinds.items():
        assert abs(np.mean(truths) - 0.5) < 2.5 / len(truths) ** 0.5, kind


def test_batches_of_statements_hold_two_pictures():
    batches = scenes.statement_loader("test", 5, 3, 2)
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    statements = scenes.Statements("test", 5, seed=3)
    batch = {name: values[1] for name, values in batches[1].items()}
    assert statements.tokenizer.decode(batch["text"]) == [statements.statement(3).text]
    assert bool(batch["label"]) == statements.statement(3).is_true
    for side in (0, 1):
        assert torch.equal(batch["image"][side], statements.scenes[6 + side][0])
        assert statements.pair(3)[side] == statements.scenes.scene(6 + side)
    for name, value in statements[3].items():
        assert torch.equal(value, batch[name])


@pytest.mark.parametrize(
    "make",
    [
        scenes.loader,
        scenes.question_loader,
        scenes.statement_loader,
        scenes.classification_loader,
        scenes.segmentation_loader,
        scenes.place_loader,
    ],
)
def test_a_stream_gives_the_batches_of_the_list_each_time_it_is_asked(make):
    listed, stream = make("test", 7, 2, 3), make("test", 7, 2, 3, stream=True)
    assert isinstance(listed, list)
    assert len(stream) == len(listed) == 3
    for _ in range(2):
        for one, other in zip(stream, listed, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(stream[-1]["image"]) == len(stream[1:][-1]["image"]) == 1
    assert stream[0]["image"] is not stream[0]["image"]
    with pytest.raises(IndexError):
        stream[3]


# -- the models that ship --------------------------------------------------------------------------


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
