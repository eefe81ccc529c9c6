from nanotrain.data.corpora.source_code import codeio_programs, django_files
from nanotrain.data.wheels import WheelReader


def test_files_carry_their_path_and_belong_to_a_package(fake_wheels):
    with WheelReader(fake_wheels["django"]) as reader:
        documents = list(django_files(reader))
    assert len(documents) == 30
    for document in documents:
        path = document.text.split("\n", 1)[0].removeprefix("# ")
        assert path.startswith("django/part") and document.family == f"django:{path.removesuffix('.py')}"


def test_programs_follow_their_task_as_comment(fake_wheels):
    with WheelReader(fake_wheels["reasoning-gym"]) as reader:
        documents = list(codeio_programs(reader))
    assert len(documents) == 30 and len({d.family for d in documents}) == 30
    for document in documents:
        compile(document.text, "program", "exec")
        assert document.text.startswith("# ") and "\n# Input: n\ndef f" in document.text
