"""Example inputs for any transformers model, from its forward's signature and its config.

A table names a maker for each argument that a forward may take; a maker reads the scene (model,
config, what was made before) and answers None where the model can do without. No maker knows a
class: what differs between models is read off their configs and signatures, and how many
placeholder tokens an image takes is counted at the vision tower itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlprune.calls import Inputs, map_tensors, tensors_of

_TEXT_LENGTH = 8
_BEFORE = 2  # text tokens before the first image
_REGIONS = 6  # of an image, for models that take features of regions
_VIDEO_FRAMES = 4
_AUDIO_FRAMES = 64

# flags that choose between two forwards
_FLAGS = ("use_itm_head", "use_image_text_matching_head")

# what a config calls the part that says how images are cut
_VISION = (
    "vision_config",
    "image_config",
    "vlm_config",
    "backbone_config",
    "encoder",
    "sam_config",
    "vq_config",
)

# what a config calls the token that stands for a piece of an image, a video, a sound
_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
_SPECIAL = ("_token_id", "_token_index", "_patch_id", "_start_id", "_end_id", "_newline_id")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a maker reads.

    Attributes:
        model: the model to feed.
        batch: samples.
        names: the arguments that its forward takes.
        generator: of all noise.
        inputs: what was made so far.
    """

    model: Any
    batch: int
    names: frozenset[str]
    generator: torch.Generator
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The config of the whole model."""
        return self.model.config

    @property
    def vision(self) -> Any:
        """The config that says how images are cut."""
        return _vision(self.config)

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise."""
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def each(self, *values: int) -> Tensor:
        """Return the same integers for every sample [batch, values]."""
        return torch.tensor([values] * self.batch)


Maker: TypeAlias = Callable[[Scene], Any]


def make_inputs(model: Any, batch: int) -> Inputs:
    """Return keyword arguments for every forward of `model`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    scene = Scene(model=model, batch=batch, names=_names(model), generator=generator)
    for name, make in _MAKERS.items():
        if name in scene.names:
            value = make(scene)
            if value is not None:
                scene.inputs[name] = value
    flag = next((name for name in _FLAGS if name in scene.names), None)
    return [scene.inputs | {flag: on} for on in (True, False)] if flag else [scene.inputs]


def _names(model: Any) -> frozenset[str]:
    """Return what a forward takes; where it hands the rest on to an encoder, with its arguments."""
    parameters = inspect.signature(model.forward).parameters
    names = frozenset(parameters)
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    encoder = next((m for m in model.modules() if hasattr(m, "get_image_features")), None)
    if hands_on and encoder is not None and "pixel_values" not in names:
        return names | _parameters(encoder.forward)
    return names


# -- configs and signatures ------------------------------------------------------------------------


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and all inside it."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)


def _vision(config: Any) -> Any:
    inner = _first(config, *_VISION)
    return config if inner is None else _vision(inner)


def _text(config: Any) -> Any:
    """Return the config with the vocabulary, or one without where the model reads no text."""
    parts = (part for part in _configs(config) if hasattr(part, "vocab_size"))
    found = config.get_text_config()
    return found if hasattr(found, "vocab_size") else next(parts, found)


def _first(holder: Any, *names: str, default: Any = None) -> Any:
    """Return the first of these attributes that is set."""
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = (
        (value["height"], value["width"]) if isinstance(value, Mapping) else tuple(value)[-2:]
    )
    return int(height), int(width)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _needs(function: Callable[..., Any]) -> frozenset[str]:
    """Return the arguments without a default."""
    parameters = inspect.signature(function).parameters.values()
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in free)


# -- images ----------------------------------------------------------------------------------------


def _image_shape(scene: Scene) -> tuple[int, int, int]:
    """Return channels, height and width of an image."""
    channels = _first(scene.vision, "num_channels", "in_channels", "in_chans", default=3)
    size = _first(scene.vision, "image_size", "resolution") or _first(scene.config, "image_size")
    size = size or (_first(scene.vision, "model_args") or {}).get("img_size")  # timm's towers
    height, width = _pair(size or 4 * _patch(scene))
    return channels, height, width


def _patch(scene: Scene) -> int:
    """Return the side of a patch in pixels."""
    return _pair(_first(scene.vision, "patch_size", default=8))[0]


def _merge(scene: Scene) -> int:
    """Return how many patches become one token along each side."""
    names = ("spatial_merge_size", "merge_kernel_size", "merge_size", "pooling_kernel_size")
    return _pair(_first(scene.vision, *names, default=1))[0]


def _depth(scene: Scene) -> int:
    """Return how many frames a patch spans."""
    depth: int = _first(scene.vision, "temporal_patch_size", "patch_temporal", default=1)
    return depth


def _grid(scene: Scene) -> tuple[int, int]:
    """Return rows and columns of patches, for models that take patches of any image size."""
    patches = getattr(scene.vision, "num_patches", None)
    side = math.isqrt(patches) if patches else 4 * _merge(scene)
    return side, side


def _places(rows: int, columns: int) -> Tensor:
    """Return column and row of every patch [patches, 2]."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)


def _pixel_values(scene: Scene) -> Tensor:
    """Return noise in the layout that the other arguments of the forward point to."""
    channels, height, width = _image_shape(scene)
    patches, flat = math.prod(_grid(scene)), channels * _patch(scene) ** 2
    if scene.names & {"image_grid_thw", "image_grid_hw"}:  # the patches of all images, in a row
        return scene.noise(scene.batch * patches, flat * _depth(scene))
    if scene.names & {"spatial_shapes", "image_token_pooling", "image_position_ids"}:
        return scene.noise(scene.batch, patches, flat)
    if "target_sizes" in scene.names:  # the patches of all images, side by side as one image
        return scene.noise(1, channels, _patch(scene), scene.batch * patches * _patch(scene))
    return scene.noise(scene.batch, *_tiles(scene), channels, height, width)


def _tiles(scene: Scene) -> tuple[int, ...]:
    """Return the dimensions between batch and channels: images, tiles or frames of a sample."""
    if pinpoints := getattr(scene.config, "image_grid_pinpoints", None):
        count = getattr(inspect.getmodule(type(scene.model)), "image_size_to_num_patches")  # noqa: B009
        return (int(count(list(_image_shape(scene)[1:]), pinpoints, scene.vision.image_size)),)
    if "aspect_ratio_ids" in scene.names:
        return 1, scene.vision.max_num_tiles
    if scene.names & {"pixel_attention_mask", "image_encoder_embeddings"}:
        return (1,)
    if hasattr(scene.config, "video_token_index") and "pixel_values_videos" not in scene.names:
        return (_VIDEO_FRAMES,)
    frames = getattr(scene.vision, "num_frames", None)
    return (frames,) if frames else ()


def _other_layouts(scene: Scene) -> Iterator[dict[str, Tensor]]:
    """Yield other ways to hand pixels over, for towers whose forward does not tell."""
    channels, patch, merge = _image_shape(scene)[0], _patch(scene), _merge(scene)
    rows, columns = _grid(scene)
    count, flat = scene.batch * rows * columns, channels * patch**2
    yield {"pixel_values": scene.inputs["pixel_values"][:, None]}
    yield {"pixel_values": scene.noise(count, channels, patch, patch)}
    yield {"pixel_values": scene.noise(scene.batch, rows * columns, flat)}
    yield {"pixel_values": scene.noise(count, _depth(scene), patch, patch, channels)}
    rows, columns, side = rows // merge, columns // merge, merge * patch
    yield {
        "pixel_values": scene.noise(scene.batch, rows * columns, channels * side**2),
        "image_position_ids": _places(rows, columns).expand(scene.batch, -1, -1),
    }
    yield {
        "pixel_values": scene.noise(scene.batch * rows * columns, side, side, channels),
        "image_grid_thw": scene.each(1, rows, columns),
    }


def _video(scene: Scene) -> Tensor | None:
    """Return noise where videos are all that the model sees, or have a tower of their own."""
    if "pixel_values" in scene.names and not hasattr(scene.model.base_model, "video_tower"):
        return None
    frames = _first(scene.vision, "num_frames", default=_VIDEO_FRAMES)
    return scene.noise(scene.batch, frames, *_image_shape(scene))


def _flattened_patches(scene: Scene) -> Tensor:
    """Return patches that begin with their row and column, counted from 1."""
    rows, columns = _grid(scene)
    pixels = scene.noise(scene.batch, rows * columns, scene.vision.patch_embed_hidden_size)
    places = (_places(rows, columns).flip(-1) + 1.0).expand(scene.batch, -1, -1)
    return torch.cat([places, pixels], dim=-1)


def _image_sizes(scene: Scene) -> Tensor | None:
    features_of = _features_of(scene, "image")
    needed = features_of is not None and "image_sizes" in _needs(features_of)
    return scene.each(*_image_shape(scene)[1:]) if needed else None


def _pixel_mask(scene: Scene) -> Tensor | None:
    """Return a mask for models that shuffle their patches unless one of them is padding."""
    if not hasattr(scene.config, "max_image_length"):
        return None
    _, height, width = _image_shape(scene)
    mask = torch.ones(scene.batch, height, width, dtype=torch.long)
    mask[:, -_patch(scene) :, -_patch(scene) :] = 0
    return mask


def _pixel_attention_mask(scene: Scene) -> Tensor | None:
    """Return which patches, or which tiles, are none of the padding."""
    features_of = _features_of(scene, "image")
    needed = features_of is not None and "pixel_attention_mask" in _needs(features_of)
    if "spatial_shapes" in scene.names:
        return torch.ones(scene.inputs["pixel_values"].shape[:2], dtype=torch.long)
    if needed or "state" in scene.names:
        return torch.ones(scene.inputs["pixel_values"].shape[:2], dtype=torch.bool)
    return None


def _aspect_ratio_ids(scene: Scene) -> Tensor:
    """Return the id of an aspect ratio that fills every tile; 0 is no image."""
    ratios = enumerate(scene.vision.supported_aspect_ratios, 1)
    return scene.each(next(i for i, (a, b) in ratios if a * b == scene.vision.max_num_tiles))


def _token_pooling(scene: Scene) -> Tensor:
    """Return the patches that each token pools [tokens, 4]: squares of two by two."""
    rows, columns = _grid(scene)
    patches = torch.arange(scene.batch * rows * columns)
    squares = patches.reshape(scene.batch, rows // 2, 2, columns // 2, 2).transpose(2, 3)
    return squares.reshape(-1, 4)


def _regions(scene: Scene) -> Tensor:
    """Return features of image regions [batch, regions, width], for models without a tower."""
    width = _first(scene.config, "visual_feat_dim", "visual_embedding_dim")
    return scene.noise(scene.batch, _REGIONS, width)


# -- sounds ----------------------------------------------------------------------------------------


def _sound(scene: Scene) -> Any:
    """Return the config of the sound tower, None where there is none."""
    return getattr(scene.config, "audio_config", None)


def _input_features(scene: Scene) -> Tensor | None:
    """Return spectrograms, bands before frames unless the mask goes by another name."""
    if _sound(scene) is None:
        return None
    bands = _first(_sound(scene), "num_mel_bins", "feature_size", "input_feat_size")
    features = scene.noise(scene.batch, bands, _AUDIO_FRAMES)
    return features.transpose(1, 2) if "input_features_mask" in scene.names else features


def _input_values(scene: Scene) -> Tensor | None:
    sound = _sound(scene)
    if sound is None:
        return None
    ratios = getattr(sound, "upsampling_ratios", ())
    samples = getattr(sound, "samples_per_token", math.prod(ratios))
    return scene.noise(scene.batch, 4 * samples)


def _audio_input_ids(scene: Scene) -> Tensor | None:
    sound = _sound(scene)
    if sound is None:
        return None
    return scene.integers(0, sound.mel_vocab_size, scene.batch, 4, sound.n_mel_bins)


def _frame_mask(dtype: torch.dtype) -> Maker:
    def make(scene: Scene) -> Tensor | None:
        if "input_features" not in scene.inputs:
            return None
        return torch.ones(scene.batch, _AUDIO_FRAMES, dtype=dtype)

    return make


def _sample_lengths(scene: Scene) -> Tensor | None:
    """Return how many samples of the sound each spectrogram covers [batch]."""
    if "input_features" not in scene.inputs:
        return None
    return scene.each(_AUDIO_FRAMES * _sound(scene).hop_length).flatten()


# -- placeholder tokens ----------------------------------------------------------------------------


def _features_of(scene: Scene, kind: str) -> Callable[..., Any] | None:
    """Return what makes the features of placeholder tokens: a method of the model or a part."""
    owners = (scene.model.base_model, scene.model, *scene.model.modules())
    methods = (getattr(owner, f"get_{kind}_features", None) for owner in owners)
    told = (m for m in methods if m is not None and _parameters(m) - {"args", "kwargs"})
    return next(told, None)


def _placeholder(scene: Scene, kind: str) -> int | None:
    """Return the placeholder token, from the first config that has one."""
    tokens = (_first(part, *_PLACEHOLDERS[kind]) for part in _configs(scene.config))
    return next((token for token in tokens if token is not None), None)


def _tokens_needed(scene: Scene, kind: str) -> int:
    """Return how many placeholder tokens a sample takes: as many as features come out.

    Settles the layout of the pixels on the way: the first that the vision tower accepts.
    """
    features_of = _features_of(scene, kind)
    fed = {"image": ("pixel_values",), "video": ("pixel_values_videos", "pixel_values")}.get(
        kind, ("input_features", "input_values", "audio_input_ids")
    )
    if features_of is None or not _parameters(features_of) & set(fed) & set(scene.inputs):
        return 0
    others = _other_layouts(scene) if kind == "image" else ()
    faults: list[Exception] = []
    for layout in itertools.chain(({},), others):
        try:
            count = _count_features(scene, features_of, scene.inputs | layout)
        except Exception as fault:  # each tower refuses a wrong layout in its own way
            faults.append(fault)
        else:
            scene.inputs.update(layout)
            return count
    raise faults[0]


def _count_features(scene: Scene, features_of: Any, inputs: Mapping[str, Any]) -> int:
    first = next(p for p in scene.model.parameters() if p.is_floating_point())
    accepted = map_tensors(
        {k: v for k, v in inputs.items() if k in _parameters(features_of)},
        lambda t: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype),
    )
    if features_of.__self__ not in (scene.model.base_model, scene.model):
        accepted["pixel_values"] = _tiles_apart(scene, accepted["pixel_values"])
    with torch.no_grad():
        answer = features_of(**accepted)
    features = _first(answer, "pooler_output", "last_hidden_state")
    if features is None:  # one set of features for each of several layers
        features = answer.deepstack_features[0]
    return sum(t.numel() // t.shape[-1] for t in tensors_of(features)) // scene.batch


def _tiles_apart(scene: Scene, pixels: Tensor) -> Tensor:
    """Return tiles as samples of their own: a part of a model sees no more of the batch."""
    return pixels.flatten(0, len(_tiles(scene))) if pixels.dim() > 4 else pixels


# -- text ------------------------------------------------------------------------------------------


def _ids(scene: Scene, length: int, config: Any = None) -> Tensor:
    """Return random ids [batch, length] without a meaning to the model, then the end token."""
    text = config or _text(scene.config)
    special = set(_special_ids(scene.config))
    plain = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    ids = plain[scene.integers(0, len(plain), scene.batch, length)]
    end = _first(text, "eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is not None and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def _special_ids(config: Any) -> Iterable[int]:
    """Yield every token id that a config gives a meaning."""
    for part in _configs(config):
        for key, value in vars(part).items():
            if key.endswith(_SPECIAL):
                yield from value if isinstance(value, list) else () if value is None else (value,)


def _input_ids(scene: Scene) -> Tensor | None:
    """Return text with the placeholder tokens of all that goes with it."""
    if not hasattr(_text(scene.config), "vocab_size"):
        return None
    ids = _ids(scene, _TEXT_LENGTH)
    pieces = [ids[:, :_BEFORE]]
    if "image_embeds_position_mask" in scene.names:  # any token will do
        pieces.append(ids[:, :1].expand(-1, scene.config.latent_query_num))
    for kind in _PLACEHOLDERS:
        token = _placeholder(scene, kind)
        if token is not None:
            pieces.append(torch.full((scene.batch, _tokens_needed(scene, kind)), token))
    return torch.cat([*pieces, ids[:, _BEFORE:]], dim=1)


def _image_places(scene: Scene) -> Tensor:
    """Return where in the text the images stand, for models without a placeholder token."""
    mask = torch.zeros_like(scene.inputs["input_ids"])
    mask[:, _BEFORE : _BEFORE + scene.config.latent_query_num] = 1
    return mask


def _image_attention_mask(scene: Scene) -> Tensor | None:
    """Return which image each token sees [batch, tokens, images]."""
    if "image_encoder_embeddings" not in scene.names:
        return None
    return torch.ones(*scene.inputs["input_ids"].shape, 1, dtype=torch.long)


def _token_kinds(scene: Scene) -> Tensor | None:
    """Return 1 for the placeholders of images and 0 for text."""
    token = _placeholder(scene, "image")
    return None if token is None else (scene.inputs["input_ids"] == token).long()


def _boxes(scene: Scene) -> Tensor:
    """Return a box (left, top, right, bottom) for every token, in [0, 1000)."""
    corners = scene.integers(0, 1000, *scene.inputs["input_ids"].shape, 2, 2).sort(dim=2).values
    return corners.flatten(2)


def _decoder_input_ids(scene: Scene) -> Tensor | None:
    decodes = any(getattr(part, "is_encoder_decoder", False) for part in _configs(scene.config))
    if length := getattr(scene.config, "canvas_length", None):
        return _ids(scene, length)
    return _ids(scene, 5) if decodes or hasattr(scene.model, "text_decoder") else None


def _encoder_hidden_states(scene: Scene) -> Tensor | None:
    """Return what to attend to, for models that are nothing but cross attention."""
    if "query_embeds" not in scene.names:
        return None
    return scene.noise(scene.batch, _REGIONS, scene.config.encoder_hidden_size)


def _labels(scene: Scene) -> Tensor | None:
    """Return labels where the answer of the decoder reaches no output without."""
    answers: Tensor | None = scene.inputs.get("decoder_input_ids")
    return answers if hasattr(scene.model, "text_decoder") else None


def _attention_mask(scene: Scene) -> Tensor | None:
    name = next((n for n in ("input_ids", "flattened_patches") if n in scene.inputs), "")
    mask: Tensor | None = _ones_like(name)(scene)
    return mask


def _ones_like(name: str) -> Maker:
    """Return a maker of a full mask over the first two dimensions of another input."""

    def make(scene: Scene) -> Tensor | None:
        other = scene.inputs.get(name)
        return None if other is None else torch.ones(other.shape[:2], dtype=torch.long)

    return make


# in the order in which they are made
_MAKERS: dict[str, Maker] = {
    "image_sizes": _image_sizes,
    "image_grid_thw": lambda scene: scene.each(1, *_grid(scene)),
    "image_grid_hw": lambda scene: scene.each(*_grid(scene)),
    "image_merge_sizes": lambda scene: scene.each(2).flatten(),
    "image_token_pooling": _token_pooling,
    "image_grids": lambda scene: scene.each(*(side // 2 for side in _grid(scene)), 0, 0),
    "image_num_crops": lambda scene: scene.each(1).flatten(),
    "image_position_ids": lambda scene: _places(*_grid(scene)).expand(scene.batch, -1, -1),
    "target_sizes": lambda scene: scene.each(*_grid(scene)),
    "spatial_shapes": lambda scene: scene.each(*_grid(scene)),
    "pixel_values": _pixel_values,
    "pixel_values_videos": _video,
    "high_res_pixel_values": lambda scene: scene.noise(
        scene.batch, 3, *_pair(scene.config.high_res_vision_config.image_size)
    ),
    "pixel_mask": _pixel_mask,
    "pixel_attention_mask": _pixel_attention_mask,
    "flattened_patches": _flattened_patches,
    "aspect_ratio_ids": _aspect_ratio_ids,
    "aspect_ratio_mask": lambda scene: scene.each(*[1] * scene.vision.max_num_tiles)[:, None],
    "visual_feats": _regions,
    "visual_embeds": _regions,
    "visual_pos": lambda scene: scene.noise(
        scene.batch, _REGIONS, scene.config.visual_pos_dim
    ).sigmoid(),
    "input_features": _input_features,
    "input_features_mask": _frame_mask(torch.bool),
    "feature_attention_mask": _frame_mask(torch.long),
    "chunk_sample_lengths": _sample_lengths,
    "input_values": _input_values,
    "audio_input_ids": _audio_input_ids,
    "protein_input_ids": lambda scene: _ids(scene, 6, scene.config.protein_encoder_config),
    "protein_attention_mask": _ones_like("protein_input_ids"),
    "query_embeds": lambda scene: scene.noise(scene.batch, 5, scene.config.hidden_size),
    "encoder_hidden_states": _encoder_hidden_states,
    "qformer_input_ids": lambda scene: _ids(scene, _TEXT_LENGTH, scene.config.qformer_config),
    "qformer_attention_mask": _ones_like("qformer_input_ids"),
    "input_ids": _input_ids,
    "attention_mask": _attention_mask,
    "mm_token_type_ids": _token_kinds,
    "moe_mm_token_type_ids": _token_kinds,
    "image_embeds_position_mask": _image_places,
    "image_attention_mask": _image_attention_mask,
    "cross_attention_mask": lambda scene: torch.ones(
        *scene.inputs["input_ids"].shape, 1, scene.vision.max_num_tiles, dtype=torch.long
    ),
    "classes_input_ids": lambda scene: _ids(scene, _TEXT_LENGTH),
    "classes_attention_mask": _ones_like("classes_input_ids"),
    "classes_structure": lambda scene: scene.each(1).flatten(),  # one class for each image
    "tasks_input_ids": lambda scene: _ids(scene, _TEXT_LENGTH),
    "tasks_attention_mask": _ones_like("tasks_input_ids"),
    "task_inputs": lambda scene: scene.integers(
        1, scene.config.text_encoder_vocab_size, scene.batch, scene.config.task_seq_len
    ),
    "bbox": _boxes,
    "state": lambda scene: scene.noise(scene.batch, scene.config.max_state_dim),
    "noise": lambda scene: scene.noise(
        scene.batch, scene.config.chunk_size, scene.config.max_action_dim
    ),
    "timestep": lambda scene: torch.full((scene.batch,), 0.5),
    "decoder_input_ids": _decoder_input_ids,
    "decoder_attention_mask": _ones_like("decoder_input_ids"),
    "labels": _labels,
    "use_cache": lambda scene: False,
}
