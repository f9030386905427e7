"""What every other folder may use: files, argument checks, texts, progress. Knows nothing of attention."""

__version__ = "0.1.0"
