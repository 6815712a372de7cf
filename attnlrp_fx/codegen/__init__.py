"""From a rewritten graph to compiled programs: regions, tracing, what is kept, what it costs."""
