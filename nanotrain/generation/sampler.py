"""Plain generation: prompts in, continuations out."""

from collections.abc import Collection, Sequence

from nanotrain.generation.decoder import BatchDecoder
from nanotrain.model.hybrid import HybridModel


def generate(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until a stop id or for `max_new_tokens`.

    Args:
        model: in eval mode.
        prompts: token ids; lengths may differ.
        max_new_tokens: most tokens a row.
        stop_ids: a row ends with the first of these, which is part of what is returned.
        temperature: 0 = greedy.
        top_p: nucleus.
        seed: a row's draws depend on it and on the row's place, not on the other rows.

    Returns:
        The new token ids of each prompt.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return outputs
    decoder = BatchDecoder(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    active = list(range(len(prompts)))
    while True:
        tokens = decoder.next_tokens()
        staying = []
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            outputs[row].append(token)
            if token not in stop_ids and len(outputs[row]) < max_new_tokens:
                staying.append(place)
        if not staying:
            return outputs
        decoder.append([tokens[place] for place in staying], staying)
        active = [active[place] for place in staying]
