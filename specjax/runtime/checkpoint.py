"""Checkpoints: everything about Orbax is behind this one class.

A checkpoint is one folder, `directory/STEP/`, that appears under its name only when it is complete: what a
kill leaves half-written has another name and is never read. It holds the arrays of the state under the names
of their paths, and what lives on the host as JSON. Orbax stores arrays without a checksum, so a digest of
each goes with it: what is restored is what was saved, or an error.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.runtime.errors import UserError, nearest

_FORMAT = "specjax checkpoint 1"


class Checkpointer:
    """Saves asynchronously; keeps the last few checkpoints and the best by a metric. A context manager."""

    def __init__(self, directory: str | Path, *, keep_last: int, best_metric: str | None, best_mode: str):
        """Opens the folder, making it if need be, and removes what a killed run left unfinished.

        Args:
          directory: of the checkpoints of one run.
          keep_last: how many of the latest to keep; at least 1.
          best_metric: the key of `metrics` by which one more is kept, or None.
          best_mode: "min" or "max", which end of the metric is the better one.

        Raises:
          UserError: where Orbax cannot make sense of what lies in the folder.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}; at least 1 checkpoint has to be kept to resume from")
        if best_mode not in ("min", "max"):
            raise UserError(f'best_mode is "{best_mode}"; it is either "min" or "max"')
        self.directory = Path(directory).resolve()
        self.best_metric = best_metric
        keep = [policies.LatestN(keep_last)]
        best = None
        if best_metric is not None:
            best = lambda metrics: metrics[best_metric]
            how = {"reverse": best_mode == "min", "n": 1, "keep_checkpoints_without_metrics": False}
            keep.append(policies.BestN(get_metric_fn=best, **how))
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
                f"the checkpoints in {self.directory} cannot be read ({_first_line(error)}); delete the "
                "damaged one, or choose another --workdir"
            ) from error

    def save(self, step: int, state: Any, *, host: dict, metrics: dict[str, float]) -> None:
        """Starts to save; the state may be replaced, or donated, as soon as this returns.

        Args:
          step: not saved before.
          state: a tree of arrays.
          host: anything that JSON can hold.
          metrics: with the best metric among them; none where nothing was measured at this step, which then is kept as
            the latest alone.
        """
        if metrics and self.best_metric is not None and self.best_metric not in metrics:
            raise UserError(
                f'"{self.best_metric}" is to tell the best checkpoint and is not measured'
                f"{nearest(self.best_metric, metrics)}"
            )
        arrays = _named(state)
        described = {
            name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": _digest(x)} for name, x in arrays.items()
        }
        items = self._args.Composite(
            state=self._args.StandardSave(arrays),
            host=self._args.JsonSave({"format": _FORMAT, "arrays": described, "host": host}),
        )
        if not self._manager.save(step, args=items, metrics=metrics or None):
            raise ValueError(f"A checkpoint of step {step} or a later one is already in {self.directory}.")

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict, int] | None:
        """The state, the host's part and the step: of the latest checkpoint, or of `step`. None without any.

        Args:
          abstract_state: a tree of ShapeDtypeStructs; each array is laid out as its `sharding` says (None: on
            the default device), whatever the layout was when it was saved.
          step: a step that is kept.

        Raises:
          UserError: for a checkpoint that is damaged, not one of ours, or of another model.
        """
        steps = self.steps()
        if step is None:
            if not steps:
                return None
            step = steps[-1]
        elif step not in steps:
            raise UserError(f"{self.directory} keeps no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        path = self.directory / str(step)
        note = self._read(path, self._args.Composite(host=self._args.JsonRestore()))["host"]
        if not isinstance(note, dict) or note.get("format") != _FORMAT:
            raise UserError(f'{path} is not a checkpoint of this program ("{_FORMAT}"); choose another --workdir')
        wanted = {name: _on_device(x) for name, x in _named(abstract_state).items()}
        _check_same_arrays(note["arrays"], wanted, path)
        arrays = self._read(path, self._args.Composite(state=self._args.StandardRestore(wanted)))["state"]
        for name, x in arrays.items():
            if x.dtype != wanted[name].dtype or _digest(x) != note["arrays"][name]["digest"]:
                raise _damaged(path, f"{name} is not what was saved")
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), note["host"], step

    def _read(self, path: Path, items: Any) -> Any:
        try:
            return self._manager.restore(int(path.name), args=items)
        except Exception as error:  # Orbax raises Exception itself for an array that it cannot read.
            raise _damaged(path, _first_line(error)) from error

    def steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best metric; None if there is no checkpoint or no such metric."""
        return None if self.best_metric is None else self._manager.best_step()

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path, such as "params.blocks.0.kernel", in the order of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two leaves of the state have the same path; a key must not contain a full stop.")
    return named


def _on_device(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if x.sharding is not None:
        return x
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)


def _check_same_arrays(saved: dict[str, dict], wanted: dict[str, jax.ShapeDtypeStruct], path: Path) -> None:
    """Orbax itself would cast a differing dtype in silence."""
    differing = [f"{name} only there" for name in saved if name not in wanted]
    differing += [f"{name} only here" for name in wanted if name not in saved]
    for name in saved.keys() & wanted.keys():
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if there != here:
            differing.append(f"{name} is {there} there and {here} here")
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{path} is a checkpoint of another model ({sorted(differing)[0]}{more}); choose another --workdir"
        )


def _digest(x: jax.Array) -> int:
    return int(_sum_of_bits(x))


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    """The sum of an array's words modulo 2**32: the same on any mesh, since integers add in any order."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(
        f"the checkpoint {path} is damaged or not one of this program's ({detail}); delete that folder to go "
        "on from the checkpoint before it, or choose another --workdir"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
