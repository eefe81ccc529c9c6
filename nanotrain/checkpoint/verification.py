"""Does transformers' own NemotronH compute from a folder what our model computes?"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging as transformers_logging

from nanotrain.model.hybrid import HybridModel

NUM_PROMPTS = 2
NUM_GREEDY_TOKENS = 8


class VerificationError(RuntimeError):
    """A written folder does not mean to transformers what it means to us: a defect, not a user's mistake."""


def compare_with_transformers(
    model: HybridModel, folder: Path, *, prompt_length: int, tolerance: float, seed: int
) -> dict[str, float | int]:
    """Compare our fp32 model of a folder with transformers'; arguments and result as `verify_against_transformers`."""
    length = prompt_length or min(model.config.chunk_size + 5, 300)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, model.config.vocab_size, (NUM_PROMPTS, length), generator=generator)
    with _quiet(), torch.inference_mode():
        theirs = _load_with_transformers(folder)
        expected = theirs(prompts, use_cache=False).logits
        difference = float((model(prompts) - expected).abs().max())
        limit = tolerance * max(1.0, float(expected.abs().max()))
        if not difference <= limit:  # also when it is not a number
            raise VerificationError(
                f"{folder}: logits differ by {difference:.2e} from transformers' (limit {limit:.0e})"
            )
        continued = _greedy(model, prompts)
        _check_greedy(
            theirs(continued, use_cache=False).logits[:, length - 1 : -1], continued[:, length:], limit, folder
        )
    return {
        "max_abs_logit_difference": difference,
        "tokens_checked": NUM_PROMPTS * length,
        "greedy_tokens_checked": NUM_PROMPTS * NUM_GREEDY_TOKENS,
    }


def _greedy(model: HybridModel, prompts: Tensor) -> Tensor:
    """Continue prompts [B, S] token by token over our cache: [B, S + NUM_GREEDY_TOKENS]."""
    cache = model.new_cache(len(prompts))
    tokens, new = prompts, prompts
    for _ in range(NUM_GREEDY_TOKENS):
        new = model(new, cache=cache)[:, -1:].argmax(dim=-1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def _check_greedy(logits: Tensor, tokens: Tensor, limit: float, folder: Path) -> None:
    """Each of our tokens [B, T] must be the most probable one by transformers' logits [B, T, V], or tie with it."""
    shortfall = logits.max(dim=-1).values - logits.gather(2, tokens[..., None])[..., 0]
    if not bool((shortfall <= 2 * limit).all()):
        raise VerificationError(f"{folder}: greedy tokens differ from transformers' (by {float(shortfall.max()):.2e})")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or warnings about missing kernels while transformers loads and runs."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_with_transformers(folder: Path) -> Any:
    # Reached through the package, which imports the model's class only now: it takes two seconds.
    model, info = transformers.NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(info["mismatched_keys"])
    if wrong:
        raise VerificationError(f"{folder}: transformers could not place the tensor {wrong[0]}")
    return model.eval()
