"""Small helpers about files and arrays, shared by the tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file


def write_jsonl(path, records):
    """Writes one JSON object per line. Returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def bits(tree):
    """Shape, dtype and bytes of every leaf: equal only where two trees are bit for bit the same."""

    def of_leaf(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()

    return jax.tree.map(of_leaf, tree)


def change_tensors(directory, change):
    """Rewrites `model.safetensors` after `change(tensors)`, which edits the dict in place or returns another."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path, metadata={"format": "pt"})
