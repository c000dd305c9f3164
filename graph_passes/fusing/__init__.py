"""From basic operators to a runtime's fused ones, where no exporter writes those itself."""
