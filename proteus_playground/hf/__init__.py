"""Models of the Hugging Face ecosystem: fetched, patched, looked into. transformers comes on first use."""
