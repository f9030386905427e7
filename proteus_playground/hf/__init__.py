"""Models of the Hugging Face ecosystem: fetched, patched, looked into. transformers comes on first use."""

from proteus_playground.hf.auto import register

register()
