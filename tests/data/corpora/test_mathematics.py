from nanotrain.data.corpora.mathematics import champ_problems, sympy_documentation, word_problem_texts
from nanotrain.data.corpora.word_problems import word_problems
from nanotrain.data.wheels import WheelReader


def test_documentation_strings_without_code_or_tests(fake_wheels):
    with WheelReader(fake_wheels["sympy"]) as reader:
        documents = list(sympy_documentation(reader))
    assert len(documents) == 30 and len({d.family for d in documents}) == 30
    for document in documents:
        assert document.text.startswith("Doc.") and ">>> 1 + 1\n" in document.text
        assert "def f" not in document.text and '"""' not in document.text


def test_problems_with_solution_and_answer(fake_wheels):
    with WheelReader(fake_wheels["champ-dataset"]) as reader:
        documents = list(champ_problems(reader))
    assert len(documents) == 25
    assert all(d.text.endswith("Solution.\nFirst.\nThen.\nAnswer: 7\n") for d in documents)


def test_word_problems_depend_on_their_number_only():
    first = list(word_problems(0, 60))
    later = list(word_problems(30, 30))
    assert first[-len(later) :] == later
    assert 50 < len(first) <= 60
    for problem in first:
        assert problem.steps.endswith("\n") and "####" not in problem.steps and "final answer" not in problem.question
        int(problem.answer)
    assert len({problem.family for problem in first}) > 20
    assert [d.family for d in word_problem_texts(0, 60)] == [p.family for p in first]
