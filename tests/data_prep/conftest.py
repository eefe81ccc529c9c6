from tests.data.conftest import num_ranks, tekken_json, tokenizer_folder

__all__ = ["num_ranks", "tekken_json", "tokenizer_folder"]
