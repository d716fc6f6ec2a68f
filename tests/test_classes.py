"""Classes made by rule: what they compute, and that they pickle, compile, export and load."""

import copy
import pickle

import pytest
import torch
import zoo
from torch import Tensor, nn

from vlprune.calls import calls_of, map_tensors, run, tensors_of
from vlprune.classes import narrow, passing, picking, split
from vlprune.classes.padded import PaddedLinear
from vlprune.dissect import default_inputs
from vlprune.errors import UnknownNameError
from vlprune.layout import resolve
from vlprune.shapes import QuickShapes


def padded(rows: int = 6, columns: int = 4) -> PaddedLinear:
    layer = nn.Linear(columns, rows).double()
    layer.__class__ = PaddedLinear
    layer.after_swap()
    return layer


def cut(layer: PaddedLinear, dim: int, padded: set[int], gone: set[int], span: int) -> None:
    """Take rows (0) or columns (1) out of a padded layer, as a cut does."""
    size = layer.weight.shape[dim]
    layer.drop_places(dim, size, padded, gone, span)
    left = [i for i in range(size) if i not in padded | gone]
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, torch.tensor(left)))
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias.detach()[left])


@torch.no_grad()
def test_a_padded_layer_answers_zeros_where_rows_are_gone() -> None:
    layer = padded()
    x = torch.randn(3, 4, dtype=torch.float64)
    whole = layer(x)
    cut(layer, 0, {1, 4}, set(), 0)
    expected = whole.clone()
    expected[:, [1, 4]] = 0
    assert torch.allclose(layer(x), expected, atol=1e-15)
    assert list(layer.state_dict()) == ["weight", "bias"]
    cut(layer, 1, {2}, set(), 0)
    x[:, 2] = 0
    assert torch.allclose(layer(x), layer(x.index_fill(1, torch.tensor([2]), 9.0)), atol=1e-15)


@torch.no_grad()
def test_whole_heads_go_from_a_padded_layer_for_good() -> None:
    layer = padded(rows=6)  # two heads of three features
    x = torch.randn(3, 4, dtype=torch.float64)
    whole = layer(x)
    cut(layer, 0, {0, 3}, set(), 3)  # the first feature of both
    cut(layer, 0, set(), {0, 1}, 0)  # what is left of the first head
    assert layer(x).shape == (3, 3)
    assert torch.allclose(layer(x)[:, 1:], whole[:, 4:], atol=1e-15)
    assert torch.equal(layer(x)[:, 0], torch.zeros(3, dtype=torch.float64))


@torch.no_grad()
def test_a_padded_layer_exports_and_compiles() -> None:
    layer = padded()
    cut(layer, 0, {1}, set(), 0)
    x = torch.randn(3, 4, dtype=torch.float64)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


class Fixed(nn.Module):
    """An attention that takes the width of its heads from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, n, c))


def test_a_narrow_class_takes_its_width_from_an_attribute() -> None:
    module = Fixed()
    x = torch.randn(1, 3, 8)
    expected = module(x)
    (name, *_) = [n for n in narrow.narrow_names(Fixed) if n.endswith("__0")]
    module.__class__ = resolve(name)
    module.vlprune_width = 8
    assert torch.equal(module(x), expected)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    assert isinstance(again, Fixed)
    assert torch.equal(again(x), expected)
    with pytest.raises(UnknownNameError, match="has no places"):
        resolve(name.removesuffix("__0") + "__7")


def test_a_split_class_counts_heads_instead_of_features() -> None:
    from transformers.models.clip.modeling_clip import CLIPAttention

    module = zoo.make("hf_clip").vision_model.encoder.layers[0].self_attn
    (name,) = split.split_names(CLIPAttention, "num_heads")
    other = copy.deepcopy(module)
    other.__class__ = resolve(name)
    x = torch.randn(1, 3, 40)
    assert torch.equal(other(x)[0], module(x)[0])
    other.v_proj = nn.Linear(40, 8)  # two features a head where queries have ten
    other.out_proj = nn.Linear(8, 40)
    assert other(x)[0].shape == (1, 3, 40)
    assert split.split_names(nn.Linear, "num_heads") == []


class Biased(nn.Module):
    """Hands on the bias that it was given."""

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x + bias.sum(), bias


def test_a_picking_class_takes_its_part_and_hands_on_the_whole() -> None:
    module = Biased()
    module.__class__ = resolve(picking.picking_name(Biased, "bias", 0, 2))
    module.vlprune_kept = (0, 2)
    bias = torch.arange(6.0)
    x, handed = module(torch.zeros(1), bias=bias)
    assert float(x) == 0 + 1 + 4 + 5
    assert handed is bias
    assert picking.picking_name(nn.Linear, "a__b", 0, 1) == ""


@pytest.mark.parametrize("kind", passing.passing_names(Biased))
def test_a_passing_block_answers_its_input(kind: str) -> None:
    module = Biased()
    module.__class__ = resolve(kind)
    assert passing.is_passing(module)
    assert isinstance(module, Biased)
    x = torch.randn(2)
    answer = module(x, bias=x)
    assert (answer[0] if isinstance(answer, tuple) else answer) is x


def test_classes_of_a_function_have_no_name() -> None:
    class Local(Fixed):
        pass

    assert narrow.narrow_names(Local) == split.split_names(Local, "num_heads") == []
    assert passing.passing_names(Local) == []


@pytest.mark.parametrize("name", ["deit", "open_clip", "hf_clip"])
def test_quick_shapes_are_the_shapes(name: str) -> None:
    model = zoo.make(name)
    (call, *_) = calls_of(default_inputs(model))
    expected = [(t.shape, t.dtype) for t in tensors_of(run(model, call))]
    empty = copy.deepcopy(model).to("meta")
    with torch.no_grad(), QuickShapes():
        got = run(empty, map_tensors(call, lambda t: t.to("meta")))
    assert [(t.shape, t.dtype) for t in tensors_of(got)] == expected
