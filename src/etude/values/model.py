"""A model: a transformers checkpoint as one value."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.values import checkpoint, packed
from etude.values.digest import canonical, digest, digest_files
from etude.values.edits import Edit, from_plain, to_plain
from etude.values.errors import InputError
from etude.values.packed import Quantized

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from etude.values.anatomy import Anatomy

EDITS, HISTORY = "edits.json", "history.json"


class Model:
    """Weights, tokenizer and structure of a language model.

    A model that was loaded, or that a method gave back, is frozen: `copy` it and change the copy.  Its structure is a
    config plus a list of `edits`, replayed before the weights load.  Weights load when `network` is first read, from
    safetensors only.
    """

    def __init__(
        self,
        network: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        folder: Path | None = None,
        dtype: str = "float32",
        base: PretrainedConfig | None = None,
        edits: Sequence[Edit] = (),
        history: Sequence[Mapping[str, float]] = (),
    ):
        if network is None and folder is None:
            raise ValueError("a Model needs a network, or a folder to load one from")
        self._network, self._tokenizer, self._folder, self._dtype = network, tokenizer, folder, dtype
        self._base = base if base is not None or network is None else copy.deepcopy(network.config)
        if self._base is not None and network is not None and not self._base.architectures:
            self._base.architectures = network.config.architectures = [type(network).__name__]
        self._edits = tuple(edits)
        self._history = [dict(row) for row in history]
        self.frozen = network is None

    # Reading.

    @property
    def network(self) -> PreTrainedModel:
        """The torch module, in evaluation mode; loaded when first asked for.  Raises InputError if the checkpoint is broken."""
        if self._network is None:
            assert self._folder is not None
            self._network = checkpoint.load_network(self._folder, self.base, self._edits, self._dtype).to(device())  # type: ignore[arg-type]
            if self._tokenizer_files():
                checkpoint.check_tokenizer(self._network, self.tokenizer, self._folder)
        return self._network

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.  Raises InputError if the checkpoint has none."""
        if self._tokenizer is None:
            if self._folder is None or not self._tokenizer_files():
                raise InputError("the model has no tokenizer", where=str(self._folder or ""), remedy="Save one beside its weights.")
            self._tokenizer = checkpoint.load_tokenizer(self._folder)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None or (self._folder is not None and self._tokenizer_files())

    def _tokenizer_files(self) -> bool:
        assert self._folder is not None
        return any((self._folder / name).exists() for name in checkpoint.TOKENIZER_FILES)

    @property
    def base(self) -> PretrainedConfig:
        """The config on which the edits are replayed."""
        if self._base is None:
            assert self._folder is not None
            self._base = checkpoint.load_config(self._folder)
        return self._base

    @property
    def config(self) -> PretrainedConfig:
        """The config as it stands after the edits."""
        return self.network.config if self._edits else self.base

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self._edits

    @property
    def history(self) -> list[dict[str, float]]:
        """What training recorded: a row a logged step (step, tokens, loss, learning_rate)."""
        return [dict(row) for row in self._history]

    @property
    def kind(self) -> str:
        """``causal``, ``masked``, ``seq2seq`` or ``encoder``."""
        return checkpoint.kind(self.base)

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """Blocks, projections and embeddings, found by structure."""
        from etude.values.anatomy import Anatomy

        return Anatomy(self)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters: a tied one counts once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def digest(self) -> str:
        """Digest of weights, tokenizer, config and edits."""
        if self._network is None:
            assert self._folder is not None
            return digest(digest_files(checkpoint.content_files(self._folder), self._folder), self._dtype)
        return digest(
            checkpoint.digest_state(self._network),
            self.base.to_json_string(use_diff=False),
            [to_plain(edit) for edit in self._edits],
            checkpoint.tokenizer_text(self.tokenizer) if self.has_tokenizer else None,
        )

    def __repr__(self) -> str:
        loaded = f", {self.parameters:,} parameters" if self._network is not None else ""
        return f"Model({self.base.model_type}, {self.kind}{loaded}{', ' + str(len(self._edits)) + ' edits' if self._edits else ''})"

    # New models from old ones.

    def copy(self) -> Model:
        """A draft with weights of its own, which may be changed."""
        return self._with(copy.deepcopy(self.network))

    def sharing(self) -> Model:
        """A draft whose structure may be changed and whose weights are this model's own: for looking, not for training."""
        network = self.network
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        return self._with(copy.deepcopy(network, shared))

    def _with(self, network: PreTrainedModel) -> Model:
        draft = Model(network, self._tokenizer, base=copy.deepcopy(self.base), edits=self._edits, history=self._history)
        if self._tokenizer is None and self.has_tokenizer:
            draft._tokenizer = self.tokenizer
        return draft

    def skipping(self, block: int) -> Model:
        """This model without one of its blocks, sharing all weights."""
        view = self.sharing()
        view.anatomy.drop([block])
        return view

    def frozen_now(self) -> Model:
        """Declare the draft finished; it can no longer be edited."""
        self.frozen = True
        if self._network is not None:
            self._network.eval()
        return self

    def edit(self, *edits: Edit) -> None:
        """Apply edits to a draft and remember them.  Raises ValueError on a frozen model."""
        self.require_draft()
        network = self.network
        for change in edits:
            change.apply(network)
        self._edits += edits
        self.__dict__.pop("anatomy", None)

    def replace_edits(self, edits: Sequence[Edit]) -> None:
        """Write the list of edits anew, for edits that merge with earlier ones; the network is left as it is."""
        self.require_draft()
        self._edits = tuple(edits)
        self.__dict__.pop("anatomy", None)

    def record(self, history: Sequence[Mapping[str, float]]) -> None:
        """Append what training recorded to a draft's history."""
        self.require_draft()
        self._history += [dict(row) for row in history]

    def require_draft(self) -> None:
        if self.frozen:
            raise ValueError("this model is frozen: change a copy, `draft = model.copy()`")

    # To and from folders.

    @classmethod
    def load(cls, reference: str | Path, dtype: str = "float32") -> Model:
        """Load from a folder or from the Hub by its id; weights follow when they are needed.

        dtype: ``float32``, ``bfloat16`` or ``float16``, whatever the file holds.
        Raises InputError when there is nothing, or only pickles, or the config cannot be read.
        """
        if dtype not in checkpoint.DTYPES:
            raise InputError(f"dtype is one of {', '.join(checkpoint.DTYPES)}, got {dtype!r}")
        folder = checkpoint.find(reference)
        edits = [from_plain(item) for item in checkpoint.read_list(folder / EDITS)]
        history = checkpoint.read_list(folder / HISTORY)
        return cls(folder=folder, dtype=dtype, edits=edits, history=history)

    @property
    def plain(self) -> bool:
        """Whether plain ``transformers`` loads this model: its config says all that the edits did."""
        return checkpoint.folded(self) is not None

    def save(self, folder: str | Path, *, verify: bool = True) -> None:
        """Write an ordinary Hugging Face folder, read it back, and compare its logits with this model's.

        Where the config cannot say what the edits did, ``edits.json`` stands beside it, and only Étude loads the folder: see `export`.
        Raises RuntimeError if what was written behaves otherwise.  Cost: one forward pass over a few tokens, twice.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (EDITS, HISTORY):
            (folder / name).unlink(missing_ok=True)  # of a model that was saved here before
        config = checkpoint.folded(self)
        if config is None:
            checkpoint.save_state(self.network, self.base, folder)
            (folder / EDITS).write_text(canonical([to_plain(edit) for edit in self._edits]) + "\n")
        else:
            checkpoint.save_plain(self.network, config, folder)
        if self.has_tokenizer:
            self.tokenizer.save_pretrained(folder)
        if self._history:
            (folder / HISTORY).write_text(json.dumps(self._history) + "\n")
        if verify:
            again = Model.load(folder, dtype=str(self.network.dtype).removeprefix("torch."))
            checkpoint.compare(self.network, again.network, folder)

    def export(self, folder: str | Path) -> None:
        """Write a folder that plain ``transformers`` loads with the same logits.

        What the config can say is said there; heads and channels that it cannot take away come back as zeros.
        Weights on a grid are packed, see `etude.values.packed`.
        Raises InputError if an edit can be neither folded nor padded nor packed.
        """
        if self.plain:
            return self.save(folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        if any(isinstance(edit, Quantized) for edit in self._edits):
            return packed.export(self, Path(folder))
        padded = checkpoint.padded(self)
        checkpoint.save_plain(padded, padded.config, Path(folder))
        if self.has_tokenizer:
            self.tokenizer.save_pretrained(folder)
        again = Model.load(folder, dtype=str(self.network.dtype).removeprefix("torch."))
        checkpoint.compare(self.network, again.network, Path(folder))


def device() -> torch.device:
    """Where models live: ``ETUDE_DEVICE``, else the first CUDA device, else the processor."""
    import torch

    return torch.device(os.environ.get("ETUDE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
