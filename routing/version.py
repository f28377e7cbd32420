"""The version of this software, in one place: what a node says of itself, and what the package is built as."""

VERSION = "0.1.0"
SOFTWARE = f"hiveswarm/{VERSION}"
