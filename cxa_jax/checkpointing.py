"""Best and latest states on disk. The only importer of orbax.

`checkpoints/best/STEP` is the state of the lowest dev loss, `checkpoints/latest/STEP` the newest to resume from. Each
holds four items: `params` (alone, so that evaluation reads no more), `batch_stats`, `opt_state`, and `meta` (JSON: all
that the host knows: epoch, plateau, early stop, iterator, root key, config, data fingerprint, history; and SHA-256 of
every item, compared whenever one is read); and where the run has them, `averaged_params` and `fitted_stats`, which are
evaluated in place of the first two. A state that is written once more, as after a signal on the dev split, first moves
to `checkpoints/best.replaced/BY/STEP`; the next start puts it back if what was to replace it was never finished.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from cxa_jax.array_types import PyTree
from cxa_jax.digests import digest_arrays, digest_json
from cxa_jax.distributed import barrier, is_first
from cxa_jax.errors import UserError
from cxa_jax.interruption import held_back
from cxa_jax.sharding import put
from cxa_jax.starting_weights import check_same_backbone
from cxa_jax.train_state import TrainState

log = logging.getLogger(__name__)

T = TypeVar("T")

ARRAYS = ("params", "batch_stats", "opt_state")
# What is evaluated in place of another, in the checkpoints that hold it.
EVALUATED = {"params": "averaged_params", "batch_stats": "fitted_stats"}
DIGESTS = "sha256"  # key of `meta` on disk
# What orbax and the file system raise for a checkpoint that is truncated, altered or half deleted.
DAMAGE = (ValueError, LookupError, OSError, TypeError, AttributeError)


class Checkpoints:
    """The states of one kind ('best' or 'latest') of a run; a context manager that waits for pending writes.

    With `read_only` nothing is created, cleaned up or deleted: for evaluation, also while a run is training.
    """

    def __init__(self, workdir: pathlib.Path, kind: str, *, num_kept: int = 2, read_only: bool = False):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints" / kind
        self._replaced = self.directory.with_name(f"{kind}.replaced")
        if not read_only:
            self._put_back()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else num_kept,
            cleanup_tmp_directories=not read_only,  # a reader must not take away what a running process is writing
            create=not read_only,
            read_only=read_only,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in (*ARRAYS, *EVALUATED.values())}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        with held_back():  # here and below: orbax runs event loops, which drop what a signal raises in a callback
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with held_back(check_at_end=kind is None):  # else what ends the block goes before
            self.wait()
            self._manager.close()

    def _put_back(self) -> None:
        """Undo every replacement that a killed process, or a full disk, did not let end."""
        if is_first():
            for path in self._replaced.glob("*/*"):
                if not (self.directory / path.parent.name).exists():  # orbax names a checkpoint when it is whole
                    os.replace(path, self.directory / path.name)
            shutil.rmtree(self._replaced, ignore_errors=True)
        barrier("put back")

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Write `state` and `meta` under the state's step, in the background; a crash leaves the former ones whole.

        Raises:
          UserError: this or the save before it cannot be written.
        """
        step = int(state.step)
        # On the host: of arrays that several devices hold orbax cuts out a share of each, one by one, for a second.
        held = [name for name in EVALUATED.values() if getattr(state, name)]
        arrays = jax.device_get({name: getattr(state, name) for name in (*ARRAYS, *held)})
        digests = {name: digest_arrays(tree) for name, tree in arrays.items()} | {"meta": digest_json([step, meta])}
        with held_back(), self._naming_failure():
            self._drop_replaced()
            # A run that was cut after its best was written and before its latest comes by here again.
            self._set_aside([stale for stale in self._manager.all_steps() if stale >= step], step)
            items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
            items["meta"] = ocp.args.JsonSave(meta | {DIGESTS: digests})
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when every save is on disk.

        Raises:
          UserError: one cannot be written.
        """
        with held_back(), self._naming_failure():
            self._manager.wait_until_finished()
            self._drop_replaced()

    def _set_aside(self, steps: list[int], by: int) -> None:
        """Make room for a state that replaces others; until it is whole they are not gone."""
        if not steps:
            return
        self._manager.wait_until_finished()
        if is_first():
            (self._replaced / str(by)).mkdir(parents=True, exist_ok=True)
            for step in steps:
                os.replace(self.directory / str(step), self._replaced / str(by) / str(step))
        barrier("set aside")
        self._manager.reload()

    def _drop_replaced(self) -> None:
        if not is_first() or not self._replaced.is_dir():
            return
        self._manager.wait_until_finished()
        for replaced in self._replaced.iterdir():
            if (self.directory / replaced.name).exists():
                shutil.rmtree(replaced)
        if not any(self._replaced.iterdir()):
            self._replaced.rmdir()

    def steps(self) -> list[int]:
        """Return the steps of finished checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def read_meta(self) -> dict[str, Any] | None:
        """Return the newest sound `meta`, or None if there is no checkpoint."""
        return self._first_sound(lambda step: self._read(step, {})["meta"])

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restore the newest sound checkpoint into the shapes and shardings of `abstract`; None if there is none.

        What is averaged or fitted from now on, and was not before, starts as what it stands in for.

        Raises:
          UserError: there are checkpoints and none of them can be read.
        """

        def restore_step(step: int) -> tuple[TrainState, dict[str, Any]]:
            wanted = [name for name in EVALUATED.values() if getattr(abstract, name)]
            held = [name for name in wanted if self._holds(step, name)]
            items = self._read(step, {name: getattr(abstract, name) for name in (*ARRAYS, *held)})
            for name, evaluated in EVALUATED.items():
                if evaluated in wanted and evaluated not in held:
                    items[evaluated] = jax.tree.map(jax.numpy.copy, items[name])
            counters = {
                "step": put(np.int32(step), abstract.step.sharding),
                "healthy": put(np.bool_(True), abstract.healthy.sharding),
            }
            meta = items.pop("meta")
            return TrainState(**counters, **items), meta

        return self._first_sound(restore_step)

    def restore_variables(self, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]] | None:
        """Restore only what is evaluated: {'params', 'batch_stats'}, averaged and fitted if it has such, and `meta`."""
        return self._first_sound(lambda step: self._read_evaluated(step, lambda name, _: abstract[name]))

    def restore_as_saved(self, sharding: jax.sharding.Sharding) -> dict[str, PyTree] | None:
        """Restore what `restore_variables` does in the shapes it was saved in, all with one sharding."""

        def restore_step(step: int) -> dict[str, PyTree]:
            saved = self._manager.item_metadata(step)

            def make_mould(_: str, item: str) -> PyTree:
                shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
                return jax.tree.map(shape, saved[item].tree)

            return self._read_evaluated(step, make_mould)[0]

        return self._first_sound(restore_step)

    def _read_evaluated(
        self, step: int, make_mould: Callable[[str, str], PyTree]
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Return what is evaluated, and `meta`; a mould is made of what is wanted and the item that holds it."""
        held = {name: other if self._holds(step, other) else name for name, other in EVALUATED.items()}
        items = self._read(step, {item: make_mould(name, item) for name, item in held.items()})
        return {name: items[item] for name, item in held.items()}, items["meta"]

    def _holds(self, step: int, name: str) -> bool:
        """Return whether a checkpoint was saved with an item; of a missing one that was, reading finds the damage."""
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return name in meta.get(DIGESTS, {})

    def _read(self, step: int, moulds: dict[str, PyTree]) -> dict[str, Any]:
        """Return the arrays that `moulds` names, and `meta`; raise ValueError if one is not what was saved."""
        items = {name: ocp.args.StandardRestore(mould) for name, mould in moulds.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        read = {name: restored[name] for name in moulds} | {"meta": dict(restored["meta"])}
        digests = read["meta"].pop(DIGESTS, None)
        if digests is None:
            if any(isinstance(value, dict) and value.keys() >= {*ARRAYS, "meta"} for value in read["meta"].values()):
                raise ValueError(f"meta: the name of the SHA-256 values is no longer {DIGESTS!r}")
            return read  # of a version before digests
        if digests.keys() - {*ARRAYS, *EVALUATED.values(), "meta"}:
            raise ValueError(f"meta: {DIGESTS!r} names items that no checkpoint has: {', '.join(digests)}")
        found = {name: digest_arrays(read[name]) for name in moulds} | {"meta": digest_json([step, read["meta"]])}
        altered = [name for name in found if found[name] != digests[name]]
        if altered:
            raise ValueError(f"{', '.join(altered)}: not what was saved (SHA-256 differs)")
        return read

    def _first_sound(self, read: Callable[[int], T]) -> T | None:
        problems = []
        for step in self.steps():
            try:
                with held_back():
                    return read(step)
            except DAMAGE as error:
                problems.append(f"{self.directory / str(step)}: {(str(error).splitlines() or [repr(error)])[0][:200]}")
                log.warning("checkpoint %s cannot be read, trying an older one", problems[-1])
        if problems:
            raise UserError(
                "no checkpoint can be read:\n  "
                + "\n  ".join(problems)
                + f"\nDelete {self.directory.parent} to start anew."
            )
        return None

    @contextlib.contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # orbax's thread hands on the file system's, or tensorstore's word
            reason = textwrap.shorten(str(error) or repr(error), 2000).split(" [source locations")[0]
            reason = reason if len(reason) < 300 else f"{reason[:140]} ... {reason[-140:]}"
            raise UserError(
                f"a checkpoint cannot be written to {self.directory}: {reason}\n"
                "The ones before it are whole: make room there, and the same command goes on."
            ) from error


def read_first(read: Callable[[Checkpoints], T | None], *stores: Checkpoints) -> T | None:
    """Return read(store) of the first store that holds anything sound; None if all are empty.

    Raises:
      UserError: there are checkpoints and none of them can be read.
    """
    failures = []
    for number, store in enumerate(stores):
        try:
            found = read(store)
        except UserError as error:
            failures.append(error)
            continue
        if found is not None:
            if number:
                log.warning("nothing sound in %s; taken is the newest of %s", stores[0].directory, store.directory)
            return found
    if failures:
        raise failures[0]
    return None


def load_backbone(workdir: pathlib.Path, config: dict[str, Any], abstract: TrainState) -> dict[str, PyTree]:
    """Return the backbone's {'params', 'batch_stats'} of another run's best state.

    Args:
      workdir: of that run.
      config: flat config of the run that takes them. A dilated network has the whole one's variables.
      abstract: whose sharding the arrays get.

    Raises:
      UserError: that run has no best state, or another backbone, or one that ends after another stage.
    """
    if not (workdir / "checkpoints" / "best").is_dir():
        raise UserError(f"config.init.run={workdir} is no workdir with a best state")
    with Checkpoints(workdir, "best", read_only=True) as best:
        meta = best.read_meta()
        if meta is None:
            raise UserError(f"config.init.run={workdir} has no best state")
        check_same_backbone(f"config.init.run={workdir}", meta["config"], config)
        variables = best.restore_as_saved(abstract.step.sharding)
    log.info("backbone from %s, step %s", workdir, meta["progress"]["best_step"])
    return {kind: variables[kind]["backbone"] for kind in variables}
