import pytest

from nanotrain.config.overrides import Override, sweep_suffix


@pytest.mark.parametrize(
    ("text", "head", "rest"),
    [
        ("seed=1", "seed", None),
        ("first.stage.x=a.b=c", "first", "stage.x=a.b=c"),
        ("+first.a={b:1}", "first", "+a={b:1}"),
        ("++first.a=1", "first", "++a=1"),
        ("~first.a", "first", "~a"),
        ("~first.a=1", "first", "~a=1"),
        ("first.model@stage.model=big", "first", "model@stage.model=big"),
        ("output_dir=/a.b/c", "output_dir", None),
        ("x.y=line\nbreak", "x", "y=line\nbreak"),
    ],
)
def test_the_head_comes_off_and_the_sign_stays(text, head, rest):
    override = Override(text)
    assert override.head == head and override.has_tail == (rest is not None)
    if rest is not None:
        assert override.without_head().text == rest


def test_suffixes_are_short_distinct_and_fit_a_folder_name():
    assert sweep_suffix(["seed=2", "stage.training.learning_rate=0.001"]) == "-seed-2-learning_rate-0.001"
    assert sweep_suffix(["a.steps=1", "b.steps=2"]) == "-a.steps-1-b.steps-2"
    assert sweep_suffix(["x='a/b c'"]) == "-x-a-b-c"
    long = [sweep_suffix([f"key={'v' * 300}{end}"]) for end in "ab"]
    assert long[0] != long[1] and all(len(suffix) < 130 for suffix in long)
