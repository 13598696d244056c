"""For the site: the roles of docstrings (:func:`~package.name`) as the code that they name."""

import re

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **kwargs: object) -> str:
    return ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)
