"""What the caller did wrong, said in one line: the bad value, the limit, the way out."""

from __future__ import annotations


class Mistake(Exception):
    """Options, files or a server with which nothing can be measured."""
