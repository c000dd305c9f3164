"""What a run of a graph does, counted from the graph alone: nodes, bytes read, multiplications."""
