"""Small language models with Proteus attention: the model, its training, and the models that come along."""
