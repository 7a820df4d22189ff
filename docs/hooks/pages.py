"""Pages as they are in the repository, made for the site: links to files outside docs/, pictures for two schemes.

Measured pages come last in the search. A page that loads something from the network is an error.
"""

import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError

PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">'
    r'<img alt="([^"]*)" src="([^"]*)"[^>]*></picture>'
)
FROM_THE_NETWORK = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]* (?:src|href)="(https?://[^"]*)"')
LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    if page.file.src_uri.startswith("results/"):
        page.meta.setdefault("search", {"boost": 0.1})
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def elsewhere(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target.startswith("docs/"):
            return match[0]
        return f"{match[1]}{config.repo_url}/blob/main/{target}{match[3]}"

    def of_scheme(match: re.Match[str]) -> str:
        dark, alt, light = match.groups()
        return f"![{alt}]({light}#only-light)\n![{alt}]({dark}#only-dark)"

    return PICTURE.sub(of_scheme, LINK.sub(elsewhere, markdown))


def on_post_page(output: str, page: Any, **kwargs: Any) -> None:
    if found := FROM_THE_NETWORK.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]}")
