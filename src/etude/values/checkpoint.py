"""Checkpoint folders: finding, reading, writing, and the check that what was written is what was meant."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.values.digest import LENGTH
from etude.values.edits import Arrange, Attributes, Bias, Edit, Narrow, Tie
from etude.values.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from etude.values.model import Model

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model", "vocab.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
KINDS = {"ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked", "ForPreTraining": "masked", "ForConditionalGeneration": "seq2seq"}


@functools.cache
def quiet_transformers() -> Any:
    """Import transformers once, without its progress bars: Étude draws its own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


# Finding.


def find(reference: str | Path) -> Path:
    """The folder of a checkpoint: the path itself, or a snapshot of the Hub repository of that name.

    Raises InputError when there is none, or none with safetensors.
    """
    folder = Path(reference).expanduser()
    if not folder.exists():
        if str(reference).startswith((".", "/", "~")) or str(reference).count("/") > 1:
            beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise InputError(f"there is no checkpoint folder {folder}", remedy=nearest(folder.name, beside))
        folder = _download(str(reference))
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json", remedy="A checkpoint is a folder with config.json and model.safetensors.")
    if not any(folder.glob("*.safetensors")):
        if any(any(folder.glob(pattern)) for pattern in PICKLES):
            raise InputError(
                f"{folder} holds its weights only as pickles, which can run code when they are read",
                remedy="Convert them to safetensors first: load in transformers where you trust them, then save_pretrained.",
            )
        raise InputError(f"{folder} holds no safetensors", remedy="A checkpoint is a folder with config.json and model.safetensors.")
    return folder


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the Hub client raises a dozen unrelated kinds: offline, gated, mistyped, not found
        raise InputError(f"there is neither a folder nor a Hub model {name!r} to be had: {error}".split("\n")[0], remedy="Check the spelling, the network, HF_TOKEN.") from error


def content_files(folder: Path) -> list[Path]:
    """The files that make the model what it is: weights, config, edits, tokenizer."""
    return [path for path in folder.iterdir() if path.is_file() and path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja") and path.name != "history.json"]


# Reading.


def read_list(path: Path) -> list[dict[str, Any]]:
    """A list of mappings from a JSON file; nothing if there is no file.  Raises InputError if it holds anything else."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", remedy="Save the model again.") from error
    if not (isinstance(found, list) and all(isinstance(item, dict) for item in found)):
        raise InputError(f"{path} holds no list of mappings", remedy="Save the model again.")
    return found


def load_config(folder: Path) -> PretrainedConfig:
    """Read a config.  Raises InputError if it is none, or of an architecture that needs remote code."""
    transformers = quiet_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}", remedy="Is it a transformers config, of an architecture that needs no remote code?") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer.  Raises InputError if it is broken."""
    transformers = quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}", remedy="Is tokenizer.json whole?") from error


def network_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that the config names, or the causal one of its type."""
    transformers = quiet_transformers()
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    return mapping[type(config)] if type(config) in mapping else transformers.AutoModel._model_mapping[type(config)]


def kind(config: PretrainedConfig) -> str:
    """``causal``, ``masked``, ``seq2seq`` or ``encoder``, by the class that the config names."""
    name = network_class(config).__name__
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "encoder")


def load_network(folder: Path, base: PretrainedConfig, edits: tuple[Edit, ...], dtype: str) -> PreTrainedModel:
    """Build the network, replay the edits, load the weights.  Raises InputError if weights are missing, broken, or not finite."""
    import torch
    from safetensors import SafetensorError

    try:
        if edits:
            network = rebuild(base, edits, getattr(torch, dtype))
            load_state(network, read_state(folder))
        else:
            network = _from_pretrained(folder, base, dtype)
    except SafetensorError as error:
        raise InputError(f"the weights in {folder} are broken: {error}", remedy="The file is truncated or corrupt; fetch it again.") from error
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"the weights in {folder} are not finite: {name} holds NaN or infinity", remedy="The checkpoint was saved by a run that diverged.")
    return network.eval()


def _from_pretrained(folder: Path, base: PretrainedConfig, dtype: str) -> PreTrainedModel:
    loaded: Any
    try:
        loaded = network_class(base).from_pretrained(folder, config=copy.deepcopy(base), dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"the weights in {folder} do not fit its config: {str(error).splitlines()[0]}", remedy="Do config.json and the safetensors belong together?") from error
    network, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} the first", remedy="Do config.json and the safetensors belong together?")
    return network


def rebuild(base: PretrainedConfig, edits: tuple[Edit, ...], dtype: torch.dtype) -> PreTrainedModel:
    """A network of the config with the edits replayed; its weights hold nothing yet."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        network: Any = network_class(base)(copy.deepcopy(base))
        network = network.to(dtype)
    for edit in edits:
        edit.apply(network)
    network.tie_weights()  # so that loading any one of several tied names fills them all
    return network


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state.update(load_file(path))
    return state


def load_state(network: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict that `save_state` wrote; tied tensors are written once."""
    missing, surplus = network.load_state_dict(state, strict=False)
    tied = shared_names(network)
    missing = [name for name in missing if not tied.get(name, set()) & state.keys()]
    if missing or surplus:
        raise InputError(f"the weights do not fit the edits: {[*missing, *surplus][0]} and {len(missing) + len(surplus) - 1} more", remedy="Was the folder changed by hand?")


def shared_names(network: PreTrainedModel) -> dict[str, set[str]]:
    """Every name in the state dict with all names of the same memory."""
    places: dict[tuple[int, ...], set[str]] = {}
    for name, tensor in network.state_dict().items():
        places.setdefault((tensor.data_ptr(), *tensor.shape), set()).add(name)
    return {name: names for names in places.values() for name in names}


def embedding_rows(network: PreTrainedModel) -> int:
    """Tokens that the input embedding has a row for."""
    embedding: Any = network.get_input_embeddings()
    return int(embedding.weight.shape[0])


def check_tokenizer(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises InputError if the tokenizer has more tokens than the embedding has rows."""
    rows = embedding_rows(network)
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer in {folder} does not fit the model: it has {len(tokenizer):,} tokens, the embedding {rows:,} rows",
            remedy="Put the tokenizer that the model was trained with beside its weights.",
        )


# Writing.


def save_plain(network: PreTrainedModel, config: PretrainedConfig, folder: Path) -> None:
    """Write network and config as transformers does."""
    quiet_transformers()
    live = network.config
    try:
        network.config = config
        network.save_pretrained(folder)
    finally:
        network.config = live


def save_state(network: PreTrainedModel, base: PretrainedConfig, folder: Path) -> None:
    """Write the state dict as it is, tensors of the same memory once, and the config that the edits start from."""
    import huggingface_hub

    quiet_transformers()
    huggingface_hub.save_torch_model(network, folder, safe_serialization=True)
    base.save_pretrained(folder)


def digest_state(network: PreTrainedModel) -> str:
    """Digest of every tensor by name, dtype, shape and bytes."""
    import torch

    state = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:LENGTH]


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that a tokenizer is, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


# What the config can say.


def folded(model: Model) -> PretrainedConfig | None:
    """The config that alone describes the edited network, or None if there is none."""
    if not model.edits:
        return model.base
    if not all(isinstance(edit, (Arrange, Narrow, Attributes, Tie)) for edit in model.edits):
        return None
    from etude.values.anatomy import candidates

    wanted = shapes(model.network)
    for config in candidates(model):
        try:
            if meta_shapes(config) == wanted and _same_behaviour(model.network, config):
                return config
        except (ValueError, RuntimeError, AttributeError, TypeError, ZeroDivisionError):
            continue  # the architecture refuses these numbers
    return None


def shapes(network: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def meta_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a network of this config; no memory is taken for it."""
    import torch

    with torch.device("meta"):
        return shapes(network_class(config)(copy.deepcopy(config)))


def _same_behaviour(network: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Whether a network of this config, given the same weights, gives the same logits."""
    fresh = rebuild(config, (), network.dtype)
    fresh.load_state_dict(network.state_dict())
    return difference(network, fresh.eval()) <= tolerance(network)


def padded(model: Model) -> PreTrainedModel:
    """A network of a plain config that computes what the edited one does: zeros where something was cut, or a bias is asked for.

    Raises InputError if the architecture has no place for what an edit added.
    """
    import torch

    beyond = [edit for edit in model.edits if not isinstance(edit, (Arrange, Narrow, Attributes, Bias))]  # Tie: a norm over fewer channels is no norm over padded ones
    state = {name: tensor.detach().clone() for name, tensor in model.network.state_dict().items()}
    for edit in reversed(model.edits):
        if isinstance(edit, Narrow):
            edit.pad(state)
    base = copy.deepcopy(model.base)
    if any(isinstance(edit, Bias) for edit in model.edits):
        for flag in ("attention_bias", "mlp_bias"):
            if hasattr(base, flag):
                setattr(base, flag, True)
    full = rebuild(base, tuple(edit for edit in model.edits if isinstance(edit, Arrange)), model.network.dtype)
    wanted = full.state_dict()
    state |= {name: torch.zeros_like(tensor) for name, tensor in wanted.items() if name not in state and name.endswith(".bias")}
    if beyond or state.keys() - wanted.keys():
        what = type(beyond[0]).__name__ if beyond else sorted(state.keys() - wanted.keys())[0]
        raise InputError(f"no plain {model.base.model_type} checkpoint can express {what}", remedy="Load the saved folder with Étude.")
    fresh = rebuild(full.config, (), model.network.dtype)
    load_state(fresh, state)
    return fresh.eval()


# Comparing.


def probe(network: PreTrainedModel, length: int = 8) -> dict[str, torch.Tensor]:
    """A small fixed input that the network accepts."""
    import torch

    rows = embedding_rows(network)
    ids = torch.randint(min(10, rows - 1), rows, (2, length), generator=torch.Generator().manual_seed(0)).to(network.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def outputs(network: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or for an encoder its last hidden states."""
    import torch

    with torch.no_grad():
        result = network(**inputs)
    return result.logits if "logits" in result else result[0]


def difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest absolute difference of two networks' outputs on the probe."""
    inputs = probe(one)
    modes = one.training, other.training
    one.eval(), other.eval()
    gap = (outputs(one, inputs).float() - outputs(other, {k: v.to(other.device) for k, v in inputs.items()}).to(one.device).float()).abs().max().item()
    one.train(modes[0]), other.train(modes[1])
    return gap


def tolerance(network: PreTrainedModel) -> float:
    """Largest difference of logits that is rounding: 1e-5 in float32, 0.05 in half precision."""
    import torch

    return 1e-5 if network.dtype == torch.float32 else 5e-2


def compare(network: PreTrainedModel, again: PreTrainedModel, folder: Path) -> None:
    """Raises RuntimeError if the network that was read back behaves otherwise."""
    gap = difference(network, again)
    if not gap <= tolerance(network):
        raise RuntimeError(f"what was saved in {folder} is not what was meant: its logits differ by {gap:.3g}")
