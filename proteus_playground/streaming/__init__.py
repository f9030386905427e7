"""The chunked shortlist: read a document of any length chunk by chunk, score each token, and keep the best in a buffer.

Opening a document: stores <- tokenising, arrays <- token_cache <- sources.
Pass 1: buffer <- pipeline, checkpoint <- run; scorers: layer_scorer, table_scorer. Pass 2: second_pass.
"""

from .sources import TextRows, open_document
from .stores import Store, generated, parse_bytes
from .tokenising import encoder

__all__ = ["Store", "TextRows", "encoder", "generated", "open_document", "parse_bytes"]
