"""The notebooks, as a package so that importlib.resources finds them."""
