"""Pages as they are in the repository, made for the site: links to files outside docs/, pictures for two schemes."""

import posixpath
import re
from typing import Any

PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">'
    r'<img alt="([^"]*)" src="([^"]*)"[^>]*></picture>'
)
LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
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
