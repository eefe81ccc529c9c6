from nanotrain.data.corpora.translations import chat_in_languages, django_messages, exam_questions, read_messages
from nanotrain.data.wheels import WheelReader

PO = r"""# comment
msgid ""
msgstr ""
"Language: de\n"

#, python-format
msgctxt "menu"
msgid "Open \"%s\""
msgstr "\"%s\" öffnen"

msgid ""
"Two "
"lines\n"
msgstr ""
"Zwei "
"Zeilen\n"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

msgid "untranslated"
msgstr ""

msgid "same"
msgstr "same"
"""


def test_messages_are_unescaped_joined_and_paired():
    assert read_messages(PO) == [
        ('Open "%s"', '"%s" öffnen'),
        ("Two lines\n", "Zwei Zeilen\n"),
        ("%d day", "%d Tag"),
    ]


def test_one_message_has_one_family_in_all_languages(fake_wheels):
    families: dict[str, set[str]] = {}
    with WheelReader(fake_wheels["django"]) as reader:
        documents = list(django_messages(reader))
    assert {document.text[:4] for document in documents} == {"[de]", "[fr]", "[ja]"}
    for document in documents:
        for line in document.text.splitlines():
            if line.startswith("  ("):
                families.setdefault(line, set()).add(document.family)
    assert families and all(len(family) == 1 for family in families.values())


def test_questions_and_topics_are_families_across_languages(fake_wheels):
    with WheelReader(fake_wheels["lm-eval"]) as reader:
        questions = list(exam_questions(reader))
    assert len(questions) == 10 and {q.family for q in questions} == {f"mmlu:law:{n}" for n in range(5)}
    assert all("\nA. " in q.text and q.text.endswith("\n= B\n") for q in questions)
    with WheelReader(fake_wheels["chatterbot-corpus"]) as reader:
        talks = list(chat_in_languages(reader))
    assert {talk.family for talk in talks} == {f"chatterbot:topic{n}" for n in range(12)}
