"""Where the tensors of a file hold our parameter arrays: names, fused tensors and transposed kernels."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from specjax.models.config import DecoderConfig
from specjax.models.table import model_of


class Part(NamedTuple):
    """The location of one of our arrays in a fused tensor of the file, along the tensor's output axis.

    The axis consists of `groups` runs of `length` entries; this array is entries `start .. start + size - 1` of each.
    """

    start: int
    size: int
    length: int
    groups: int = 1


class Tensor(NamedTuple):
    """One of our parameter arrays, and where and how the file stores it.

    Attributes:
      name: name of the tensor in the file; arrays that the file fuses share a name.
      path: path of the array in our parameter tree.
      transposed: whether the file has the last two axes swapped (our kernels are [out, in], as in most files).
      part: location in a fused tensor; None if the tensor in the file holds only this array.
      expert: the index of the tensor's expert on the first axis of our array; None if the array is not split so.
      stacked: whether the file's tensor has the experts on its first axis, as our array.
    """

    name: str
    path: tuple[str | int, ...]
    transposed: bool = False
    part: Part | None = None
    expert: int | None = None
    stacked: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, in our layout, of what this tensor holds of our array of shape `shape`."""
        return shape if self.expert is None else shape[1:]

    def output_axis(self, dimensions: int) -> int:
        """The index of the output axis, along which tensors are fused, in the file's layout."""
        return dimensions - 1 if self.transposed else int(self.stacked)

    def swapped(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """What belongs to each axis of our layout, in the order of the file's, and the reverse."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor that holds our array of shape `shape`."""
        lengths = self.swapped(self.shape(shape))
        if self.part is None:
            return lengths
        axis = self.output_axis(len(lengths))
        return (*lengths[:axis], self.part.length * self.part.groups, *lengths[axis + 1 :])

    def runs(self, wanted: slice) -> list[tuple[slice, slice]]:
        """Where the file's output axis holds slice `wanted` of our outputs; several runs if there are groups.

        Each run is a slice of the wanted outputs, counted from `wanted.start`, and the slice of the file.
        """
        if self.part is None:
            return [(slice(0, wanted.stop - wanted.start), wanted)]
        start, size, length, _ = self.part
        if size == 1:  # as many groups as outputs
            every = slice(wanted.start * length + start, wanted.stop * length, length)
            return [(slice(0, wanted.stop - wanted.start), every)]
        runs = []
        for group in range(wanted.start // size, -(-wanted.stop // size)):
            low, high = max(wanted.start, group * size), min(wanted.stop, (group + 1) * size)
            shift = group * (length - size) + start
            runs.append((slice(low - wanted.start, high - wanted.start), slice(low + shift, high + shift)))
        return runs


def layer_names(layers: str, modules: Mapping[str, str], ours: str = "blocks") -> dict[str, str]:
    """Entries of `Family.names` for the weights and biases of a layer's modules.

    Args:
      layers: start of the names in the file, before the layer number.
      modules: path of each module in our layer -> its name in the file's layer.
      ours: start of our paths, before the layer number.
    """
    names = {}
    for path, module in modules.items():
        weight = "scale" if path.endswith("norm") else "kernel"
        names[f"{ours}.{{}}.{path}.{weight}"] = f"{layers}.{{}}.{module}.weight"
        names[f"{ours}.{{}}.{path}.bias"] = f"{layers}.{{}}.{module}.bias"
    return names


def tensor_names(embedding: str, layers: str, modules: Mapping[str, str], norm: str, head: str) -> dict[str, str]:
    """The `names` of a decoder's family.

    Args:
      embedding, norm, head: the embedding, the last norm and the output head in the file, without ".weight".
      layers, modules: see `layer_names`.
    """
    return {
        "embedding": f"{embedding}.weight",
        **layer_names(layers, modules),
        "norm.scale": f"{norm}.weight",
        "norm.bias": f"{norm}.bias",
        "unembedding.kernel": f"{head}.weight",
    }


def tensors(
    config: DecoderConfig, names: Mapping[str, str], *, transposed: bool = False, groups: int = 1
) -> list[Tensor]:
    """Every parameter array of a model with this config, in the order of `names`, layer by layer.

    Args:
      names: path of each array, with {} for the layer number -> tensor name in the file, with a second {} if there is
        one tensor for each expert. Entries for arrays that a model lacks (biases, an untied head) are ignored. Arrays
        of the same name are fused in this order.
      transposed: whether the file has kernels as [in, out], except the head's. Kernels of all experts in one tensor are
        always so.
      groups: number of groups in fused tensors, see `Part`.

    Raises:
      ValueError: if `names` lacks a parameter that the config describes.
    """
    params = model_of(config).abstract_params()
    shapes = {
        tuple(getattr(key, "key", None) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    by_name: dict[str, list[tuple[Tensor, int]]] = {}  # each with the number of outputs
    # Consecutive entries whose paths have the same first component are the arrays of one layer.
    for root, entries in itertools.groupby(names.items(), lambda entry: entry[0].partition(".")[0]):
        layered = list(entries)
        count = len(params.get(root, ())) if "{}" in layered[0][0] else 1
        for layer, (template, name) in itertools.product(range(count), layered):
            path = tuple(int(key) if key.isdigit() else key for key in template.format(layer).split("."))
            if path not in shapes:
                continue
            shape, kind = shapes.pop(path), path[-1]
            experts = range(config.experts) if name.count("{}") == 2 else (None,)
            stacked = experts == (None,) and len(shape) == {"kernel": 3, "bias": 2}.get(kind)
            swapped = kind == "kernel" and (stacked or transposed) and root != "unembedding"
            for expert in experts:
                tensor = Tensor(name.format(layer, expert), path, swapped, None, expert, stacked)
                by_name.setdefault(tensor.name, []).append((tensor, shape[-2 if kind == "kernel" else -1]))
    if shapes:
        raise ValueError(f"No tensor is named for {sorted(map(str, shapes))[0]}.")
    return [tensor for arrays in by_name.values() for tensor in _fused(arrays, groups)]


def _fused(arrays: Sequence[tuple[Tensor, int]], groups: int) -> list[Tensor]:
    """The arrays of one tensor of the file, each with its part of it."""
    if len(arrays) == 1:
        return [arrays[0][0]]
    sizes = [outputs // groups for _, outputs in arrays]
    starts = itertools.accumulate(sizes, initial=0)
    return [
        tensor._replace(part=Part(start, size, sum(sizes), groups))
        for (tensor, _), size, start in zip(arrays, sizes, starts, strict=False)
    ]
