"""Looking into one attention layer of a model: plain numbers out, for any display."""
