"""Small language models built around the layer, how they are trained, and the ones that come along."""
