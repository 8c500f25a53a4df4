"""Exchange: a placed module's weights for other programs, and theirs for the module."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint
from .agreement import on_all_ranks
from .averaging import Average, using
from .checkpoint import pretrained
from .steps import Steps

if TYPE_CHECKING:
    from .run.run import Run
    from .weights.loading import LoadedWeights


class Exchange(Steps):
    """What a Fit does with weights outside of its runs; its checkpoints are another matter. Every rank calls these.

    Attributes:
        loaded_weights: the name of the file or directory that the weights were last loaded from; "" for none.
    """

    loaded_weights = ""
    _run_of_load: "Callable[[], Run | None]" = staticmethod(lambda: None)

    @property
    def weights_are_loaded(self) -> bool:
        """Whether the module's weights are those of ``load_weights``: nothing was trained since."""
        return self._run_of_load() is not None and self._run_of_load() is self._run

    def export(self, path: str | Path, weights: Average | None = None) -> Path:
        """Write the module's plain whole weights, by parameter name, as one safetensors file; only the trainable ones
        with ``save_only_trainable``; with ``weights``, those of an Average among the callbacks.
        """
        path = Path(path).expanduser()
        with self.placement.mode.evaluating(), using(weights, self.strategy):
            checkpoint.export(self.strategy, path, only_trainable=self.args.save_only_trainable)
        return path

    def save_pretrained(
        self, directory: str | Path, weights: Average | None = None, model_card: bool = True, **options: Any
    ) -> Path:
        """Have a transformers or peft model write the directory that its ``from_pretrained`` loads, with a model card.

        Args:
            directory: the folder to write, which is made.
            weights: an Average among the callbacks, whose weights are written instead of the module's own.
            model_card: write README.md: what was trained, on what, how, and with which result, in the form that the
                Hugging Face Hub reads. One that somebody else has written there stays.
            **options: of the model's own ``save_pretrained``.
        """
        directory = Path(directory).expanduser()
        card: Any = None
        if model_card and self.strategy.is_main:
            from .record import card as of_card  # who saves no such directory needn't import it

            card = of_card if of_card.is_free(directory) else None
        with self.placement.mode.evaluating(), using(weights, self.strategy):
            pretrained.save_pretrained(self.strategy, directory, self.args.save_only_trainable, **options)
        on_all_ranks(self.strategy, lambda: card and card.write_card(self, directory, weights), RuntimeError)
        return directory

    def load_weights(
        self, path: str | Path, strict: bool = True, *, rename: Sequence[str] = (), key: str | None = None
    ) -> "LoadedWeights":
        """Load the module's parameters and buffers from weights of any program: a file of torch.save, a Lightning
        checkpoint, a safetensors file, a directory of torch.distributed.checkpoint or of a transformers model, or a
        checkpoint of a run. See docs/converting.md.

        The module is placed first, where it isn't, and each rank reads the parts that it holds. Call it before
        ``train``, or between two: the run begins with these weights. A checkpoint that it is resumed from comes after
        them. The optimizer's moments and all counters stay what they are, and ``train`` begins them anew anyway; the
        float32 master weights of a 16-bit precision take the loaded values, and so does an ``Average`` when training
        begins.

        Nothing is changed before all names and shapes fit; where reading itself fails, some tensors are new already.

        Args:
            path: of a file or a directory.
            strict: every name must be on both sides. False loads what fits, and returns what doesn't.
            rename: patterns OLD=NEW for the names in the file, where * stands for any text: ``["model.*=*"]``.
            key: where the weights are in a file of torch.save or a DCP directory, if not at a usual place.

        Returns:
            ``(missing_keys, unexpected_keys)``, as torch's ``load_state_dict``.

        Raises:
            ValueError: on every rank; names what is missing, unexpected or of another shape, or what can't be read.

        Example:
            >>> fit = Fit(Regressor(), train_data=dataset, progress=False)
            >>> weights = {f"model.{name}": tensor for name, tensor in Regressor().state_dict().items()}
            >>> torch.save({"state_dict": weights}, "epoch=3.ckpt")
            >>> fit.load_weights("epoch=3.ckpt", rename=["model.*=*"])
            LoadedWeights(missing_keys=[], unexpected_keys=[])
        """
        from .weights.loading import load_weights  # who loads none needn't import it

        if self.source.module_init is not None:
            warnings.warn(
                "fit.load_weights fills the module that is there, and module_init makes a fresh one for each trial of "
                "a search and each further train(), which doesn't have these weights. Load them in module_init, too.",
                stacklevel=2,
            )
        path = Path(path).expanduser()
        with self.placement.mode.evaluating():
            result = load_weights(self.strategy, path, strict, rename, key)
        self.loaded_weights = path.name
        if self._run is not None:
            self._run_of_load = weakref.ref(self._run)  # each train() has a run of its own
        return result
