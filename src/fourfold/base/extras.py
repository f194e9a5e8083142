"""How optional packages are installed."""

from __future__ import annotations


def install_extra(extra: str) -> str:
    """The command that adds an extra of pyproject.toml; the name `fourfold` of package indexes is another project's."""
    return f"`pip install -e '.[{extra}]'` in Fourfold's folder"
