"""Which rule stands where: rules, the roles of layers, and composites of matcher → rule."""
