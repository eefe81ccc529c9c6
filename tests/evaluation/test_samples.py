from pathlib import Path

from nanotrain.checkpoint.hf_folder import load_tokenizer
from nanotrain.data.token_shards import TokenShard
from nanotrain.evaluation import samples
from nanotrain.evaluation.prompts import Prompt
from nanotrain.evaluation.samples import chat_samples, continue_text
from nanotrain.model.hybrid import HybridModel


def test_samples_take_tasks_in_turn_and_ignore_quality() -> None:
    names = ["a", "a", "b", "a", "c"]
    prompts = [Prompt({"task": name}, f"q{i}", [i]) for i, name in enumerate(names)]
    graded = [{"thinking": f"t{i}", "answer": f"r{i}", "score": 0.0} for i in range(5)]
    shown = chat_samples(prompts, graded, kind="reasoning on", num_samples=4)
    assert [one["prompt"] for one in shown] == ["q0", "q2", "q4", "q1"]
    assert shown[1] == {
        "kind": "reasoning on",
        "source": "b",
        "prompt": "q2",
        "thinking": "t2",
        "response": "r2",
        "score": 0.0,
    }
    assert len(chat_samples(prompts, graded, kind="k", num_samples=99)) == 5


def test_continuation_starts_from_a_held_out_document(model: HybridModel, data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    one, again = (
        continue_text(model, tokenizer, data_folder, "web", temperature=0.8, top_p=0.9, seed=4) for _ in range(2)
    )
    assert one == again and one is not None
    document = TokenShard(data_folder / "web" / "validation").document(3)  # the first with more than the prompt
    assert one["prompt"] == tokenizer.decode([int(t) for t in document[: samples.CONTINUATION_PROMPT_TOKENS]])
    assert one["source"] == "web" and one["response"] and "</s>" not in one["response"]


def test_category_of_short_texts_gives_none(model: HybridModel, data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    assert continue_text(model, tokenizer, data_folder, "sft", temperature=0.0, top_p=1.0, seed=0) is None
