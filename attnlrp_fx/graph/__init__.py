"""What a graph says: what each op is, where a node came from, what leads where."""
