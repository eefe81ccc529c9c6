"""A few real generations, for people to read."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanotrain.data.manifest import DataFolder
from nanotrain.data.token_shards import TokenShard
from nanotrain.evaluation.prompts import Prompt
from nanotrain.generation.sampler import generate
from nanotrain.model.hybrid import HybridModel

CONTINUATION_PROMPT_TOKENS = 48
CONTINUATION_TOKENS = 64


def chat_samples(
    prompts: list[Prompt], graded: list[dict[str, Any]], *, kind: str, num_samples: int
) -> list[dict[str, Any]]:
    """Return the first response to each task, tasks in turn, up to `num_samples`: nothing is picked by quality."""
    first_of_task: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first_of_task.setdefault(prompt.task, index)
    firsts = list(first_of_task.values())
    order = firsts + [index for index in range(len(prompts)) if index not in set(firsts)]
    return [
        {
            "kind": kind,
            "source": prompts[index].task,
            "prompt": prompts[index].question,
            "thinking": graded[index]["thinking"],
            "response": graded[index]["answer"],
            "score": graded[index]["score"],
        }
        for index in order[:num_samples]
    ]


def continue_text(
    model: HybridModel,
    tokenizer: PreTrainedTokenizerBase,
    data_folder: Path,
    category: str,
    *,
    temperature: float,
    top_p: float,
    seed: int,
) -> dict[str, Any] | None:
    """Let the model go on with a held-out text as a base model does; None when the category has no text long enough."""
    shard = TokenShard(DataFolder(data_folder).shard(category, "validation"))
    prompt_ids = _opening(shard)
    if prompt_ids is None:
        return None
    eos = tokenizer.eos_token_id
    assert eos is not None, "our tokenizers end documents with eos"
    (continuation,) = generate(
        model,
        [prompt_ids],
        max_new_tokens=CONTINUATION_TOKENS,
        stop_ids=(eos,),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return {
        "kind": "continuation",
        "source": category,
        "prompt": tokenizer.decode(prompt_ids),
        "thinking": "",
        "response": tokenizer.decode([token for token in continuation if token != eos]),
        "score": None,
    }


def _opening(shard: TokenShard) -> list[int] | None:
    """Return the first tokens of the first document that goes on after them."""
    for index in range(shard.num_documents):
        document = shard.document(index)
        if len(document) > CONTINUATION_PROMPT_TOKENS + 1:
            return [int(token) for token in document[:CONTINUATION_PROMPT_TOKENS]]
    return None
