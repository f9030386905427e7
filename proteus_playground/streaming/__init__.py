"""The chunked shortlist: a document of any length is read by slices, scored, and a fixed buffer of champions is kept.

A document: stores <- tokenising, arrays <- token_cache <- sources. Imports run one way, as the arrows read.
"""

from .sources import TextRows, open_document
from .stores import Store, generated, parse_bytes
from .tokenising import encoder

__all__ = ["Store", "TextRows", "encoder", "generated", "open_document", "parse_bytes"]
