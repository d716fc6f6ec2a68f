"""The data set that ships: scenes of clothes on a 3x3 grid, their captions, and a small CLIP."""

from vlprune.tasks.scenes.captions import CLASS_NAMES as CLASS_NAMES
from vlprune.tasks.scenes.captions import PLACES as PLACES
from vlprune.tasks.scenes.data import IMAGE_MEAN as IMAGE_MEAN
from vlprune.tasks.scenes.data import IMAGE_STD as IMAGE_STD
from vlprune.tasks.scenes.data import PlacedObject as PlacedObject
from vlprune.tasks.scenes.data import Scene as Scene
from vlprune.tasks.scenes.data import Scenes as Scenes
from vlprune.tasks.scenes.data import loader as loader
from vlprune.tasks.scenes.items import Items as Items
from vlprune.tasks.scenes.items import load_items as load_items
from vlprune.tasks.scenes.model import build_scenes_clip as build_scenes_clip
from vlprune.tasks.scenes.model import load_scenes_clip as load_scenes_clip
from vlprune.tasks.scenes.tokenizer import Tokenizer as Tokenizer
