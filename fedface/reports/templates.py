"""The templates of reports and of an owner's pages: what they print is escaped, as HTML or as Markdown."""

from __future__ import annotations

import re

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedface import number_format
from fedface.reports.markdown import code_block, plain, table

MINUS = "\N{MINUS SIGN}"  # no line break after it
FILTERS = {
    "number": number_format.number,
    "constant": number_format.constant,
    "delta": number_format.format_delta,
    "epsilon": number_format.format_epsilon,
    "size": number_format.size,
    "seconds": number_format.seconds,
    "percent": number_format.percent,
    "counted": number_format.counted,
    "whole": lambda text: re.sub(r"(?<=\de)-(?=\d)", MINUS, text),
}


def html_template(source: str) -> Template:
    """A template of HTML; only `Markup` is printed as it is."""
    return _environment(autoescape=True).from_string(source)


def markdown_template(source: str) -> Template:
    """A template of Markdown; only its `table` and `code_block` are printed as they are."""
    environment = _environment(autoescape=False)
    environment.finalize = lambda value: value if isinstance(value, Markup) else plain(str(value))
    environment.globals.update(
        table=lambda heads, rows: Markup(
            "\n".join(table(map(plain, heads), [[plain(cell) for cell in row] for row in rows]))
        ),
        code_block=lambda text: Markup("\n".join(code_block(text))),
    )
    return environment.from_string(source)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(FILTERS)
    return environment
