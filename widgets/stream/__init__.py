"""The panel of the chunk buffer: a long document read chunk by chunk."""
