"""HTML pages that need nothing else: one file with its style and pictures inside, and no scripts."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picture:
    """
    A picture on a page.

    :param svg: The ``<svg>`` element
    :param title: What it shows
    :param caption: How to read it
    :param words: What can be seen in it, for those who do not see it
    """

    svg: str
    title: str
    caption: str
    words: str = ""


def render_page(package: str, template: str, **values: Any) -> bytes:
    """Fill a template of a package, which may include ``style.css.jinja``: light and dark, narrow screens and paper."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader(__package__, ".")]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(version=_version(), **values).encode("utf-8")


def _version() -> str:
    try:
        return importlib.metadata.version("sb3-offline-ft")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
