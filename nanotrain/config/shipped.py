"""Where the recipes and configurations lie that come with the package, and finding one of them by name."""

from pathlib import Path

from nanotrain.config.errors import MissingInputError, nearest


def package_folder(name: str) -> Path:
    """Return the folder `configs` or `recipes`: inside the installed package, else in the checkout around it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def find_values(name: str | Path, folder: Path, what: str, beside: Path | None = None) -> Path:
    """Return a YAML file: a path as given, one beside another file, or a name in a folder below `configs`.

    Raises:
        MissingInputError: none of these; the message lists the nearest name.
    """
    shipped = package_folder("configs") / folder
    roots = [Path(), shipped] if beside is None else [beside.parent, Path(), shipped]
    for root in roots:
        for candidate in (root / name, root / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    names = [file.relative_to(shipped).with_suffix("").as_posix() for file in sorted(shipped.rglob("*.yaml"))]
    raise MissingInputError(f"`{name}` is neither a {what} file nor a shipped {what}; {nearest(str(name), names)}")
