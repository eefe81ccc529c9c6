"""Where the numbers come from: data, differences from the published run, versions, digests."""

from typing import Any

from nanotrain.report.markup import Html, heading, in_order, show, show_bytes, show_digest, table
from nanotrain.report.run_folder import RunRecord


def data(run: RunRecord) -> Html:
    """Return what each prepare entry left."""
    parts = []
    for entry in run.by_stage("PrepareConfig"):
        results = entry.results
        categories = results.get("categories") or {}
        rows = [
            [
                name,
                one.get("train_documents"),
                one.get("train_tokens"),
                one.get("validation_documents"),
                one.get("validation_tokens"),
                None if one.get("bytes") is None else show_bytes(one["bytes"]),
            ]
            for name, one in ((name, categories[name]) for name in in_order(categories))
        ]
        headers = ["Category", "Documents", "Tokens", "Held-out documents", "Held-out tokens", "Text"]
        digests = [
            [key.removesuffix("_digest"), Html(show_digest(results[key]))]
            for key in ("manifest_digest", "tokenizer_digest")
            if results.get(key)
        ]
        chat = [[name.replace("_", " "), value] for name, value in (results.get("chat") or {}).items()]
        sources = [
            [one.get("name"), one.get("category"), one.get("package"), one.get("licence"), one.get("tokens")]
            for one in entry.manifest.get("sources") or []
        ]
        tables = table(headers, rows)
        tables += table(["Source", "Category", "Package", "Licence", "Tokens"], sources, text_columns=4)
        tables += table(["Chat", ""], [row for row in chat if not isinstance(row[1], dict)])
        parts.append(heading(entry.name) + tables + table(["Digest", ""], digests, text_columns=2))
    return Html("".join(parts))


def published(numbers: dict[str, Any]) -> Html:
    """Return the recipe values that differ from the published run's."""
    rows = [
        [
            row["entry"],
            Html(f"<code>{_code(row['key'])}</code>"),
            show(row["ours"]),
            show(row["published"]) + ("" if row["status"] == "published" else f" ({row['status']})"),
            "; ".join(text for text in (", ".join(row["sources"]), row["note"]) if text),
        ]
        for row in numbers["published"]
    ]
    sources = {key: title for row in numbers["published"] for key, title in row["sources"].items()}
    differences = table(["Stage", "Key", "Here", "Published", "Source"], rows, text_columns=5)
    return Html(differences + table(["Source", ""], sorted(sources.items()), text_columns=2))


def _code(key: str) -> str:
    return key.replace("&", "&amp;").replace("<", "&lt;").replace(".", ".<wbr>").replace("_", "_<wbr>")


def versions(numbers: dict[str, Any]) -> Html:
    """Return versions of the software and digests of the products."""
    rows = [[name, version] for name, version in numbers["versions"].items()]
    digests = [
        [name, stage["product"], stage["seed"], stage["package_version"], Html(show_digest(stage["product_digest"]))]
        for name, stage in numbers["stages"].items()
        if stage["finished"]
    ]
    headers = ["Stage", "Product", "Seed", "nanotrain", "sha256"]
    return Html(table(["Software", "Version"], rows, text_columns=2) + table(headers, digests, text_columns=5))
