"""Tools that every other folder may use: files, argument checks, texts, progress. Nothing here concerns attention."""

__version__ = "0.1.0"
