"""From a model to one graph of functional ATen ops."""
