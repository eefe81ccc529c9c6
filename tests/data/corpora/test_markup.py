import gzip

from hypothesis import given
from hypothesis import strategies as st

from nanotrain.data.corpora.markup import MIN_CHARACTERS, decode, html_text, man_text, pieces, pod_text


def test_html_keeps_words_and_preformatted_lines():
    page = (
        "<html><head><title>T</title></head><body><nav>menu</nav><script>x()</script><h1>Head &amp; line</h1>"
        "<p>First <b>bold</b>\n text.</p><!-- no --><pre>a\n  b &lt;</pre><ul><li>one<li>two</ul><p>Next: away</p></body></html>"
    )
    assert html_text(page) == "Head & line\nFirst bold text.\n\na\n  b <\n\none\ntwo"


def test_manual_pages_and_pod_lose_their_codes():
    roff = '.\\" c\n.TH LS 1\n.SH NAME\nls \\- list \\fBall\\fP\n.TP\n.B \\-a "x"\nshow\n.nf\n'
    assert man_text(roff) == "NAME\nls - list all\n\n-a x\nshow"
    assert pod_text("=head1 NAME\n\nperl - B<bold I<both>> L<text|there> L<perlfunc>\n\n=over\n\n=item * x\n\n=cut\n") == (
        "NAME\n\nperl - bold both text perlfunc\n\n* x"
    )  # fmt: skip


def test_decoding():
    assert decode(gzip.compress("ä\r\nb".encode()), "x.gz") == "ä\nb"
    assert decode(b"\xe4", "x") is None and decode(b"\xe4", "x", "iso-8859-1") == "ä"


@given(st.lists(st.text("ab \n", max_size=300), max_size=8).map("\n\n".join), st.integers(150, 400))
def test_pieces_are_short_and_lose_only_short_rests(text, limit):
    found = list(pieces(text, limit))
    assert all(MIN_CHARACTERS <= len(piece) - 1 <= limit for piece in found)
    kept = "".join("".join(found).split())
    whole = "".join(text.split())
    assert len(whole) - len(kept) <= MIN_CHARACTERS * (len(text) // (limit - 301) + 2) if limit > 301 else True
