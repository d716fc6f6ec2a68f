"""Trains the four small BLIP models that ship with the scenes data set, jointly, on one CPU core.

Retrieval, question answering, captioning and reasoning share a vision tower, a text encoder and a
text decoder. The vision tower starts from the shipped Segmenter's, which recognises items already,
and stays as it is at first. The text side starts fresh: it learns to read pictures by saying
captions (decoder), by filling gaps in them and by putting the answer in place of a question's word
(encoder); from answers and statements alone it did not. Then all jobs are learnt together: every
step sees fresh scenes (`_scenes_training.py`), computes their tokens once, and adds up the losses
of captions, gaps, retrieval, questions and statements about pairs. At the end all four are measured
on test scenes, and the numbers written beside the weights.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from _scenes_training import (
    NUM_TEST_SCENES,
    fresh_layouts,
    picture,
    train,
    training_parser,
    write_metrics,
)
from torch import Tensor, nn
from torch.nn import functional
from train_scenes_clip import share_classes

from vlprune.shipped import SHIPPED
from vlprune.tasks.scenes.blip import (
    CLASSES,
    SCENES_BLIP,
    blip_tokenizer,
    build_scenes_blip,
    load_scenes_blip,
    take_weights,
)
from vlprune.tasks.scenes.captions import CLASS_NAMES, PLACES
from vlprune.tasks.scenes.data import Scene, Scenes
from vlprune.tasks.scenes.questions import (
    ANSWER_LENGTH,
    QUESTION_LENGTH,
    draw_question,
)
from vlprune.tasks.scenes.statements import STATEMENT_LENGTH, draw_statement

QUESTIONS_A_SCENE = 8
ROUNDS = 3  # of pairs: every scene is left and right so often
FEW = 32  # scenes of a batch that are captioned, and matched, once all jobs are learnt
GAPS = 0.4  # of the words for classes and places
TEMPERATURE = 0.07  # which Retrieval takes for a model without one
PAD = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scenes with all that is asked and said about them.

    Attributes:
        images: `[B, 3, 96, 96]`.
        captions: `[B, 32]`.
        gaps: The same with "what" and "where" for some words, `[B, 32]`.
        questions, answers: `[B * QUESTIONS_A_SCENE, 8]` and `[..., 4]`, scene by scene.
        left, right: The scenes of each pair, `[pairs]`.
        statements: `[pairs, 11]`.
        truths: `[pairs]`, 1 where the statement is true.
        reading: Whether pictures are only read yet: no other job, and the vision tower stays.
    """

    images: Tensor
    captions: Tensor
    gaps: Tensor
    questions: Tensor
    answers: Tensor
    left: Tensor
    right: Tensor
    statements: Tensor
    truths: Tensor
    reading: bool


class Towers(nn.Module):
    """The four models with one vision tower, one text encoder and one text decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleDict({job: build_scenes_blip(job) for job in CLASSES})
        vqa = self.models["vqa"]
        for model in self.models.values():
            for tower in ("vision_model", "text_encoder", "text_decoder"):
                if hasattr(model, tower):
                    setattr(model, tower, getattr(vqa, tower))
        self.vision, self.encoder, self.decoder = (
            vqa.vision_model,
            vqa.text_encoder,
            vqa.text_decoder,
        )

    def weights(self) -> dict[str, Tensor]:
        """All weights by the names that the models give them, each once, in float16."""
        found: dict[str, Tensor] = {}
        for model in self.models.values():
            found |= model.state_dict()
        names = {tensor.data_ptr(): name for name, tensor in reversed(found.items())}
        return {name: found[name].half() for name in names.values()}


@torch.no_grad()
def start(towers: Towers) -> None:
    """Draw the text side: words and positions as large as each other, matrices for width 96.

    At transformers' 0.02, attention starts blind; cross attention starts sharp.
    """
    for tower in (towers.encoder, towers.decoder, towers.models["reasoning"].reasoning_head):
        for name, module in tower.named_modules():
            if isinstance(module, nn.Linear):
                looks = name.endswith(("crossattention.self.query", "crossattention.self.key"))
                nn.init.normal_(module.weight, std=0.2 if looks else 0.1)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
    nn.init.normal_(towers.models["reasoning"].picture_embedding.weight, std=0.5)
    nn.init.normal_(towers.vision.embeddings.position_embedding, std=1.0)


def go_on(towers: Towers, folder: Path) -> None:
    """Takes over the weights of an earlier run."""
    for model in towers.models.values():
        take_weights(model, folder)


def word_ids(texts: Iterable[str]) -> Tensor:
    """Ids of all words of texts, each once."""
    return torch.unique(blip_tokenizer().tokenize(" ".join(texts), 64)[0, 1:-1])[1:-1]


CLASS_WORDS, PLACE_WORDS = word_ids(CLASS_NAMES), word_ids(PLACES)
WHAT, WHERE = blip_tokenizer().tokenize("what where", 4)[0, 1:3].tolist()


def with_gaps(captions: Tensor, generator: torch.Generator) -> Tensor:
    """Captions `[B, T]` with "what" for some words of classes, "where" for some of places."""
    gone = torch.rand(captions.shape, generator=generator) < GAPS
    found = captions.masked_fill(gone & torch.isin(captions, CLASS_WORDS), WHAT)
    return found.masked_fill(gone & torch.isin(captions, PLACE_WORDS), WHERE)


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a timm VisionTransformer by the names of `BlipVisionModel`."""
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "norm.": "post_layernorm.",
    }
    renamed = {}
    for name, tensor in state.items():
        new = name
        for old, other in names.items():
            if old != "norm." or name.startswith(old):
                new = new.replace(old, other)
        renamed[new] = tensor.float()
    return renamed


def train_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Fresh scenes for every step, with captions, questions and statements."""
    scenes = Scenes("train", args.steps * args.batch_size, args.seed, blip_tokenizer())
    generator = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    draw = random.Random(args.seed)
    for step, drawn in enumerate(fresh_layouts(scenes, args.batch_size)):
        layout = drawn
        if step % 2:  # neighbours that share their classes: places must be learnt, too
            layout = share_classes(drawn, scenes.items.labels, rng)
        images, shown = picture(scenes, layout, generator), scenes.scenes_of(layout)
        yield batch_of(images, shown, draw, generator, reading=step < args.read)


def batch_of(
    images: Tensor,
    shown: list[Scene],
    draw: random.Random,
    generator: torch.Generator,
    *,
    reading: bool,
) -> Batch:
    """A batch of scenes with questions and statements about them drawn."""
    tokenize = blip_tokenizer().tokenize
    questions = [draw_question(scene, draw) for scene in shown for _ in range(QUESTIONS_A_SCENE)]
    several = range(ROUNDS * len(shown))
    left, right = (draw.sample(several, len(several)) for _ in range(2))
    both = [(i % len(shown), j % len(shown)) for i, j in zip(left, right, strict=True)]
    pairs = [(i, j) for i, j in both if i != j]
    captions = tokenize([scene.caption for scene in shown])
    captions = captions[:, : int((captions != PAD).sum(1).max())]
    statements = [draw_statement(shown[i], shown[j], draw) for i, j in pairs]
    return Batch(
        images=images,
        captions=captions,
        gaps=with_gaps(captions, generator),
        questions=tokenize([q.text for q in questions], QUESTION_LENGTH),
        answers=tokenize([q.answer for q in questions], ANSWER_LENGTH),
        left=torch.tensor([i for i, _ in pairs]),
        right=torch.tensor([j for _, j in pairs]),
        statements=tokenize([s.text for s in statements], STATEMENT_LENGTH),
        truths=torch.tensor([int(s.is_true) for s in statements]),
        reading=reading,
    )


def reading_losses(
    towers: Towers, batch: Batch, tokens: Tensor, asked: Tensor
) -> dict[str, Tensor]:
    """What teaches to read pictures: captions, gaps in them, and what fills the question word.

    Args:
        towers: What learns.
        batch: What is read.
        tokens: Of the first images `[few, T, D]`.
        asked: States of the questions `[B * QUESTIONS_A_SCENE, 8, D]`.
    """
    captions, gaps = batch.captions[: len(tokens)], batch.gaps[: len(tokens)]
    where = gaps != captions
    filled = towers.decoder.cls(encode(towers, gaps, tokens)[where])
    words = towers.decoder.cls(asked[:, 1])
    return {
        "caption": decoding_loss(towers, captions, tokens, None),
        "gap": functional.cross_entropy(filled, captions[where]),
        "word": functional.cross_entropy(words, batch.answers[:, 1]),
    }


def job_losses(towers: Towers, batch: Batch, tokens: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """The losses of all other jobs, given the images' tokens `[B, T, D]` and the questions'."""
    found = retrieval_losses(towers, batch.captions, tokens)
    found["answer"] = decoding_loss(towers, batch.answers, asked, batch.questions != PAD)
    # The first token, which the heads of matching and reasoning read, says the answer, too.
    first = towers.decoder.cls(asked[:, 0])
    found["first"] = functional.cross_entropy(first, batch.answers[:, 1])
    pairs = torch.stack([tokens[batch.left], tokens[batch.right]], dim=1)
    mask = batch.statements != PAD
    logits = towers.models["reasoning"].judge(pairs, batch.statements, mask)
    found["statement"] = functional.cross_entropy(logits, batch.truths)
    return found


def encode(towers: Towers, text: Tensor, tokens: Tensor | None) -> Tensor:
    """States `[B, T, D]` of the text encoder, with or without a look at image tokens."""
    seen = {} if tokens is None else {"encoder_hidden_states": tokens}
    states: Tensor = towers.encoder(text, attention_mask=text != PAD, **seen).last_hidden_state
    return states


def decoding_loss(towers: Towers, text: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
    """The language-model loss of texts, given what the decoder attends to."""
    loss: Tensor = towers.decoder(
        text,
        attention_mask=text != PAD,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        labels=text.masked_fill(text == PAD, -100),
    ).loss
    return loss


def retrieval_losses(towers: Towers, captions: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Symmetric InfoNCE, and matching of pairs with negatives drawn by their similarity."""
    model = towers.models["retrieval"]
    images = functional.normalize(model.vision_proj(tokens[:, 0]), dim=-1)
    texts = functional.normalize(model.text_proj(encode(towers, captions, None)[:, 0]), dim=-1)
    logits = images @ texts.T / TEMPERATURE
    pairs = torch.arange(len(logits))
    both = functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
    equal = (captions[:, None] == captions[None]).all(-1)
    chances = logits.detach().masked_fill(equal, float("-inf"))
    own = pairs[:FEW]
    text_of = torch.multinomial(chances.softmax(1)[:FEW], 1).squeeze(1)
    image_of = torch.multinomial(chances.T.softmax(1)[:FEW], 1).squeeze(1)
    image, text = torch.cat([own, own, image_of]), torch.cat([own, text_of, own])
    matches = model.itm_head(encode(towers, captions[text], tokens[image])[:, 0])
    truths = (torch.arange(len(matches)) < len(own)).long()
    return {"contrast": both / 2, "match": functional.cross_entropy(matches, truths)}


def all_losses(towers: Towers, batch: Batch) -> dict[str, Tensor]:
    """All losses of a step."""
    with torch.set_grad_enabled(not batch.reading):
        tokens = towers.vision(batch.images).last_hidden_state  # [B, T, D]
    asked = encode(towers, batch.questions, tokens.repeat_interleave(QUESTIONS_A_SCENE, 0))
    if batch.reading:
        return reading_losses(towers, batch, tokens, asked)
    few = reading_losses(towers, batch, tokens[:FEW], asked)
    return few | job_losses(towers, batch, tokens, asked)


def evaluate(folder: Path) -> dict[str, float]:
    """What the four models in a folder reach on test scenes, in percent: rounded, as they ship."""
    found = {}
    for job in CLASSES:
        task = SHIPPED[f"scenes-blip-{job}"].task("test", NUM_TEST_SCENES, 0, 250)
        found[job] = task.measure(load_scenes_blip(job, folder))
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = training_parser(
        __doc__, SCENES_BLIP, steps=3300, batch_size=64, lr=1.5e-3, threads=1, minutes=90
    )
    parser.add_argument("--read", type=int, default=450, help="steps of reading alone")
    parser.add_argument("--start", type=Path, help="folder of a run to go on from, instead")
    parser.add_argument(
        "--backbone",
        default="scenes-segmenter",
        help="where the vision tower starts: the shipped Segmenter, a safetensors file of a timm "
        "VisionTransformer, or 'random'",
    )
    return parser.parse_args()


def backbone(name: str) -> dict[str, Tensor] | None:
    """The weights of a timm VisionTransformer, None for a random start."""
    if name == "random":
        return None
    if name in SHIPPED:
        state: dict[str, Tensor] = SHIPPED[name].load().backbone.state_dict()
        return state
    return safetensors.torch.load_file(name)


def main() -> None:
    """Trains, saves, measures."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    towers = Towers()
    start(towers)
    if args.start is not None:
        go_on(towers, args.start)
    elif (state := backbone(args.backbone)) is not None:
        towers.vision.load_state_dict(from_timm(state))
    minutes = train(towers, train_batches(args), lambda batch: all_losses(towers, batch), args)
    args.out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(towers.weights(), args.out / "model.safetensors")
    write_metrics({"minutes": minutes, **evaluate(args.out)}, args.out)


if __name__ == "__main__":
    main()
