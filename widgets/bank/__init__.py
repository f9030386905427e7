"""The panel of the KV bank: what a layer remembers while it reads and writes."""
