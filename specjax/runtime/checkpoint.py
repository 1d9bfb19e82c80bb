"""Saves and restores checkpoints with Orbax, which no other module uses for this.

A checkpoint is a folder `directory/STEP/`. It gets this name only once it is complete, so a killed process never leaves
an incomplete one. It contains the arrays, by their paths in the state, and host values as JSON. Orbax stores no
checksums, so we store a digest of each array and check it on restoring.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.runtime.errors import UserError, first_line

_FORMAT = "specjax checkpoint 3"


class Checkpointer:
    """Saves checkpoints in the background; keeps the latest ones, and the best one by a metric. A context manager."""

    def __init__(self, directory: str | Path, *, keep_last: int, best_metric: str, best_mode: str):
        """Opens or creates the folder, and removes unfinished checkpoints of a killed run.

        Args:
          directory: the folder for the checkpoints of one run.
          keep_last: how many of the latest checkpoints to keep; at least 1.
          best_metric: a key of `metrics`; the checkpoint with its best value is kept too.
          best_mode: "min" or "max": whether lower or higher values are better.

        Raises:
          UserError: if Orbax cannot read the folder.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self.directory = Path(directory).resolve()
        best = lambda metrics: metrics[best_metric]
        how = {"reverse": best_mode == "min", "n": 1, "keep_checkpoints_without_metrics": False}
        keep = [policies.LatestN(keep_last), policies.BestN(get_metric_fn=best, **how)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            best_fn=best,
            best_mode=best_mode,
            cleanup_tmp_directories=True,
        )
        self._args = ocp.args
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"the checkpoints in {self.directory} cannot be read ({type(error).__name__}: {first_line(error)}); "
                "delete the damaged one, or choose another --workdir"
            ) from error

    def save(self, step: int, state: Any, *, host: dict, metrics: dict[str, float]) -> None:
        """Starts to save; the caller may replace or donate the state as soon as this returns.

        Args:
          step: the step, larger than all saved ones.
          state: a tree of arrays.
          host: any JSON value.
          metrics: metrics at this step, including `best_metric`; if empty, the checkpoint cannot be the best one and is
            kept only while it is among the latest.

        Raises:
          UserError: if the disk has no room for it.
        """
        arrays = _named(state)
        needed = int(1.1 * sum(x.nbytes for x in arrays.values())) + 2**20  # with the files' own tables
        if jax.process_count() == 1 and (free := shutil.disk_usage(self.directory).free) < needed:
            raise UserError(
                f"a checkpoint of up to {needed} bytes does not fit {self.directory}, which has {free} bytes left; "
                "make room, and the same command resumes from the checkpoint before"
            )
        described = {
            name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": _digest(x)} for name, x in arrays.items()
        }
        items = self._args.Composite(
            state=self._args.StandardSave(arrays),
            host=self._args.JsonSave({"format": _FORMAT, "arrays": described, "host": host}),
        )
        if not self._manager.save(step, args=items, metrics=metrics or None):
            raise ValueError(f"A checkpoint of step {step} or a later one is already in {self.directory}.")

    def restore(self, abstract_state: Any) -> tuple[Any, dict, int] | None:
        """Returns (state, host value, step) of the latest checkpoint, or None if there is none.

        Args:
          abstract_state: a tree of ShapeDtypeStructs; each array is laid out by its `sharding`, however it was laid
            out when it was saved.

        Raises:
          UserError: if the checkpoint is damaged, of another program or of another model.
        """
        if not self.steps():
            return None
        step = self.steps()[-1]
        path = self.directory / str(step)
        about = self._read(path, self._args.Composite(host=self._args.JsonRestore()))["host"]
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise UserError(f'{path} is not a checkpoint of this program ("{_FORMAT}"); choose another --workdir')
        wanted = _named(abstract_state)
        _check_same_arrays(about["arrays"], wanted, path)
        arrays = self._read(path, self._args.Composite(state=self._args.StandardRestore(wanted)))["state"]
        for name, x in arrays.items():
            if x.dtype != wanted[name].dtype or _digest(x) != about["arrays"][name]["digest"]:
                raise _damaged(path, f"{name} is not what was saved")
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), about["host"], step

    def _read(self, path: Path, items: Any) -> Any:
        try:
            return self._manager.restore(int(path.name), args=items)
        except Exception as error:  # Orbax raises Exception itself for an array that it cannot read.
            raise _damaged(path, f"{type(error).__name__}: {first_line(error)}") from error

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        """Waits for saves, and closes the folder."""
        self._manager.close()


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as "params.blocks.0.kernel", in tree order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_same_arrays(saved: dict[str, dict], wanted: dict[str, jax.ShapeDtypeStruct], path: Path) -> None:
    """Raises UserError if names, shapes or dtypes differ; Orbax would silently cast a dtype."""
    differing = [f"{name} is only in the checkpoint" for name in saved if name not in wanted]
    differing += [f"{name} is only in this model" for name in wanted if name not in saved]
    for name in saved.keys() & wanted.keys():
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if there != here:
            differing.append(f"{name} is {there} in the checkpoint and {here} in this model")
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{path} is a checkpoint of another model or of an earlier version ({sorted(differing)[0]}{more}); choose "
            "another --workdir"
        )


def _digest(x: jax.Array) -> int:
    return int(_sum_of_hashes(x))


@jax.jit
def _sum_of_hashes(x: jax.Array) -> jax.Array:
    """The sum modulo 2**32 of a hash of each word and its index: values that changed places change it.

    Integer addition is exact, so the mesh does not affect it. Source of the hash: the finaliser of MurmurHash3.
    """
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}"))
    hashes = words.astype(jnp.uint32)
    for axis in range(words.ndim):
        places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        hashes = (hashes ^ (hashes >> 16)) * jnp.uint32(0x85EBCA6B) + places * jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        hashes = (hashes ^ (hashes >> 15)) * jnp.uint32(factor)
    return jnp.sum(hashes ^ (hashes >> 16), dtype=jnp.uint32)


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(
        f"the checkpoint {path} is damaged or of another program ({detail}); delete that folder to resume "
        "from the previous checkpoint, or choose another --workdir"
    )
