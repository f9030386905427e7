"""A folder that gives a model of yours the slider: made by `proteus convert`, trained by `proteus heal`."""
