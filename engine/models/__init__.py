"""A model as data: config.json to `ModelSpec`, to a `Program` of op calls, and the weights it
needs."""
