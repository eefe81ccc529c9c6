import pytest

from nanotrain.data.corpora.wikipedia import plain_text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("a [[river]] and [[River Thames|the Thames]]s", "a river and the Thamess"),
        ("x{{cite {{inner|a=b}} more}}y", "xy"),
        ("before{| class=x\n|-\n| cell {| nested |}\n|}after", "beforeafter"),
        ("fact<ref name=a>source</ref>, more<ref name=a /> end", "fact, more end"),
        ("[[File:a.jpg|thumb|A [[link]] inside]]text", "text"),
        ("[[Category:Things]]\n[[de:Ding]]text", "text"),
        ("see [http://example.org the page] here", "see the page here"),
        ("<!-- hidden -->shown<br />here", "shownhere"),
        ("== History ==\nold", "History\nold"),
        ("kept\n== See also ==\ndropped", "kept"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("5 &lt; 6 &amp; 7", "5 < 6 & 7"),
        ("", ""),
    ],
)
def test_markup(markup, text):
    assert plain_text(markup) == text


def test_unbalanced_markup_ends():
    assert "end" in plain_text("{{ open [[ link {| table ''' " * 50 + "\nend")
