"""The product of every training stage: a Hugging Face folder that transformers' NemotronH reads as it is.

config.json, *.safetensors, generation_config.json, nanotrain.json (provenance), README.md, and the tokenizer's files.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nanotrain.checkpoint import config_json
from nanotrain.checkpoint.model_card import CARD_FILE, model_card
from nanotrain.checkpoint.provenance import Provenance, load_provenance, save_provenance
from nanotrain.checkpoint.tensor_files import StoredTensors, open_tensors, write_tensors
from nanotrain.checkpoint.verification import compare_with_transformers
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.parameters import FP32_TENSORS, tensor_shapes
from nanotrain.runtime.files import folder_atomic, write_bytes_atomic, write_json_atomic

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_EMBEDDINGS, _HEAD = "backbone.embeddings.weight", "lm_head.weight"
_OLD_PREFIXES = {"backbone.embedding.": "backbone.embeddings.", "model.": "backbone."}


def load_config(folder: Path | str) -> ModelConfig:
    """Return the architecture of a checkpoint folder, ours or a published one.

    Raises:
        MissingInputError: the folder or its config.json is missing.
        UserError: config.json is corrupt, of another model type, or asks for what is not implemented.
    """
    folder = Path(folder)
    return config_json.from_json(config_json.read_config_json(folder), folder / config_json.CONFIG_FILE)


def load_state_dict(folder: Path | str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return all tensors by HybridModel's names, on the CPU.

    Args:
        folder: a checkpoint folder.
        dtype: cast to it (those that stay wide, such as A_log, to at least fp32); None = as stored.

    Raises:
        UserError: as `load_config`; or a tensor is missing, unexpected or of the wrong shape, or a file is corrupt.
    """
    state = dict(iterate_tensors(folder, dtype))
    if load_config(folder).tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDINGS]
    return state


def iterate_tensors(folder: Path | str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (HybridModel's name, tensor on the CPU), one in memory at a time; without `lm_head.weight` where it is tied.

    Arguments and errors as for `load_state_dict`.
    """
    tied: dict[str, Tensor] = {}
    with open_checkpoint(folder) as checkpoint:
        is_tied = checkpoint.config.tie_word_embeddings
        for name, stored_name in checkpoint.stored_names.items():
            tensor = checkpoint.stored.read_whole(stored_name)
            if is_tied and name in (_EMBEDDINGS, _HEAD):
                tied[name] = tensor
            if name != _HEAD or not is_tied:
                yield name, tensor if dtype is None else tensor.to(stored_dtype(name, dtype), copy=True)
    if len(tied) == 2 and not torch.equal(tied[_HEAD], tied[_EMBEDDINGS]):
        raise UserError(f"{folder}: `tie_word_embeddings` is true but {_HEAD} differs from the embeddings.")


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint folder whose tensors are read one by one, or in parts."""

    config: ModelConfig
    stored: StoredTensors
    stored_names: dict[str, str]
    """HybridModel's name -> name on disk, in the order of the files."""

    def read(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return [start, stop) ranges of a tensor along a dimension, one after the other.

        Raises:
            UserError: the file cannot be read.
        """
        return self.stored.read(self.stored_names[name], dim, ranges)


@contextmanager
def open_checkpoint(folder: Path | str) -> Iterator[OpenCheckpoint]:
    """Open a checkpoint folder and check that its tensors are those of its config.json.

    Raises:
        UserError: as `load_config`; or a tensor is missing, unexpected or of the wrong shape, or a file is corrupt.
    """
    folder = Path(folder)
    config = load_config(folder)
    with open_tensors(folder) as stored:
        yield OpenCheckpoint(config, stored, _checked_names(folder, config, stored.shapes))


def _checked_names(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    expected = tensor_shapes(config)
    optional = {_HEAD: expected[_EMBEDDINGS]} if config.tie_word_embeddings else {}
    names: dict[str, str] = {}
    for stored_name, shape in shapes.items():
        name = _canonical(stored_name)
        if name not in expected | optional:
            raise UserError(
                f"{folder}: the tensor {stored_name} is unexpected for the layers {config.hybrid_layer_pattern};"
                " config.json and weights do not belong together."
            )
        if name in names:
            raise UserError(f"{folder}: the tensors {names[name]} and {stored_name} are the same one; remove one.")
        names[name] = stored_name
        if shape != (expected | optional)[name]:
            raise UserError(
                f"{folder}: the tensor {stored_name} has the shape {list(shape)}, config.json says"
                f" {list((expected | optional)[name])}; config.json and weights do not belong together."
            )
    missing = sorted(expected.keys() - names.keys())
    if missing:
        raise UserError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} in all); copy the folder again.")
    return names


def _canonical(name: str) -> str:
    """Return today's name of a tensor that older releases, or transformers in memory, call otherwise."""
    for old, new in _OLD_PREFIXES.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return a tensor's dtype in a checkpoint of `dtype`: A_log, D and dt_bias are at least fp32."""
    return torch.promote_types(dtype, torch.float32) if name.rsplit(".", maxsplit=1)[-1] in FP32_TENSORS else dtype


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> HybridModel:
    """Return the model of a checkpoint folder in eval mode; `load_model(folder)(input_ids)` gives logits [B, S, V].

    Args:
        folder: a checkpoint folder.
        dtype: of the weights; A_log, D and dt_bias stay at least fp32.
        device: where to put it.

    Raises:
        UserError: as `load_state_dict`.
    """
    state = load_state_dict(folder, dtype)
    with torch.device("meta"):
        model = HybridModel(load_config(folder))
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()  # moving also ties the embeddings again


def save_model(
    model: HybridModel,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    provenance: Provenance | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a model as a checkpoint folder; arguments as `save_state_dict`."""
    save_state_dict(
        model.state_dict(),
        model.config,
        folder,
        dtype=dtype,
        tokenizer_from=tokenizer_from,
        provenance=provenance,
        max_shard_bytes=max_shard_bytes,
    )


def save_state_dict(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    provenance: Provenance | None = None,
    max_shard_bytes: int = 5 * 2**30,
    gather: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        state_dict: by HybridModel's names; with tied embeddings `lm_head.weight` may be left out.
        config: the architecture.
        folder: replaced when it exists.
        dtype: of the tensors on disk; those that stay wide, such as A_log, are at least fp32. None = as they are.
        tokenizer_from: folder whose tokenizer files are copied; None = none.
        provenance: written to nanotrain.json. Changes of an imported config that its parent recorded are carried on.
        max_shard_bytes: weights above it go into several files with an index.
        gather: returns a whole tensor by its name, where those of `state_dict` only tell shape and dtype; called once
            for each, in the order of `planning.parameters.tensor_shapes`.

    Raises:
        UserError: the tokenizer is missing, or has more tokens than the model.
    """
    folder = Path(folder)
    if tokenizer_from is not None:
        check_tokenizer_size(load_tokenizer(tokenizer_from), config, tokenizer_from)
    dtypes = _dtypes_to_write(state_dict, config, dtype)
    shapes = tensor_shapes(config)
    sizes = {name: math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes}
    if config.tie_word_embeddings:
        # transformers does not tie this model's matrices whatever its config says, so both are written.
        sizes[_HEAD] = sizes[_EMBEDDINGS]
    tensors = _tensors_to_write(gather or state_dict.__getitem__, dtypes, config)
    with folder_atomic(folder) as temporary:
        write_tensors(tensors, sizes, temporary, max_shard_bytes)
        write_description(temporary, config, dtypes[_EMBEDDINGS], tokenizer_from, provenance)


def write_description(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    tokenizer_from: Path | None,
    provenance: Provenance | None,
) -> None:
    """Write everything but the weights into an existing folder; arguments as `save_state_dict`."""
    name = str(dtype).removeprefix("torch.")
    if provenance is not None:
        provenance = _with_inherited_changes(provenance)
    write_json_atomic(folder / config_json.CONFIG_FILE, config_json.to_json(config, name))
    write_json_atomic(folder / "generation_config.json", config_json.generation_json(config))
    write_bytes_atomic(folder / CARD_FILE, model_card(config, name, provenance).encode())
    if provenance is not None:
        save_provenance(folder, provenance)
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, folder)


def _dtypes_to_write(
    state_dict: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    shapes = tensor_shapes(config)
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if name in shapes}
    assert given == shapes, "the tensors are not those of the configuration"
    return {name: stored_dtype(name, dtype or state_dict[name].dtype) for name in shapes}


def _tensors_to_write(
    whole: Callable[[str], Tensor], dtypes: dict[str, torch.dtype], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    head = None
    for name, dtype in dtypes.items():
        tensor = whole(name).detach().to("cpu", dtype).contiguous()
        if name == _EMBEDDINGS and config.tie_word_embeddings:
            head = tensor.clone()
        yield name, tensor
    if head is not None:
        yield _HEAD, head


def _with_inherited_changes(provenance: Provenance) -> Provenance:
    """Carry on what an ancestor's import changed, or record it when the parent is the imported folder itself."""
    parent = Path(provenance.parent)
    if provenance.config_changes or not provenance.parent or not (parent / config_json.CONFIG_FILE).is_file():
        return provenance
    ancestor = load_provenance(parent)
    changes = config_json.config_changes(config_json.read_config_json(parent))
    if ancestor is not None:
        changes = ancestor.config_changes | changes
    return dataclasses.replace(provenance, config_changes=changes)


def verify_against_transformers(
    folder: Path | str, *, prompt_length: int = 0, tolerance: float = 1e-4, seed: int = 0
) -> dict[str, float | int]:
    """Load a folder with our model and with transformers' NemotronH in fp32, compare logits and greedy tokens.

    Args:
        folder: a checkpoint folder.
        prompt_length: tokens of each pseudo-random prompt; 0 = a chunk and a bit, at most 300.
        tolerance: largest difference of logits, relative to the largest logit where that is above 1.
        seed: of the prompts.

    Returns:
        max_abs_logit_difference, tokens_checked (positions compared), greedy_tokens_checked.

    Raises:
        UserError: as `load_model`.
        VerificationError: a logit differs by more than the tolerance, or a greedy token differs beyond a tie.
    """
    return compare_with_transformers(
        load_model(folder), Path(folder), prompt_length=prompt_length, tolerance=tolerance, seed=seed
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tokenizer or checkpoint folder, from its files alone.

    Raises:
        MissingInputError: there is no tokenizer.json.
        UserError: it cannot be read, or has more tokens than the model in the same folder.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise MissingInputError(f"{file} is missing; give a folder that holds a tokenizer.")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises bare Exception for any malformed tokenizer.json
        raise UserError(f"{file} cannot be read ({error}); copy the tokenizer again.") from error
    if (folder / config_json.CONFIG_FILE).is_file():
        check_tokenizer_size(tokenizer, load_config(folder), folder)
    return tokenizer


def check_tokenizer_size(tokenizer: PreTrainedTokenizerFast, config: ModelConfig, folder: Path | str) -> None:
    """Raise UserError when the tokenizer of `folder` has ids that the model does not know."""
    highest = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    if highest > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {highest} tokens, the model's `vocab_size` is {config.vocab_size}; use the"
            " tokenizer that the model was trained with."
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that are there; the names are TOKENIZER_FILES."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
