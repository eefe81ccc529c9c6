"""Puts the sections together into one page; the style sheet stands in page.css and is copied into it."""

from html import escape
from pathlib import Path
from typing import Any

from nanotrain.report import compression_sections, evaluation_sections, overview, provenance_sections, training_sections
from nanotrain.report.markup import Html
from nanotrain.report.run_folder import RunRecord

_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses scripts and requests, whatever a sample's text says."""


def render_page(run: RunRecord, numbers: dict[str, Any]) -> str:
    """Return the report as HTML; sections without content are left out."""
    sections = [
        ("Pipeline", overview.pipeline(run, numbers)),
        ("Quality and size", compression_sections.quality(numbers)),
        ("Training", training_sections.loss_curves(run, numbers)),
        ("Pruning", compression_sections.pruning(run)),
        ("Thinking budget", evaluation_sections.budget_curve(run)),
        ("Evaluation", evaluation_sections.tasks(run)),
        ("Samples", evaluation_sections.samples(run)),
        ("Blend", training_sections.blend(run)),
        ("Plan and actual", overview.plan_and_actual(numbers)),
        ("Data", provenance_sections.data(run)),
        ("Against the published run", provenance_sections.published(numbers)),
        ("Versions and digests", provenance_sections.versions(numbers)),
    ]
    shown = [(title, body) for title, body in sections if body]
    links = "".join(f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title, _ in shown)
    body = "".join(_section(title, content) for title, content in shown)
    name = escape(run.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: report</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><header><p>nanotrain run report</p>"
        f"<h1>{name}</h1>{overview.summary(run, numbers)}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main></body></html>\n'
    )


def _section(title: str, content: Html) -> str:
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{content}</section>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
