"""The newest state of a fleet on disk, by orbax: what a stopped training goes on from.

A checkpoint appears whole or not at all, and what is restored has the bytes that were saved: they
are hashed, since orbax and the format below it do not.
"""

import functools
import hashlib
import re
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlp_jax.records import provenance
from mlp_jax.records import rows as store
from mlp_jax.training.config import UserError, one_line

Tree = TypeVar("Tree")


class Checkpoints:
    """Checkpoints of one training in `directory`, due every `every` epochs (0: never).

    `about` is what a training must share with a checkpoint to go on from it. Saving is
    asynchronous; `close` waits for it.
    """

    def __init__(self, directory: Path, about: dict, every: int):
        self.directory, self.about, self.every = directory, about, every
        self._manager = None

    def due(self, epoch: int) -> bool:
        return self.every > 0 and epoch % self.every == 0

    def save(self, epoch: int, tree) -> None:
        """Save a tree of arrays as the state after `epoch`, in place of any older one."""
        import jax
        import orbax.checkpoint as ocp

        tree = jax.tree.map(np.array, tree)  # copies: the caller goes on writing into its arrays
        about = provenance.sign(self.about | {"arrays": _digest(tree, epoch)})
        item = ocp.args.Composite(
            arrays=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(about)
        )
        try:
            manager = self._open()
            manager.save(epoch, args=item)
        except Exception as error:  # tensorstore tells a full disk in its own way
            raise _unwritten(self.directory, error) from error
        if manager.latest_step() != epoch:  # orbax saves no earlier one than it has
            raise OSError(f"{self.directory} holds a later checkpoint, which is damaged: remove it")

    def restore(self, like: Tree) -> tuple[int, Tree] | None:
        """Epoch and arrays of the newest checkpoint, with the shapes and types of `like`.

        None where there is none; a damaged one is set aside, with a line that says so. Raises
        UserError where the checkpoint is another training's.
        """
        if not self.directory.exists():
            return None
        import orbax.checkpoint as ocp

        try:
            manager = self._open()
            if (epoch := manager.latest_step()) is None:
                return None
            about = manager.restore(epoch, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
            saved = provenance.unsign(about["about"])
            digest = saved.pop("arrays")
            if difference := provenance.difference(saved, self.about):
                raise UserError(f"{self.directory} holds a checkpoint with {difference}")
            item = ocp.args.Composite(arrays=ocp.args.StandardRestore(like))
            tree = manager.restore(epoch, args=item)["arrays"]
            if _digest(tree, epoch) != digest:
                raise ValueError("its SHA-256 is another")
        except (MemoryError, UserError):
            raise
        except Exception as error:  # whatever a parser of damaged bytes raises
            self.close()
            store.set_aside(self.directory, _reason(error))
            return None
        return epoch, tree

    def close(self) -> None:
        """Wait for what is being saved; OSError where it cannot be."""
        manager, self._manager = self._manager, None
        if manager:
            try:
                manager.wait_until_finished()
                manager.close()
            except Exception as error:
                raise _unwritten(self.directory, error) from error

    def _open(self):
        if self._manager is None:
            import jax
            import orbax.checkpoint as ocp

            _hush()
            # every process saves for itself: orbax would wait for all of a pod at each save
            me = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    create=False,
                    cleanup_tmp_directories=True,
                    multiprocessing_options=alone,
                ),
            )
        return self._manager


def _unwritten(directory: Path, error: Exception) -> OSError:
    return OSError(f"{directory} cannot be written: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The cause, which tensorstore says last before a page of JSON."""
    said = re.sub(r" \[(os_error_code|source locations|tensorstore_spec)=?.*", "", one_line(error))
    return said.rpartition(": ")[2]


@functools.cache
def _hush() -> None:
    """Let each error of orbax reach us once, as the exception that it raises.

    It logs them from several threads too; and at the first error of many reads or writes its event
    loop closes, which the others find out later, one traceback each.
    """
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _digest(tree, epoch: int) -> str:
    """SHA-256 (hex) of all arrays of a tree, their types and shapes, and the epoch."""
    import jax

    digest = hashlib.sha256(str(epoch).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
